"""Makes a bare host ready from a checkout: wheels that are missing are unpacked, llmd's entry points written beside them.

Without network, pip or a build: a pure unpacking of the wheels in a folder whose distributions the host does not have.
"""

from __future__ import annotations

import os
import re
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (ROOT, ROOT / "plugins", ROOT / "kernels", ROOT / "tests")


def prepare(site: Path, wheels: Path | None) -> tuple[dict[str, str], list[str]]:
    """The environment in which workers run, and the distributions that were unpacked into `site` for them."""
    site.mkdir(parents=True, exist_ok=True)
    unpacked = [_unpack(wheel, site) for wheel in sorted(wheels.glob("*.whl")) if _is_wanted(wheel)] if wheels else []
    if not _has("llmd"):
        _register(site)
    paths = [*map(str, SOURCES), str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}, unpacked


def _has(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _is_wanted(wheel: Path) -> bool:
    """Whether the host lacks it, or has an older version."""
    name, version = wheel.name.split("-")[:2]
    return not _has(name) or _numbers(version) > _numbers(metadata.version(name))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0]))


def lacking() -> list[str]:
    """Distributions that the project needs and this process does not find."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = (re.split(r"[^\w.-]", wanted)[0] for wanted in project["dependencies"])
    return [name for name in names if not _has(name)]


def _unpack(wheel: Path, site: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return wheel.name


def _register(site: Path) -> None:
    """What an installation would tell of the checkout: its name, its version and its plugins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = re.search(r'__version__ = "([^"]+)"', (ROOT / "llmd" / "__init__.py").read_text(encoding="utf-8"))
    folder = site / "llmd-0.dist-info"
    folder.mkdir(exist_ok=True)
    version = found[1] if found else "0"
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llmd\nVersion: {version}\n", encoding="utf-8")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items()), ""]
    (folder / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
