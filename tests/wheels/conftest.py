"""Wheels of strangers: built by the standard front end, installed into a folder or an environment of their own."""

import os
import sys

import pytest
from wheels.building import GOOD, HERE, build_wheel, run


@pytest.fixture(scope="package")
def site(tmp_path_factory):
    """A folder with the good wheels installed."""
    folder = tmp_path_factory.mktemp("wheels")
    wheels = [build_wheel(HERE / name, folder) for name in GOOD]
    target = folder / "site"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, *wheels)
    return target


@pytest.fixture(scope="package")
def environment(site):
    """Variables under which a process finds them."""
    return os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def installed(site, monkeypatch):
    """The wheels on this process's path."""
    monkeypatch.syspath_prepend(str(site))
    yield site
    for name in [name for name in sys.modules if name.startswith("acme_")]:
        del sys.modules[name]
