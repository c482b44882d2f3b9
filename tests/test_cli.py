"""The `llmd` program as a user meets it: quick, and every mistake a line on stderr and an exit code."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_wheels import Wheels, sampler

ROOT = Path(__file__).parent.parent

COMMAND = """
from llmd.api.v1 import CommandSpec, hookimpl

def build():
    import click

    return click.Command("zeta", callback=lambda: click.echo("zeta runs"))

@hookimpl
def llmd_register_commands():
    return [CommandSpec(name="zeta", summary="for tests", build=build)]
"""


def llmd(*arguments, cwd=ROOT, **environment):
    """Run the program in a process of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("LLMD_")} | environment
    return subprocess.run(
        [sys.executable, "-m", "llmd", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def wheels(tmp_path):
    """A folder that the program finds wheels in."""
    folder = tmp_path / "site"
    folder.mkdir()
    return Wheels(folder)


def with_wheels(wheels):
    return {"PYTHONPATH": f"{wheels.folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def test_help_is_quick():
    """The bound leaves room for other work on the same cores: processor time is what the program is answerable for."""
    before = os.times()
    run = llmd("--help")
    after = os.times()
    assert run.returncode == 0
    assert run.stderr == ""
    assert "Serve language models" in run.stdout
    took_s = after.children_user + after.children_system - before.children_user - before.children_system
    assert took_s < 0.5


def test_commands_and_unknown_commands():
    run = llmd("--help")
    for name in ("serve", "check", "plugins", "config", "bench"):
        assert f"\n  {name} " in run.stdout
    run = llmd("serv")
    assert run.returncode == 2
    assert "there is no command 'serv'; did you mean serve?" in run.stderr


def test_without_anything_help_is_shown():
    assert "Usage: llmd" in llmd().stdout
    assert llmd("--version").stdout.startswith("llmd 0.")


def test_wheel_brings_a_command(wheels):
    wheels.add("acme-zeta", COMMAND)
    assert "zeta for tests" in " ".join(llmd("--help", **with_wheels(wheels)).stdout.split())
    assert llmd("zeta", **with_wheels(wheels)).stdout == "zeta runs\n"


def test_check_of_the_committed_file():
    run = llmd("check", "--config", "etc/llmd.toml")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("etc/llmd.toml: fine; ")


def test_check_tells_all_mistakes_and_exits_78(tmp_path):
    file = tmp_path / "llmd.toml"
    file.write_text(
        "[[models]]\nmodel = './nowhere'\nquantization = 'int9'\nchat_template = 'none.jinja'\nexecutor = 'thred'\n"
        "[scheduler]\npolicy = 'fifo'\n[server]\napi_key_file = 'keys'\nuds = '/nowhere/x.sock'\n[plugins.zeta]\nx = 1\n"
    )
    run = llmd("check", "--config", "llmd.toml", cwd=tmp_path)
    assert run.returncode == 78
    lines = run.stderr.splitlines()
    expected = {
        "llmd: llmd.toml:2: models[0].model: './nowhere' does not exist; allowed: a folder with config.json, a hub name, or",
        "llmd: llmd.toml:3: models[0].quantization: 'int9' is not known; did you mean int8?",
        "llmd: llmd.toml:4: models[0].chat_template: 'none.jinja' is not a file",
        "llmd: llmd.toml:5: models[0].executor: 'thred' is not known; did you mean thread?",
        "llmd: llmd.toml:7: scheduler.policy: 'fifo' is not known; allowed: 'fair', 'fcfs', 'priority'",
        "llmd: llmd.toml:9: server.api_key_file: 'keys' is not a file",
        "llmd: llmd.toml:10: server.uds: '/nowhere/x.sock' is in a folder that does not exist",
        "llmd: llmd.toml:11: unknown key plugins.zeta; allowed: ",
    }
    assert len(lines) == len(expected)
    for start in expected:
        assert any(line.startswith(start) for line in lines), start


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ("", "config.json: architectures must be a list of names"),
        ('"architectures": ["NewForCausalLM"],', "architecture NewForCausalLM is not known; known are "),
    ],
)
def test_check_reads_the_models_config(tmp_path, config, problem):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(
        f'{{{config} "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,'
        ' "intermediate_size": 8, "max_position_embeddings": 8}'
    )
    (tmp_path / "llmd.toml").write_text("[[models]]\nmodel = './m'\n")
    run = llmd("check", "--config", "llmd.toml", cwd=tmp_path)
    assert run.returncode == 78
    assert run.stderr.startswith(f"llmd: llmd.toml:2: models[0].model: './m' cannot be served: {problem}")


def test_keys_without_an_authenticator_are_refused(tmp_path):
    """Auth fails closed, also when the plugin that asks for keys was disabled."""
    (tmp_path / "llmd.toml").write_text("[server]\napi_keys = ['k']\n[plugins]\ndisable = ['auth.api_keys']\n")
    run = llmd("check", "--config", "llmd.toml", cwd=tmp_path)
    assert run.returncode == 78
    assert "llmd.toml:2: server.api_keys: no authenticator is loaded that could ask for keys" in run.stderr


def test_configuration_that_names_what_a_broken_wheel_provides(wheels, tmp_path):
    wheels.add("acme-zeta", "import acme_is_not_there")
    (tmp_path / "llmd.toml").write_text("[[models]]\nquantization = 'zeta'\n")
    run = llmd("check", "--config", "llmd.toml", cwd=tmp_path, **with_wheels(wheels))
    assert run.returncode == 78
    assert "models[0].quantization: 'zeta' is not known" in run.stderr
    assert "these plugins did not load, `llmd plugins` tells why: acme-zeta.main" in run.stderr


def test_plugins_as_table_and_json(wheels):
    wheels.add("acme-good", sampler("good"))
    wheels.add("acme-bad", "raise RuntimeError('ouch')")
    wheels.add("acme-new", "from llmd.api.v1 import Later")
    run = llmd("plugins", **with_wheels(wheels))
    assert run.returncode == 0
    assert run.stdout.splitlines()[0].split() == ["NAME", "DISTRIBUTION", "STATE", "IMPORT", "PROVIDES", "OR", "REASON"]
    lines = {line.split()[0]: line for line in run.stdout.splitlines()}
    assert "loaded" in lines["acme-good.main"]
    assert "samplers.good" in lines["acme-good.main"]
    assert "RuntimeError: ouch" in lines["acme-bad.main"]
    assert "incompatible" in lines["acme-new.main"]
    assert len([line for line in run.stderr.splitlines() if "acme-bad" in line]) == 1
    rows = {row["name"]: row for row in json.loads(llmd("plugins", "--json", **with_wheels(wheels)).stdout)}
    assert rows["acme-new.main"]["reason"].startswith("llmd.api.v1 has no Later in llmd 0.")
    assert rows["sources.demo"]["builtin"] is True
    assert set(rows["sources.demo"]) == {
        "name", "distribution", "version", "state", "reason", "hooks", "provides", "import_ms", "builtin", "verdict",
    }  # fmt: skip


def test_config_prints_what_is_committed():
    assert llmd("config").stdout == (ROOT / "etc" / "llmd.toml").read_text()


def test_serve_with_bad_flags_exits_78_and_tells_all():
    start_s = time.monotonic()
    run = llmd("serve", "demo", "--prot", "3", "--max-num-seqs", "x", "--enable-ep-weight-filter", LLMD_LOG__LEVEL="loud")
    assert run.returncode == 78
    assert run.stderr.splitlines() == [
        "llmd: unknown flag --prot; did you mean --port?",
        "llmd: --enable-ep-weight-filter: not built in yet: expert parallelism",
        "llmd: --max-num-seqs: scheduler.max_num_seqs: 'x' is not valid; allowed: an integer between 1 and 65536",
        "llmd: LLMD_LOG__LEVEL: log.level: 'loud' is not valid; allowed: 'debug', 'info', 'warning', 'error'",
    ]
    assert time.monotonic() - start_s < 20


def test_serve_help_lists_flags():
    run = llmd("serve", "--help")
    assert run.returncode == 0
    assert "--gpu-memory-utilization VALUE" in run.stdout


def test_check_says_which_attention_backend_and_why_not_the_others():
    run = llmd("check", "--device", VLLM_ATTENTION_BACKEND="reference")
    assert (run.returncode, run.stderr) == (0, "")
    assert "\ndemo: " in run.stdout
    assert "\n  attention reference: taken\n" in run.stdout
    assert "\n  attention cpu: " in run.stdout
