"""Five wheels that are broken in five ways: each is told with its reason, and nobody else notices."""

import json
import os
import subprocess
import sys

import pytest
from daemons import Daemon
from fake_wheels import Wheels

HEAD = "from llmd.api.v1 import hookimpl\n@hookimpl\n"
RAISES_LATE = """
from llmd.api.v1 import RouteSpec, hookimpl

def build(context):
    async def answer(request):
        raise RuntimeError("secret path /srv/acme")
    return answer

@hookimpl
def llmd_register_routes():
    return [RouteSpec(name="late", summary="raises", method="GET", path="/late", build=build)]

@hookimpl
def llmd_request_finished(summary):
    raise RuntimeError("late too")
"""
# distribution → source, state, what is told
BROKEN = {
    "acme-import": ("import acme_is_not_there", "failed", "ModuleNotFoundError: No module named 'acme_is_not_there'"),
    "acme-hook": (
        HEAD + "def llmd_register_route():\n    return []",
        "failed",
        "there is no hook llmd_register_route; did you mean llmd_register_routes?",
    ),
    "acme-argument": (
        HEAD + "def llmd_request_finished(receipt):\n    pass",
        "failed",
        "llmd_request_finished has no argument receipt; allowed: summary",
    ),
    "acme-newer": (
        "from llmd.api.v2 import hookimpl",
        "incompatible",
        "there is no llmd.api.v2 in llmd 0.1.0: the plugin needs another version of llmd",
    ),
    "acme-late": (RAISES_LATE, "loaded", ""),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with the wheels in `wheels`."""
    made = tmp_path_factory.mktemp("broken")
    wheels = Wheels(made / "wheels")
    wheels.folder.mkdir()
    for name, (source, _, _) in BROKEN.items():
        wheels.add(name, source)
    return made


def llmd(folder, *arguments):
    env = os.environ | {"PYTHONPATH": str(folder / "wheels")}
    command = [sys.executable, "-m", "llmd", *arguments]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def rows_of(plugins):
    return {row["distribution"]: (row["state"], row["reason"]) for row in plugins if row["distribution"] in BROKEN}


def test_the_program_tells_each(folder):
    listed = llmd(folder, "plugins", "--json")
    assert listed.returncode == 0
    assert rows_of(json.loads(listed.stdout)) == {name: (state, told) for name, (_, state, told) in BROKEN.items()}
    for name, (_, state, told) in BROKEN.items():
        line = f"plugin {name}.main ({name} 1.0) is {state}: {told}"
        assert listed.stderr.count(line) == (state != "loaded"), listed.stderr


@pytest.mark.parametrize("name", [name for name, (_, state, _) in BROKEN.items() if state != "loaded"])
def test_check_of_one_fails_with_its_reason(name, folder):
    checked = llmd(folder, "plugin", "check", name, "--json", f"{name}.json")
    assert checked.returncode == 1
    assert BROKEN[name][2] in checked.stdout
    verdict = json.loads((folder / f"{name}.json").read_text())
    assert verdict["is_good"] is False
    assert verdict["distribution"] == name


def test_one_that_the_configuration_requires_stops_the_start(folder):
    (folder / "required.toml").write_text('[plugins]\nrequire = ["acme-import"]\n')
    ended = llmd(folder, "--config", "required.toml")
    assert ended.returncode == 78
    assert "plugins.require: acme-import.main is failed: ModuleNotFoundError" in ended.stderr


def test_the_daemon_serves_and_tells_each(folder):
    with Daemon("serve", "demo", cwd=folder, LLMD_SERVER__ADMIN_SOCKET=str(folder / "admin.sock")) as running:
        running.ready()
        assert running.complete()[0] == 200
        status, body = running.get("/late")
        assert status == 500
        assert "acme" not in json.dumps(body)
        assert running.complete()[0] == 200
        status, answer = running.admin("/admin/plugins")
        assert status == 200
        told = rows_of(answer["plugins"])
        for name, (_, state, reason) in BROKEN.items():
            later = "llmd_request_finished raised RuntimeError: late too" if name == "acme-late" else reason
            assert told[name] == (state, later)
        assert running.stop() == 0
        assert running.log.count("llmd_request_finished raised RuntimeError: late too") == 1
