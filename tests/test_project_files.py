"""Files that users and CI start from: pins, Makefile, CI script."""

import os
import shutil
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")
)
DIRECT = [Requirement(text) for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"])]


def needed(requirements):
    """Names of everything that these pull in here."""
    names, todo = set(), list(requirements)
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not any(requirement.marker.evaluate({"extra": e}) for e in ("", "test")):
            continue
        if name in names:
            continue
        names.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        extras = {"", *requirement.extras}
        inner = [Requirement(text) for text in found.requires or ()]
        todo += [one for one in inner if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in extras)]
    return names


@pytest.mark.skipif(
    distribution("torch").version.partition("+")[0] != PINS["torch"], reason="another set of versions is installed"
)
def test_every_package_that_is_pulled_in_is_pinned():
    installed = {name for name in needed(DIRECT) if _is_installed(name)}
    # CUDA libraries come with torch where there is a GPU; their versions are torch's business
    assert {name for name in installed if not name.startswith(("nvidia-", "cuda-"))} - set(PINS) == set()


def _is_installed(name):
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_pins_lie_within_the_ranges(requirement):
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_pins_name_no_build_of_one_machine():
    assert not [pin for pin in PINS.values() if "+" in pin]
    assert PINS["torch"] == "2.13.0"
    assert PINS["triton"].startswith("3.7.")
    assert PINS["transformers"].startswith("5.")


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_knows_its_targets(tmp_path):
    # a make around the tests would have its say through these
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}

    def dry_run(*arguments):
        command = ["make", "-n", "-B", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    assert dry_run("serve").strip().endswith(".venv/bin/llmd --config etc/llmd.toml")
    steps = ["ruff format --check", "ruff check", "mypy", "pytest"]
    places = [dry_run("test").index(f".venv/bin/{step}") for step in steps]
    assert places == sorted(places)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_says_which_python_is_wanted(tmp_path):
    (tmp_path / "old-python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "old-python").chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    run = subprocess.run(["make", "serve", "PYTHON=./old-python"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "llmd needs Python 3.11, 3.12 or 3.13, and './old-python' is none of them." in run.stdout
    assert not (tmp_path / ".venv").exists()


def test_ci_runs_what_users_run():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("make test")
    subprocess.run(["bash", "-n", str(script)], check=True)
