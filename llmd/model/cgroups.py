"""The control groups that this process is in, and what they and all groups above them allow: processors and memory.

`/proc/self/cgroup` names the groups, `/proc/self/mountinfo` where their folders are (cgroups(7), Documentation/
admin-guide/cgroup-v2.rst and cgroup-v1/ of Linux). Both versions may be mounted beside each other; then each controller is
looked up where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

_NO_LIMIT = 1 << 60  # bytes; version 1 writes the largest number of pages instead of "max"
_MAX_DEPTH = 64


class MemoryLimit(NamedTuple):
    """A limit, what is used of it, and whose it is. `used_bytes` leaves out what the kernel drops when memory gets short."""

    limit_bytes: int
    used_bytes: int
    name: str  # "memory.max of /system.slice/llmd.service"

    @property
    def left_bytes(self) -> int:
        """What may still be taken."""
        return max(0, self.limit_bytes - self.used_bytes)


class _Group(NamedTuple):
    folder: Path
    name: str  # below the hierarchy's root
    is_v2: bool


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Processors' worth of time that the tightest group grants; None: no group limits it."""
    quotas = [quota for group in _groups("cpu", root) if (quota := _quota(group)) is not None]
    return min(quotas, default=None)


def memory_limit(root: Path = Path("/")) -> MemoryLimit | None:
    """The limit of which least is left, of all groups; None: there is none."""
    limits = [limit for group in _groups("memory", root) for limit in _limits(group)]
    return min(limits, key=lambda limit: limit.left_bytes, default=None)


def _quota(group: _Group) -> float | None:
    if group.is_v2:
        words = _read(group.folder / "cpu.max").split()
    else:
        words = [*_read(group.folder / "cpu.cfs_quota_us").split(), *_read(group.folder / "cpu.cfs_period_us").split()]
    if len(words) != 2 or not all(word.isdecimal() for word in words) or not int(words[1]):
        return None  # "max", -1, or not the controller's folder
    return int(words[0]) / int(words[1])


def _limits(group: _Group) -> Iterator[MemoryLimit]:
    """Beyond memory.max a process is killed; beyond memory.high it is held up until it hardly moves."""
    files = ("memory.max", "memory.high") if group.is_v2 else ("memory.limit_in_bytes",)
    for file in files:
        text = _read(group.folder / file)
        if text.isdecimal() and int(text) < _NO_LIMIT:
            yield MemoryLimit(int(text), _used(group), f"{file} of {group.name}")


def _used(group: _Group) -> int:
    """Without the page cache's clean and dirty files, which are no reason to kill anybody."""
    current = _read(group.folder / ("memory.current" if group.is_v2 else "memory.usage_in_bytes"))
    prefix = "" if group.is_v2 else "total_"
    stat = dict(line.split(maxsplit=1) for line in _read(group.folder / "memory.stat").splitlines() if " " in line)
    files = sum(int(stat.get(f"{prefix}{kind}_file", "0")) for kind in ("active", "inactive"))
    return max(0, int(current) - files) if current.isdecimal() else 0


def _groups(controller: str, root: Path) -> Iterator[_Group]:
    """This process's group and those above it, of every hierarchy that may have the controller."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if is_v2 := not controllers:
            found = _mount(root, lambda kind, options: kind == "cgroup2")
        elif controller in controllers.split(","):
            found = _mount(root, lambda kind, options: kind == "cgroup" and controller in options)
        else:
            continue
        if found is not None:
            yield from _upwards(*found, name, is_v2)


def _upwards(mount: Path, mounted: str, name: str, is_v2: bool) -> Iterator[_Group]:
    """From the group to the top of what is mounted, which in a container is the container's own group."""
    prefix = mounted.rstrip("/")
    below = name[len(prefix) :] if name == prefix or name.startswith(f"{prefix}/") else ""
    parts = [part for part in below.split("/") if part][:_MAX_DEPTH]
    for depth in range(0 if ".." in parts else len(parts), -1, -1):  # "..": outside of this namespace
        yield _Group(mount.joinpath(*parts[:depth]), "/".join(["", *parts[:depth]]) or "/", is_v2)


def _mount(root: Path, is_wanted: Callable[[str, list[str]], bool]) -> tuple[Path, str] | None:
    """(folder, group mounted there) of the first mount that is wanted by its type and its super block's options."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, behind = before.split(), after.split()
        if len(fields) >= 5 and len(behind) >= 3 and is_wanted(behind[0], behind[2].split(",")):
            return root / fields[4].lstrip("/"), fields[3]
    return None


def _read(path: Path) -> str:
    """Empty where there is no such file or it cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
