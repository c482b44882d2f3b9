"""What differs between two configurations, what of it is applied live, and keys that change while requests run."""

import pytest

from llmd.config import Config, LogConfig, ModelConfig, PluginsConfig, ServerConfig
from llmd.errors import ConfigError
from llmd.plugin.specs import AuthenticatorSpec
from llmd.reload import LiveAuthenticators, changes, merge_live


def test_every_difference_is_found_and_judged():
    old = Config()
    new = Config(
        models=(ModelConfig(dtype="float32"),),
        server=ServerConfig(api_keys=("k",), port=1),
        log=LogConfig(level="debug"),
        plugins=PluginsConfig(zeta={"depth": 3}),
    )
    assert [change.text for change in changes(old, new)] == [
        "models[0].dtype: needs a restart",
        "server.port: needs a restart",
        "server.api_keys: applied",
        "plugins.zeta: needs a restart",
        "log.level: applied",
    ]
    assert changes(new, new) == []
    assert [change.text for change in changes(old, Config(models=(ModelConfig(), ModelConfig(model="x"))))] == [
        "models: needs a restart"
    ]


def test_only_live_keys_are_merged():
    new = Config(server=ServerConfig(api_keys=("k",), port=1), log=LogConfig(level="debug", format="json"))
    live = merge_live(Config(), new)
    assert (live.server.api_keys, live.server.port) == (("k",), 8000)
    assert (live.log.level, live.log.format) == ("debug", "text")


class Key:
    """Knows the senders of one configuration."""

    def __init__(self, keys):
        self.keys = keys

    async def authenticate(self, headers, peer):
        if headers.get("key") == "boom":
            raise RuntimeError("boom")
        return headers["key"] if headers.get("key") in self.keys else None


def build(config):
    """An authenticator, if there are keys; one key cannot be used."""
    if "bad" in config.server.api_keys:
        raise ConfigError("server.api_keys: 'bad' is not valid")
    return Key(config.server.api_keys) if config.server.api_keys else None


def config_with(*keys):
    return Config(server=ServerConfig(api_keys=keys))


async def test_keys_change_while_serving():
    live = LiveAuthenticators([AuthenticatorSpec(name="k", summary="", build=build)], config_with("one"))
    assert await live.authenticate({"key": "one"}, None) == "one"
    assert await live.authenticate({}, None) is None
    live.rebuild(config_with("two"))
    assert await live.authenticate({"key": "one"}, None) is None
    assert await live.authenticate({"key": "two"}, None) == "two"
    for bad in (config_with("bad"), config_with()):
        with pytest.raises(ConfigError):
            live.rebuild(bad)
    assert await live.authenticate({"key": "two"}, None) == "two"
    with pytest.raises(RuntimeError):  # the gate refuses the request then
        await live.authenticate({"key": "boom"}, None)


async def test_without_keys_everyone_is_anonymous_until_there_is_one():
    live = LiveAuthenticators([AuthenticatorSpec(name="k", summary="", build=build)], config_with())
    assert (await live.authenticate({}, None)).key == ""
    live.rebuild(config_with("one"))
    assert await live.authenticate({}, None) is None
