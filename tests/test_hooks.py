"""Every hook: one docstring line, one built-in user, one test that names it."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from fake_wheels import Wheels

from llmd.config import PluginsConfig
from llmd.errors import ConfigError
from llmd.plugin import hookspecs
from llmd.plugin.catalog import build_catalog
from llmd.plugin.manager import SPEC_TYPES

TESTS = Path(__file__).parent
HOOKS = [name for name in vars(hookspecs) if name.startswith("llmd_")]

# Hooks whose consumer is not built in yet; a member that gains a built-in user must leave.
NOT_CONSUMED_YET = {
    "llmd_register_kv_stores",
    "llmd_register_proposers",
}
# how a configuration would name one of these
NAMED_BY = {
    "llmd_register_kv_stores": "kv_offloading_size",
    "llmd_register_proposers": "speculative_config",
}


@pytest.fixture(scope="module")
def users():
    """Hook → built-in plugins that implement it."""
    catalog = build_catalog(PluginsConfig(autoload=False))
    return {hook: [impl.plugin for impl in catalog.manager.impls(hook)] for hook in HOOKS}


@pytest.mark.parametrize("hook", HOOKS)
def test_one_docstring_line(hook):
    text = inspect.getdoc(getattr(hookspecs, hook))
    assert text
    assert "\n" not in text
    assert text.endswith(".")


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook not in NOT_CONSUMED_YET])
def test_one_builtin_user(hook, users):
    assert users[hook], f"no built-in plugin implements {hook}"


@pytest.mark.parametrize("hook", sorted(NOT_CONSUMED_YET))
def test_set_of_hooks_without_user_shrinks(hook, users):
    assert hook in HOOKS
    assert not users[hook], f"{hook} has a built-in user now: take it out of NOT_CONSUMED_YET"


def test_one_test_names_each_hook():
    words = set()
    for file in TESTS.rglob("test_*.py"):
        text = file.read_text()
        if file != Path(__file__):
            words |= {hook for hook in HOOKS if hook in text or hook.removeprefix("llmd_register_") in text}
    missing = [hook for hook in HOOKS if hook not in words and hook not in NOT_CONSUMED_YET]
    assert not missing


def test_register_hooks_take_nothing_and_name_their_spec():
    for family, spec in SPEC_TYPES.items():
        hook = getattr(hookspecs, f"llmd_register_{family}")
        assert not inspect.signature(hook).parameters
        assert spec.__doc__


def test_file_is_in_the_order_of_the_daemons_life():
    headings = [line[6:] for line in Path(hookspecs.__file__).read_text().splitlines() if line.startswith("# --- ")]
    assert headings == [
        "the command line and the configuration",
        "finding and loading a model",
        "running steps",
        "reading what the model wrote",
        "serving",
    ]


def test_core_names_no_plugin():
    """The entry points alone say which features are built in."""
    core = Path(hookspecs.__file__).parent.parent
    for file in core.rglob("*.py"):
        modules = [
            node.module or "" if isinstance(node, ast.ImportFrom) else alias.name
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        ]
        assert not [module for module in modules if module.startswith("llmd_plugins")], file


@pytest.mark.parametrize("hook", sorted(NOT_CONSUMED_YET))
def test_configuration_that_names_such_a_thing_is_refused(hook, tmp_path):
    from llmd.config_load import load_config

    file = tmp_path / "llmd.toml"
    file.write_text(f"[[models]]\n{NAMED_BY[hook]} = 'x'\n")
    with pytest.raises(ConfigError, match=rf"llmd.toml:2: models\[0\].{NAMED_BY[hook]}: not built in yet: "):
        load_config(file, env={})


def test_specs_of_hooks_without_consumer_are_listed(tmp_path):
    wheels = Wheels(tmp_path)
    families = [hook.removeprefix("llmd_register_") for hook in NOT_CONSUMED_YET if "register" in hook]
    source = "from llmd.api.v1 import *\nfrom llmd.api.v1 import hookimpl\n"
    for family in families:
        spec = SPEC_TYPES[family].__name__
        source += f"@hookimpl\ndef llmd_register_{family}():\n"
        source += f"    return [{spec}(name='third', summary='for tests', build=lambda *given: None)]\n"
    wheels.add("acme-all", source, name="acme.all")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from llmd.cli import main; main()"
    run = subprocess.run([sys.executable, "-c", program, "plugins", "--json"], capture_output=True, text=True, check=True)
    row = next(row for row in json.loads(run.stdout) if row["name"] == "acme.all")
    assert row["state"] == "loaded"
    assert sorted(row["provides"]) == sorted(f"{family}.third" for family in families)
