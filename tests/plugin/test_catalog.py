"""Who has a name, and hooks that are asked while serving."""

import dataclasses
import logging

import pytest
from fake_wheels import sampler

from llmd.errors import ConfigError
from llmd.plugin.catalog import Registries
from llmd.plugin.manager import SPEC_TYPES


def test_there_is_a_registry_for_each_register_hook_in_their_order():
    families = {field.name: str(field.type) for field in dataclasses.fields(Registries)}
    assert list(families) == list(SPEC_TYPES)
    assert families == {family: f"Registry[{spec.__name__}]" for family, spec in SPEC_TYPES.items()}


def test_wheel_overrides_builtin(wheels, load, caplog):
    caplog.set_level(logging.INFO)
    wheels.add("acme-torch", sampler("torch"))
    catalog = load()
    assert catalog.samplers.owner("torch").distribution == "acme-torch"
    assert "samplers.torch: acme-torch.main of acme-torch is taken over sampling.torch of llmd" in caplog.text


def test_prefer_keeps_the_builtin(wheels, load):
    wheels.add("acme-torch", sampler("torch"))
    assert load(prefer={"samplers.torch": "llmd"}).samplers.owner("torch").builtin


def test_two_wheels_with_one_name_stop_the_start(wheels, load):
    wheels.add("acme-one", sampler("zeta"))
    two = wheels.add("acme-two", sampler("zeta"))
    with pytest.raises(ConfigError, match=r"samplers.zeta is provided by acme-one.main of acme-one and acme-two.main"):
        load()
    assert load(prefer={"samplers.zeta": "acme-two"}).samplers.owner("zeta").distribution == "acme-two"
    assert load(prefer={"samplers.zeta": two}).samplers.owner("zeta").distribution == "acme-two"
    assert load(disable=("acme-one",)).samplers.owner("zeta").distribution == "acme-two"


def test_two_wheels_with_one_plugin_name(wheels, load):
    wheels.add("acme-one", sampler("one"), name="zeta")
    wheels.add("acme-two", sampler("two"), name="zeta")
    statuses = load().manager.statuses
    assert statuses["zeta"].distribution == "acme-one"
    assert statuses["zeta (acme-two)"].state == "disabled"


def test_preference_for_nothing_is_told(load, caplog):
    load(prefer={"samplers.none": "acme"})
    assert "plugins.prefer: nothing is named 'samplers.none'" in caplog.text


NOTIFIED = """
    from llmd.api.v1 import hookimpl

    heard = []

    @hookimpl
    def llmd_request_finished(summary):
        heard.append(summary)
        {end}
"""


def test_one_that_raises_keeps_nobody_from_hearing(wheels, load, caplog):
    wheels.add("acme-good", NOTIFIED.format(end="return None"))
    wheels.add("acme-bad", NOTIFIED.format(end="raise RuntimeError('ouch')"))
    catalog = load()
    for number in range(3):
        catalog.notify("llmd_request_finished", summary=number)
    import acme_bad
    import acme_good

    assert acme_good.heard == acme_bad.heard == [0, 1, 2]
    assert catalog.manager.statuses["acme-bad.main"].reason == "llmd_request_finished raised RuntimeError: ouch"
    assert catalog.manager.statuses["acme-bad.main"].state == "loaded"
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    warnings = [message for message in messages if "acme" in message]
    assert warnings == [
        "plugin acme-bad.main: llmd_request_finished raised RuntimeError: ouch (further ones are not logged)"
    ]


def test_first_answer_counts_and_wheels_are_asked_before_builtins(wheels, load):
    source = "from llmd.api.v1 import hookimpl\n@hookimpl\ndef llmd_resolve_adapter(name):\n    {body}"
    wheels.add("acme-a", source.format(body="return '/a' if name == 'mine' else None"))
    wheels.add("acme-b", source.format(body="raise OSError('disk')"))
    catalog = load()
    assert catalog.first("llmd_resolve_adapter", name="mine") == "/a"
    assert catalog.first("llmd_resolve_adapter", name="other") is None
