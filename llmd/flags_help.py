"""The text of `llmd serve --help`, from the table of flags."""

from __future__ import annotations

import textwrap

from llmd.config import Config
from llmd.config_keys import field_of
from llmd.flags_table import ABSENT, DECIDED, FLAGS, Flag

_HEAD = """\
Usage: llmd serve [MODEL] [--config FILE] [FLAGS]

  Serve MODEL: 'demo', a folder, or a hub name. Flags have vLLM's names where the meaning is the same; they go before
  variables (LLMD_SERVER__PORT), and these before the file. A switch is turned off by --no-NAME.

  --config FILE
      the configuration file (TOML)
"""
_VALUES = {"switch": "", "value": " VALUE", "list": " VALUE …", "json": " JSON"}


def render() -> str:
    """All flags by what they do."""
    parts = [_HEAD]
    for title in dict.fromkeys(str(flag.path[0]) for flag in FLAGS.values() if flag.path):
        parts.append(f"[{title}]")
        parts += [_describe(flag) for flag in FLAGS.values() if flag.path and flag.path[0] == title]
        parts.append("")
    parts += ["Accepted, llmd decides these by itself:", *_names(DECIDED), ""]
    parts += ["Not built in yet, an error that says so:", *_names(ABSENT)]
    return "\n".join(parts)


def _describe(flag: Flag) -> str:
    assert flag.path is not None
    text = "turn that off" if flag.inverted else field_of(Config, flag.path).description or ""
    return f"  --{flag.name}{_VALUES[flag.shape]}\n      {text}"


def _names(table: dict[str, str]) -> list[str]:
    lines = []
    for why in table:
        names = " ".join(f"--{flag.name}" for flag in FLAGS.values() if flag.path is None and flag.why == why)
        lines += [
            f"  {why}:",
            *textwrap.wrap(names, 110, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False),
        ]
    return lines
