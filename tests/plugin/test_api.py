"""llmd.api.v1: what type checkers see is what is there, and looking does no harm."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from llmd.api import v1


def typed_names():
    """Name → home, as the TYPE_CHECKING block says."""
    tree = ast.parse(Path(v1.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    assert all(alias.asname == alias.name for node in block.body for alias in node.names)
    return {alias.name: node.module for node in block.body for alias in node.names}


def test_typed_and_lazy_names_are_the_same():
    assert typed_names() == v1._HOME_OF
    assert sum(len(names) for names in v1._HOMES.values()) == len(v1._HOME_OF)


def test_every_name_is_public_where_it_lives():
    for name, home in v1._HOME_OF.items():
        assert getattr(import_module(home), name) is getattr(v1, name)
        assert not name.startswith("_")


def test_asking_for_what_is_not_there():
    assert not hasattr(v1, "NoSuchName")
    with pytest.raises(ImportError) as caught:
        exec("from llmd.api.v1 import NoSuchName", {})
    assert caught.value.name == "llmd.api.v1"
    assert "ModelSourceSpec" in dir(v1)


def test_importing_it_loads_no_home():
    program = "import sys, llmd.api.v1; print([name for name in sys.modules if name.startswith('llmd.')])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['llmd._version', 'llmd.api', 'llmd.api.v1']"
