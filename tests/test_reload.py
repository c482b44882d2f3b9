"""Keys, middlewares and settings that change while requests run, all at once or not at all."""

import asyncio
import signal
from types import SimpleNamespace

import pytest
from daemons import Daemon
from server.serving import FakeService, call, make_context, serving

from llmd.config import Config, KeyConfig, LimitsConfig, ModelConfig, PluginsConfig, SchedulerConfig, Section, ServerConfig
from llmd.errors import ConfigError
from llmd.plugin.catalog import build_catalog
from llmd.plugin.specs import AuthenticatorSpec, ConfigSectionSpec
from llmd.reload import LiveAuthenticators, LiveMiddlewares, Reloader
from llmd.text.defaults import GenerationDefaults


class Key:
    """Knows the senders of one configuration."""

    def __init__(self, keys):
        self.keys = keys

    async def authenticate(self, headers, peer):
        if headers.get("key") == "boom":
            raise RuntimeError("boom")
        return headers["key"] if headers.get("key") in self.keys else None


def build(config):
    """An authenticator, if there are keys; one key cannot be used."""
    if "bad" in config.server.api_keys:
        raise ConfigError("server.api_keys: 'bad' is not valid")
    return Key(config.server.api_keys) if config.server.api_keys else None


def config_with(*keys):
    return Config(server=ServerConfig(api_keys=keys))


AUTHENTICATOR = AuthenticatorSpec(name="k", summary="", build=build)


async def test_keys_change_while_serving():
    live = LiveAuthenticators([AUTHENTICATOR], config_with("one"))
    assert await live.authenticate({"key": "one"}, None) == "one"
    assert await live.authenticate({}, None) is None
    commit = live.prepare(config_with("two"))
    assert await live.authenticate({"key": "one"}, None) == "one"  # not before
    commit()
    assert await live.authenticate({"key": "one"}, None) is None
    assert await live.authenticate({"key": "two"}, None) == "two"
    for bad in (config_with("bad"), config_with()):
        with pytest.raises(ConfigError):
            live.prepare(bad)
    assert await live.authenticate({"key": "two"}, None) == "two"
    with pytest.raises(RuntimeError):  # the gate refuses the request then
        await live.authenticate({"key": "boom"}, None)


async def test_without_keys_everyone_is_anonymous_until_there_is_one():
    live = LiveAuthenticators([AUTHENTICATOR], config_with())
    assert (await live.authenticate({}, None)).key == ""
    live.prepare(config_with("one"))()
    assert await live.authenticate({}, None) is None


async def test_middlewares_come_change_and_go():
    from llmd_plugins.server import cors

    live = LiveMiddlewares(cors.llmd_register_middlewares(), Config())
    async with serving(make_context(middlewares=live.specs())) as url:

        async def allowed():
            answer = await call(url, "GET", "/health", headers={"Origin": "https://a.example"})
            assert answer.status == 200
            return answer.headers.get("Access-Control-Allow-Origin")

        assert await allowed() is None
        live.prepare(Config(server=ServerConfig(cors_allowed_origins=("https://a.example",))))()
        assert await allowed() == "https://a.example"
        live.prepare(Config(server=ServerConfig(cors_allowed_origins=("https://b.example",))))()
        assert await allowed() is None
        live.prepare(Config())()
        assert await allowed() is None


# --- the whole


class Zeta(Section):
    """A plugin's settings, one of which it looks at whenever it needs it."""

    rate: int = 1
    depth: int = 1


class Service(FakeService):
    """A model that notes what it is told."""

    def __init__(self):
        super().__init__()
        self.config, self.names = ModelConfig(), ("demo",)
        self.seen = []
        self.defaults = GenerationDefaults({}, ())
        self.engine = SimpleNamespace(
            is_idle=False, set_shares=self.seen.append, replace_queue=lambda *told: self.seen.append(told)
        )

    def read_defaults(self, model):
        if model.override_generation_config.get("temperature", 0) < 0:
            raise ConfigError("override_generation_config: temperature must be at least 0")
        return GenerationDefaults(dict(model.override_generation_config), ())

    def reconfigure(self, config, model, defaults):
        self.seen.append((config.limits.max_n, defaults.sampling))


@pytest.fixture
def world():
    """A reloader, what it writes to, and the configuration that it will read next."""
    catalog = build_catalog(PluginsConfig(autoload=False))
    catalog.config_sections._offers["zeta"] = SimpleNamespace(
        spec=ConfigSectionSpec(name="zeta", summary="", model=Zeta, live=frozenset({"rate"}))
    )
    service = Service()
    config = Config(server=ServerConfig(api_keys=("one",)))
    context = make_context(service, config=config, sections={"zeta": Zeta()})
    live = LiveAuthenticators([AUTHENTICATOR], config)
    found = SimpleNamespace(context=context, service=service, live=live, told=[], next=config)
    catalog.settings["zeta"] = context.sections["zeta"]
    found.catalog = catalog
    found.reloader = Reloader(
        catalog, context, [live], lambda: found.next, lambda config: f"queue {config.scheduler.policy}"
    )
    return found


