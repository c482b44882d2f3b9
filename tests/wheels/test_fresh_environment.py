"""A generated plugin as a stranger would ship it: a built wheel in a fresh virtual environment, its tests, a request."""

import json
import sys
import sysconfig

import pytest
from click.testing import CliRunner
from wheels.building import build_wheel, run

from llmd_plugins.commands.plugin.command import plugin_group

ASK = """
from pathlib import Path
import sys
from llmd.api.v1.testing import Server, make_tiny_model

model = make_tiny_model(Path(sys.argv[1]))
with Server(str(model), "--load-format", "dummy", "--device", "cpu") as server:
    print(server.request("POST", "/reverse/reverse", {"text": "wheel"}).json()["text"])
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A generated project, checked as its README says, so that the wheel ships its verdict."""
    folder = tmp_path_factory.mktemp("fresh") / "acme-reverse"
    result = CliRunner().invoke(plugin_group, ["new", "route", "acme-reverse", "--into", str(folder)])
    assert result.exit_code == 0, result.output
    finding = {"what": "routes.reverse", "check": "contract", "result": "passed", "detail": ""}
    verdict = {"distribution": "acme-reverse", "version": "0.1.0", "llmd": "0.1.0", "findings": [finding], "is_good": True}
    (folder / "acme_reverse" / "llmd-verdict.json").write_text(json.dumps(verdict))
    return folder


def test_wheel_in_a_fresh_environment(project, tmp_path):
    wheel = build_wheel(project, tmp_path)
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    (library,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    ours = sysconfig.get_path("purelib")  # llmd and what it needs, as if installed here too
    (library / "beside.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "-q", "--no-deps", "--no-index", wheel)
    program = tmp_path / "venv" / "ask.py"
    program.write_text(ASK)
    tests = project / "tests"
    assert "1 passed" in run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "route", tests, cwd=tmp_path)
    assert run(python, program, tmp_path / "model", cwd=tmp_path).strip() == "leehw"
    listed = run(python, "-m", "llmd", "plugins", cwd=tmp_path)
    (line,) = [line for line in listed.splitlines() if line.startswith("acme.reverse")]
    assert "verdict: 1 passed, 0 failed, 0 skipped (llmd 0.1.0)" in line
