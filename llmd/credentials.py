"""Secrets that a service manager hands over as files: `credential:NAME` stands for $CREDENTIALS_DIRECTORY/NAME.

A bare name, without a folder, means the credential too where there is one of that name, and else a file. systemd's
LoadCredential= puts each secret into a folder that only the service may read, and names the folder in that variable
(systemd.exec(5)); so no key needs to lie where the service's user could not read it, or where everyone could.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from llmd.errors import ConfigError

PREFIX = "credential:"
VARIABLE = "CREDENTIALS_DIRECTORY"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,254}")


def secret_path(value: str, env: Mapping[str, str] | None = None) -> Path:
    """The file that a key such as `api_key_file` names: a path, a bare name, or `credential:NAME`.

    Raises ConfigError for a credential whose name is no file name, or where no credentials were handed over.
    """
    folder = (os.environ if env is None else env).get(VARIABLE, "")
    name = value.removeprefix(PREFIX)
    if name == value:
        held = Path(folder) / name
        return held if folder and _NAME.fullmatch(name) and held.is_file() else Path(value)
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{value!r} is not valid; allowed: 'credential:' and the name of a LoadCredential= line")
    if not folder:
        raise ConfigError(f"{value!r}: no credentials were handed over ({VARIABLE} is not set)")
    return Path(folder) / name
