"""Loading: every way in which a plugin can be broken ends in a status row, and harms nobody else."""

import logging

import pytest
from fake_wheels import sampler

from llmd.errors import ConfigError


def row(catalog, name):
    return catalog.manager.statuses[name]


def impl_names(catalog):
    return {impl.plugin for hook in catalog.manager._arguments for impl in catalog.manager.impls(hook)}


def test_good_wheel_is_loaded(wheels, load):
    name = wheels.add("acme-zeta", sampler("zeta"), version="2.5")
    catalog = load()
    status = row(catalog, name)
    assert (status.state, status.distribution, status.version, status.builtin) == ("loaded", "acme-zeta", "2.5", False)
    assert status.hooks == ("llmd_register_samplers",)
    assert status.provides == ("samplers.zeta",)
    assert status.import_ms > 0
    assert catalog.samplers["zeta"].summary == "for tests"
    assert catalog.samplers.owner("zeta").distribution == "acme-zeta"


def test_builtins_come_first_and_by_name(wheels, load):
    wheels.add("aaa", sampler("aaa"), name="aaa")
    names = [status.name for status in load().plugins]
    assert names[-1] == "aaa"
    assert names[:-1] == sorted(names[:-1])
    assert "sources.demo" in names


BROKEN = {
    "import error": ("import acme_is_not_there", "ModuleNotFoundError: No module named 'acme_is_not_there'"),
    "raises on import": ("raise RuntimeError('no\\nluck')", "RuntimeError: no luck"),
    "leaves the process": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "unknown hook": (
        "from llmd.api.v1 import hookimpl\n@hookimpl\ndef llmd_register_sampler():\n    return []",
        "there is no hook llmd_register_sampler; did you mean llmd_register_samplers?",
    ),
    "wrong argument": (
        "from llmd.api.v1 import hookimpl\n@hookimpl\ndef llmd_request_finished(summry):\n    pass",
        "llmd_request_finished has no argument summry; allowed: summary",
    ),
    "wrapper": (
        "from llmd.api.v1 import hookimpl\n@hookimpl(wrapper=True)\ndef llmd_register_samplers():\n    return (yield)",
        "llmd_register_samplers is a wrapper; allowed: a plain implementation that returns its result",
    ),
    "raises when asked": (
        "from llmd.api.v1 import hookimpl\n@hookimpl\ndef llmd_register_samplers():\n    raise ValueError('later')",
        "ValueError: later",
    ),
    "wrong spec": (
        "from llmd.api.v1 import KVStoreSpec, hookimpl\n@hookimpl\ndef llmd_register_samplers():\n"
        "    return [KVStoreSpec(name='x', summary='', build=None)]",
        "llmd_register_samplers returned a KVStoreSpec; allowed: a list of SamplerSpec",
    ),
    "no list": (
        "from llmd.api.v1 import hookimpl\n@hookimpl\ndef llmd_register_samplers():\n    return None",
        "llmd_register_samplers returned NoneType; allowed: a list of SamplerSpec",
    ),
    "one name twice": (
        "from llmd.api.v1 import SamplerSpec, hookimpl\n@hookimpl\ndef llmd_register_samplers():\n"
        "    return [SamplerSpec(name='x', summary='', build=None)] * 2",
        "llmd_register_samplers gives the name 'x' twice",
    ),
    "empty name": (
        "from llmd.api.v1 import SamplerSpec, hookimpl\n@hookimpl\ndef llmd_register_samplers():\n"
        "    return [SamplerSpec(name='', summary='', build=None)]",
        "llmd_register_samplers returned a spec named ''; allowed: a string that is not empty",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_wheel_is_failed_and_leaves_nothing(case, wheels, load, caplog):
    source, reason = BROKEN[case]
    broken = wheels.add("acme-broken", source)
    good = wheels.add("acme-good", sampler("good"))
    catalog = load()
    assert (row(catalog, broken).state, row(catalog, broken).reason) == ("failed", reason)
    assert row(catalog, good).state == "loaded"
    assert not catalog.manager._pm.has_plugin(broken)
    assert broken not in impl_names(catalog)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING and broken in record.getMessage()]
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("from llmd.api.v1 import NoSuchSpec", "llmd.api.v1 has no NoSuchSpec in llmd"),
        ("from llmd.api.v9 import SamplerSpec", "there is no llmd.api.v9 in llmd"),
        ("from llmd.api import v9", "llmd.api has no v9 in llmd"),
        ("import llmd.api.v1 as api\napi.NoSuchSpec", "llmd.api.v1 has no NoSuchSpec in llmd"),
        (
            "try:\n    from llmd.api.v1 import Nope\nexcept ImportError as e:\n    raise RuntimeError('x') from e",
            "no Nope in llmd",
        ),
    ],
)
def test_wheel_for_another_version_is_incompatible(source, reason, wheels, load):
    name = wheels.add("acme-new", source)
    status = row(load(), name)
    assert status.state == "incompatible"
    assert reason in status.reason