async def test_everyone_goes_by_the_new_configuration_at_once(world, monkeypatch):
    monkeypatch.setattr(type(world.catalog), "notify", lambda self, hook, **told: world.told.append((hook, told)))
    world.next = Config(
        server=ServerConfig(api_keys=("two",), port=1, request_timeout_s=5.0),
        models=(ModelConfig(override_generation_config={"temperature": 0.5}),),
        limits=LimitsConfig(max_n=2),
        keys=(KeyConfig(name="alice", key="k", weight=2.0),),
        plugins=PluginsConfig(zeta={"rate": 7, "depth": 9}),
    )
    before = world.context.config
    dry = await world.reloader.reload(is_dry=True)
    assert world.context.config is before
    assert world.service.seen == []
    report = await world.reloader.reload()
    assert report == dry
    assert report.problems == []
    config = world.context.config
    assert (config.server.request_timeout_s, config.server.port, config.limits.max_n) == (5.0, 8000, 2)
    assert world.service.seen[0] == (2, {"temperature": 0.5})
    assert world.service.seen[1]["alice"].weight == 2.0
    assert world.context.sections["zeta"] == Zeta(rate=7, depth=1)
    assert await world.live.authenticate({"key": "two"}, None) == "two"
    assert world.context.quotas.allows("alice", ("demo",))
    assert [hook for hook, _ in world.told] == ["llmd_reloaded"]
    assert world.told[0][1]["sections"]["zeta"].rate == 7
    outcomes = {row["key"]: row["outcome"] for row in report.as_dict()["changes"]}
    assert outcomes["server.port"] == outcomes["plugins.zeta.depth"] == "needs a restart"
    assert outcomes["keys.alice"] == outcomes["plugins.zeta.rate"] == "applied"


@pytest.mark.parametrize(
    "change",
    [
        {"server": ServerConfig(api_keys=("bad",))},
        {"server": ServerConfig()},
        {"models": (ModelConfig(override_generation_config={"temperature": -1}),)},
        {"scheduler": SchedulerConfig(policy="nonsense")},
        {"plugins": PluginsConfig(zeta={"rate": "x"})},
    ],
)
async def test_whoever_refuses_nothing_changes(world, change):
    world.next = Config(**{"server": ServerConfig(api_keys=("two",)), "limits": LimitsConfig(max_n=2), **change})
    before = world.context.config
    report = await world.reloader.reload()
    assert report.problems
    assert all(row.outcome.value == "refused" for row in report.changes)
    assert report.as_dict()["refused"]
    assert world.context.config is before
    assert world.service.seen == []
    assert await world.live.authenticate({"key": "one"}, None) == "one"


async def test_a_policy_waits_until_nothing_runs(world):
    world.next = Config(server=ServerConfig(api_keys=("one",)), scheduler=SchedulerConfig(policy="fcfs"))
    report = await world.reloader.reload()
    assert [change.text for change in report.changes] == ["scheduler.policy: needs a drain ('fair' → 'fcfs')"]
    await asyncio.sleep(0.3)
    assert world.context.config.scheduler.policy == "fair"
    world.service.engine.is_idle = True
    await asyncio.sleep(0.3)
    assert world.context.config.scheduler.policy == "fcfs"
    assert (world.next.scheduler, "queue fcfs") in world.service.seen


async def test_what_is_taken_back_before_nothing_runs_is_not_applied(world):
    world.next = Config(server=ServerConfig(api_keys=("one",)), scheduler=SchedulerConfig(policy="fcfs"))
    await world.reloader.reload()
    world.next = Config(server=ServerConfig(api_keys=("one",)))
    await world.reloader.reload()
    world.service.engine.is_idle = True
    await asyncio.sleep(0.3)
    assert world.context.config.scheduler.policy == "fair"


async def test_without_a_file_there_is_nothing_to_reload(world):
    world.reloader._read = None
    assert (await world.reloader.reload()).problems == ["there is no configuration file to reload"]


# --- a real daemon

FIRST = """
[server]
admin_socket = "FOLDER/admin.sock"
[[keys]]
name = "alice"
key = "one"
requests_per_minute = 1
[[keys]]
name = "bob"
key = "two"
"""


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def test_limits_keys_and_log_level_change_in_a_running_daemon(tmp_path):
    file, first = tmp_path / "llmd.toml", FIRST.replace("FOLDER", str(tmp_path))
    file.write_text(first)
    with Daemon("--config", "llmd.toml", cwd=tmp_path) as running:
        running.ready()
        body = {"prompt": "hello", "max_tokens": 4}
        statuses = [running.get("/v1/completions", body, **bearer("one"))[0] for _ in range(2)]
        assert statuses == [200, 429]
        file.write_text(first.replace("= 1", "= 100").replace('"two"', '"three"') + "max_tokens = 2\n")
        status, report = running.admin("/admin/reload?dry_run=true", {})
        assert status == 200
        assert [row["outcome"] for row in report["changes"]] == ["applied"] * 3
        assert running.get("/v1/completions", body, **bearer("one"))[0] == 429
        running.signal(signal.SIGHUP)
        running.wait_for("reloaded: 3 keys changed")
        assert running.get("/v1/completions", body, **bearer("one"))[0] == 200
        assert running.get("/v1/completions", body, **bearer("two"))[0] == 401
        status, answer = running.get("/v1/completions", body, **bearer("three"))
        assert (status, answer["error"]["param"]) == (400, "max_tokens")
        file.write_text(first + "[limits\n")
        status, report = running.admin("/admin/reload", {})
        assert status == 422
        assert report["problems"] == ["llmd.toml:11: Expected ']' at the end of a table declaration"]
        assert running.get("/v1/completions", body, **bearer("one"))[0] == 200
        assert running.stop() == 0
