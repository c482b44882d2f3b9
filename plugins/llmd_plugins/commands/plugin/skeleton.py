"""Skeletons of plugins: working distributions named acme-zeta, which are written out under the author's name.

`templates/common` is in each; `templates/<kind>` holds its package and tests. They are real files, linted and typed like
the rest; a test generates every kind and runs its tests.
"""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import click

KINDS = (
    "architecture", "quantization", "attention-backend", "adapter-format", "grammar", "tool-parser", "reasoning-parser",
    "logits-processor", "authenticator", "route",
)  # fmt: skip
# kinds that DESIGN promises and nothing in the daemon asks for yet
NOT_YET = {
    "proposer": "no executor verifies drafts yet, so nothing would call it",
    "kv-store": "no engine offloads blocks yet, so nothing would call it",
}
MAX_NAME = 60
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_PLACEHOLDER = re.compile(r"acme-zeta|acme\.zeta|acme_zeta|ACME_ZETA|zeta|Zeta|ZETA|a-kind|0\.0\.1|0\.0\.2")


def check_kind(kind: str) -> None:
    """Raises BadParameter for a kind that there is no skeleton for."""
    if kind in NOT_YET:
        raise click.BadParameter(f"{kind!r} has no skeleton: {NOT_YET[kind]}")
    if kind not in KINDS:
        raise click.BadParameter(f"{kind!r} is not known; allowed: {', '.join(KINDS)}")


def check_name(name: str) -> None:
    """Raises BadParameter for what cannot be the name of a distribution and, with underscores, of a package."""
    module = name.replace("-", "_")
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME:
        allowed = f"lower-case words of letters and digits, joined by '-', at most {MAX_NAME} characters"
        raise click.BadParameter(f"{name!r} cannot be the name of a distribution; allowed: {allowed}")
    if keyword.iskeyword(module) or module in sys.stdlib_module_names or module.startswith("llmd"):
        raise click.BadParameter(f"{name!r} is taken by Python or by llmd itself")


def _words(kind: str, name: str) -> dict[str, str]:
    """What stands for what; the last words of the name are what the plugin provides."""
    short = name.partition("-")[2].replace("-", "_") or name
    short = short if short.isidentifier() and not keyword.iskeyword(short) else f"p_{short}"
    module, camel = name.replace("-", "_"), "".join(word.capitalize() for word in short.split("_"))
    own = version("llmd")
    return {
        "acme-zeta": name, "acme.zeta": name.replace("-", ".", 1), "acme_zeta": module, "ACME_ZETA": module.upper(),
        "zeta": short, "Zeta": camel, "ZETA": short.upper(), "a-kind": kind.replace("-", " "),
        "0.0.1": own, "0.0.2": str(int(own.partition(".")[0]) + 1),
    }  # fmt: skip


def _files(folder: Traversable, path: Path = Path()) -> Iterator[tuple[Path, str]]:
    for entry in folder.iterdir():
        if entry.name.startswith(("__pycache__", ".")):
            continue
        if entry.is_dir():
            yield from _files(entry, path / entry.name)
        else:
            yield path / entry.name, entry.read_text(encoding="utf-8")


def write(kind: str, name: str, folder: Path) -> list[Path]:
    """Write the distribution into a folder that is not there yet, or empty; the files, in their order."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise click.BadParameter(f"{str(folder)!r} is there already; allowed: a new or an empty folder")
    words = _words(kind, name)
    templates = files("llmd_plugins.commands.plugin") / "templates"
    written = []
    for source in (templates / "common", templates / kind.replace("-", "_")):
        for path, text in _files(source):
            target = folder / _PLACEHOLDER.sub(lambda found: words[found[0]], str(path))
            if target.parent.name == "workflow":  # no name that tools would take for our own
                target = folder / ".github" / "workflows" / target.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_PLACEHOLDER.sub(lambda found: words[found[0]], text), encoding="utf-8")
            written.append(target)
    return sorted(written)
