"""Fake wheels on sys.path, and a catalog that is built of them and the built-ins."""

import pytest
from fake_wheels import Wheels

from llmd.config import PluginsConfig
from llmd.plugin.catalog import build_catalog


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder on sys.path to install fake wheels into."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    made = Wheels(folder)
    yield made
    made.forget()


@pytest.fixture
def load():
    """Build a catalog for the keys of [plugins]."""
    return lambda **keys: build_catalog(PluginsConfig(**keys))
