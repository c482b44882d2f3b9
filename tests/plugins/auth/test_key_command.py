"""`llmd key`: a key that is shown once, and a table that holds only its digest."""

from __future__ import annotations

import re
import tomllib

import pytest
from click.testing import CliRunner

from llmd.api.v1 import KeySet
from llmd.config import Config, KeyConfig
from llmd.config_load import load_config
from llmd_plugins.auth import api_keys
from llmd_plugins.auth.key_command import key_group


def run(*arguments, **options):
    return CliRunner().invoke(key_group, arguments, **options)


def test_a_new_key_opens_what_its_table_says():
    result = run("new", "alice")
    assert result.exit_code == 0
    key = re.search(r"anywhere: (sk-llmd-\S{43})$", result.stderr, re.MULTILINE)[1]
    [table] = tomllib.loads(result.stdout)["keys"]
    assert key not in result.stdout
    digest = bytes.fromhex(KeyConfig(**table).hash.removeprefix("sha256:"))
    assert KeySet([], {digest: "alice"}).find(key) == "alice"
    assert run("hash", input=f"{key}\n").stdout.strip() == table["hash"]


def test_no_two_keys_are_equal():
    assert len({run("new", "a").stdout for _ in range(5)}) == 5


def test_what_is_no_name_and_no_key_is_refused():
    assert "'two words' is not valid; allowed: letters" in run("new", "two words").output
    assert run("hash", input="\n").exit_code == 2


def test_the_command_is_registered():
    [spec] = api_keys.llmd_register_commands()
    assert spec.build() is key_group


def built(config: Config):
    [spec] = api_keys.llmd_register_authenticators()
    return spec.build(config)


def test_two_names_for_one_key_are_refused():
    keys = (KeyConfig(name="a", key="x"), KeyConfig(name="b", key="x"))
    with pytest.raises(Exception, match=r"keys\[1\].name: 'b' has the key of 'a'"):
        built(Config(keys=keys))


def test_a_file_holds_one_key(tmp_path):
    file = tmp_path / "key"
    for text, problem in (("", "holds no key"), ("a\nb\n", "holds 2 keys; allowed: one")):
        file.write_text(text)
        with pytest.raises(Exception, match=problem):
            built(Config(keys=(KeyConfig(name="a", file=str(file)),)))
    with pytest.raises(Exception, match="cannot be read"):
        built(Config(keys=(KeyConfig(name="a", file=str(tmp_path / "none")),)))


def test_a_key_that_others_may_read_is_told_without_being_told(tmp_path, caplog):
    file = tmp_path / "llmd.toml"
    file.write_text('[[keys]]\nname = "a"\nkey = "secret"\n')
    for mode, num_warnings in ((0o644, 1), (0o600, 0)):
        file.chmod(mode)
        caplog.clear()
        assert built(load_config(file, env={})) is not None
        assert len(caplog.messages) == num_warnings
        assert "secret" not in caplog.text
    file.chmod(0o644)
    built(load_config(file, env={}))
    assert f"{file}:3: a key in the clear" in caplog.text
