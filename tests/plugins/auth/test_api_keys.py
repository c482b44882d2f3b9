"""Keys from the configuration and from a file."""

from __future__ import annotations

import pytest
from server.serving import make_config

from llmd.errors import ConfigError
from llmd_plugins.auth import api_keys


def build(**server):
    (spec,) = api_keys.llmd_register_authenticators()
    return spec.build(make_config(**server))


async def test_keys_of_the_file_count_too(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# team a\nalpha\n\n  beta  \n")
    authenticator = build(api_keys=("gamma",), api_key_file=str(file))
    for key in ("alpha", "beta", "gamma"):
        assert await authenticator.authenticate({"Authorization": f"Bearer {key}"}, None)
    assert await authenticator.authenticate({"Authorization": "Bearer # team a"}, None) is None
    assert await authenticator.authenticate({}, None) is None


def test_no_keys_is_nothing_to_check():
    assert build() is None


def test_unusable_keys_stop_the_start(tmp_path):
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no key"):
        build(api_key_file=str(empty))
    with pytest.raises(ConfigError, match="cannot be read"):
        build(api_key_file=str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="empty"):
        build(api_keys=("",))
