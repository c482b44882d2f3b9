"""What differs between two configurations, what a running daemon takes over of it, and how both are told."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from llmd.cli import main_command
from llmd.config import (
    CacheConfig,
    Config,
    KeyConfig,
    LimitsConfig,
    LogConfig,
    ModelConfig,
    PluginsConfig,
    SchedulerConfig,
    ServerConfig,
)
from llmd.config_diff import IDLE_KEYS, LIVE_KEYS, Outcome, Rules, changes, merge
from llmd.config_keys import find_field

OLD = Config(keys=(KeyConfig(name="alice", key="a"), KeyConfig(name="bob", key="b")))
NEW = Config(
    models=(ModelConfig(dtype="float32", override_generation_config={"temperature": 0.5}),),
    server=ServerConfig(api_keys=("k",), port=1),
    keys=(KeyConfig(name="carol", key="c"), KeyConfig(name="alice", key="z", weight=2.0)),
    log=LogConfig(level="debug"),
    limits=LimitsConfig(max_n=3),
    scheduler=SchedulerConfig(policy="fcfs", max_num_seqs=8),
    plugins=PluginsConfig(zeta={"depth": 3, "rate": 1}, disable=("x",)),
)
RULES = Rules({"zeta": frozenset({"rate"})})
TEXTS = [
    "models[0].dtype: needs a restart ('auto' → 'float32')",
    "models[0].override_generation_config.temperature: applied (none → 0.5)",
    "scheduler.policy: needs a drain ('fair' → 'fcfs')",
    "scheduler.max_num_seqs: needs a restart (256 → 8)",
    "server.port: needs a restart (8000 → 1)",
    "server.api_keys: applied",
    "keys.alice.key: applied",
    "keys.alice.weight: applied (1.0 → 2.0)",
    "keys.bob: applied (there → none)",
    "keys.carol: applied (none → there)",
    "limits.max_n: applied (16 → 3)",
    "plugins.disable: needs a restart",
    "plugins.zeta.depth: needs a restart",
    "plugins.zeta.rate: applied",
    "log.level: applied ('info' → 'debug')",
]


def test_every_difference_is_found_and_judged_and_no_secret_told():
    assert [change.text for change in changes(OLD, NEW, RULES)] == TEXTS
    assert changes(NEW, NEW) == []
    [change] = changes(Config(), Config(models=(ModelConfig(), ModelConfig(model="x"))))
    assert (change.path, change.outcome) == (("models",), Outcome.RESTART)


def test_only_live_keys_are_merged():
    live = merge(OLD, NEW, Outcome.APPLIED, rules=RULES)
    assert live.keys == NEW.keys
    assert live.limits == NEW.limits
    assert live.models[0].override_generation_config == {"temperature": 0.5}
    assert live.models[0].dtype == "auto"
    assert (live.server.api_keys, live.server.port) == (("k",), 8000)
    assert live.scheduler == OLD.scheduler
    assert live.plugins.model_extra == {"zeta": {"rate": 1}}
    left = [change for change in changes(live, NEW, RULES) if change.outcome is Outcome.APPLIED]
    assert left == []


def test_what_needs_a_drain_is_merged_later():
    live = merge(OLD, NEW, Outcome.APPLIED, rules=RULES)
    idle = merge(live, NEW, Outcome.DRAIN, rules=RULES)
    assert idle.scheduler == SchedulerConfig(policy="fcfs")
    assert {change.outcome for change in changes(idle, NEW, RULES)} == {Outcome.RESTART}


def test_a_removed_plugin_table_goes():
    old = Config(plugins=PluginsConfig(zeta={"rate": 1}))
    assert merge(old, Config(), Outcome.APPLIED, rules=RULES).plugins.model_extra == {"zeta": {}}


@pytest.mark.parametrize("pattern", [*LIVE_KEYS, *IDLE_KEYS])
def test_the_keys_of_the_lists_exist(pattern):
    path = tuple(0 if part == "*" else part for part in pattern)
    assert find_field(Config, path) is not None or hasattr(Config(), str(path[0]))
    assert str(path[-1]) in {*Config.model_fields, *_fields_of(path)}


def _fields_of(path):
    table = Config()
    for part in path[:-1]:
        table = table[part] if isinstance(part, int) else getattr(table, part)
    return type(table).model_fields


def test_isolation_of_prefix_caches_is_live():
    [change] = changes(Config(), Config(cache=CacheConfig(isolate_keys=True)))
    assert change.text == "cache.isolate_keys: applied (false → true)"


# --- the command


def run(*arguments, cwd: Path):
    return CliRunner().invoke(main_command, [*arguments], catch_exceptions=True)


def test_llmd_config_diff_against_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old.toml").write_text("[server]\nport = 1\n")
    Path("new.toml").write_text("[server]\nport = 2\n[limits]\nmax_n = 2\n")
    result = run("config", "diff", "--config", "new.toml", "--against", "old.toml", cwd=tmp_path)
    assert result.output == "server.port: needs a restart (1 → 2)\nlimits.max_n: applied (16 → 2)\n"
    result = run("config", "--config", "old.toml", "diff", "--against", "old.toml", cwd=tmp_path)
    assert result.output == "no key differs\n"


def test_llmd_config_diff_without_a_daemon_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("llmd.toml").write_text("[server]\nadmin_socket = 'there.sock'\n")
    result = run("config", "diff", "--config", "llmd.toml", cwd=tmp_path)
    assert result.exit_code != 0
    assert "there.sock" in f"{result.output}{result.exception}"
