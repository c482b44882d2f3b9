"""Files that a service manager hands over."""

import pytest

from llmd.credentials import secret_path
from llmd.errors import ConfigError


def test_credential(tmp_path):
    env = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert secret_path("credential:api-keys", env) == tmp_path / "api-keys"  # there or not: who reads it will say


def test_bare_name_is_a_credential_where_there_is_one(tmp_path):
    env = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert str(secret_path("keys", env)) == "keys"
    (tmp_path / "keys").write_text("one")
    assert secret_path("keys", env) == tmp_path / "keys"
    assert str(secret_path("./keys", env)) == "keys"


@pytest.mark.parametrize("value", ["/etc/keys", "etc/keys", "keys"])
def test_path(value):
    assert str(secret_path(value, {})) == value


@pytest.mark.parametrize("name", ["", "../keys", "a/b", ".", "..", "a b", "x" * 300, ".hidden"])
def test_name_that_is_no_file_name(name, tmp_path):
    with pytest.raises(ConfigError, match="allowed: 'credential:' and the name of a LoadCredential= line"):
        secret_path(f"credential:{name}", {"CREDENTIALS_DIRECTORY": str(tmp_path)})


def test_no_credentials():
    with pytest.raises(ConfigError, match="no credentials were handed over"):
        secret_path("credential:keys", {})