def test_optional_hook_of_a_newer_llmd_is_passed_over(wheels, load):
    name = wheels.add(
        "acme-ahead",
        "from llmd.api.v1 import hookimpl\n@hookimpl(optionalhook=True)\ndef llmd_register_dreams():\n    return []",
    )
    assert row(load(), name).state == "loaded"


def test_old_wheel_loads_when_a_hook_gained_an_argument(wheels, load):
    """An implementation names only the arguments that it takes."""
    wheels.add(
        "acme-old",
        "from llmd.api.v1 import hookimpl\n@hookimpl\ndef llmd_select_attention_backend(usable):\n    return usable[0]",
    )
    assert load().first("llmd_select_attention_backend", needs=None, usable=["reference"]) == "reference"


def test_disable_by_plugin_or_distribution(wheels, load):
    marker = "import pathlib; pathlib.Path(__file__).with_suffix('.imported').touch()"
    one, two = wheels.add("acme-one", marker), wheels.add("acme-two", marker)
    catalog = load(disable=(one, "acme-two", "sampling.bad_words"))
    for name in (one, two, "sampling.bad_words"):
        assert (row(catalog, name).state, row(catalog, name).reason) == ("disabled", "named in plugins.disable")
    assert not list(wheels.folder.glob("*.imported"))  # blocked before import


def test_only_leaves_other_wheels_out_but_no_builtin(wheels, load):
    one, two = wheels.add("acme-one", sampler("one")), wheels.add("acme-two", sampler("two"))
    catalog = load(only=("acme-one",))
    assert row(catalog, one).state == "loaded"
    assert row(catalog, two).reason == "not named in plugins.only"
    assert row(catalog, "sources.demo").state == "loaded"


def test_autoload_off_loads_only_what_is_named(wheels, load):
    one, two = wheels.add("acme-one", sampler("one")), wheels.add("acme-two", sampler("two"))
    catalog = load(autoload=False, require=(one,))
    assert row(catalog, one).state == "loaded"
    assert row(catalog, two).reason == "plugins.autoload is off"


def test_safe_mode_loads_only_builtins(wheels, load, monkeypatch):
    name = wheels.add("acme-zeta", sampler("zeta"))
    monkeypatch.setenv("LLMD_PLUGINS", "none")
    catalog = load()
    assert row(catalog, name).reason == "safe mode (LLMD_PLUGINS=none)"
    assert row(catalog, "sources.demo").state == "loaded"
    monkeypatch.setenv("LLMD_PLUGINS", "nonne")
    with pytest.raises(ConfigError, match="LLMD_PLUGINS: 'nonne' is not known"):
        load()


def test_required_plugin_that_fails_stops_the_start(wheels, load):
    name = wheels.add("acme-broken", "raise RuntimeError('no')")
    with pytest.raises(ConfigError, match=rf"plugins.require: {name} is failed: RuntimeError: no"):
        load(require=(name,))
    with pytest.raises(ConfigError, match=r"no plugin is named 'acme-brokn'; did you mean 'acme-broken'\?"):
        load(require=("acme-brokn",))


def test_authenticator_that_fails_stops_the_start(wheels, load):
    """Whoever cannot be asked for a key would be let in: an authenticator fails closed."""
    name = wheels.add(
        "acme-door",
        """
        from llmd.api.v1 import hookimpl
        import acme_is_not_there

        @hookimpl
        def llmd_register_authenticators():
            return []
        """,
    )
    with pytest.raises(ConfigError, match=rf"plugin {name} is failed and may be an authenticator"):
        load()
    assert row(load(disable=(name,)), name).state == "disabled"


def test_unknown_names_are_told(wheels, load, caplog):
    load(disable=("sources.demmo",))
    assert "plugins.disable: no plugin is named 'sources.demmo'; did you mean 'sources.demo'?" in caplog.text
