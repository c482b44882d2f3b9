"""How many threads compute on a CPU, and where: read from the affinity mask, the cgroups, the cores and the NUMA nodes.

One thread a physical core: hyperthreads share the ports that vectors go through and the buffers that loads wait in. Cores of
one NUMA node: what the others' memory controllers serve comes over the interconnect. One core is left to the event loop
where there are more than two.

    affinity "auto"   all cores are ours: each thread stays on one, and the first, which takes the interrupts, is the loop's;
                      no core is left for the loop (who waits for a core had better take the other one), or a quota says how
                      many are ours but not which: the kernel places the threads, within the node
    "none"            the kernel places them
    "0-3,8"           a thread on each of these

Threads are placed by the mask of the thread that leads them, which those that OpenMP starts later inherit (it ends some when
a library asks for fewer, and starts others), and where each has a core of its own also one by one. No other thread is moved.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llmd.errors import ModelError
from llmd.model.cgroups import cpu_quota

log = logging.getLogger("llmd.model")

_SYSTEM = Path("sys/devices/system")
_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")  # OpenMP places its threads by itself


@dataclass(frozen=True, slots=True)
class Threads:
    """What was decided. `cpus`: where the threads may run, empty: anywhere; pinned ones stay on the one of their number."""

    count: int
    cpus: tuple[int, ...] = ()
    is_pinned: bool = False
    why: str = ""  # for the log

    def __str__(self) -> str:
        plural = "s" if self.count > 1 else ""
        where = f" {'pinned to' if self.is_pinned else 'on'} CPUs {show_cpus(self.cpus)}" if self.cpus else ""
        return f"{self.count} thread{plural}{where} ({self.why})"

    def confine(self) -> None:
        """Let the calling thread, and whatever threads it starts from now on, run on `cpus` only."""
        if not self.cpus or not hasattr(os, "sched_setaffinity"):
            return
        try:
            os.sched_setaffinity(0, self.cpus)
        except OSError as error:  # the mask was narrowed meanwhile
            log.warning("threads are not confined to CPUs %s: %s", show_cpus(self.cpus), error)


class Core(NamedTuple):
    """A physical core: the hardware threads of it that this process may use, and the NUMA node it is on."""

    node: int
    cpus: tuple[int, ...]


def num_threads() -> int:
    """How many threads a model on this machine's CPU computes with, unless the configuration says otherwise."""
    return choose_threads().count


def choose_threads(
    wanted: int | None = None,
    affinity: str = "auto",
    *,
    root: Path = Path("/"),
    allowed: Collection[int] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Threads:
    """Decide for `cpu_threads` and `cpu_affinity` of the configuration; raises ModelError for CPUs that are not ours."""
    usable = sorted(allowed if allowed is not None else _allowed())
    if wanted is not None and wanted > len(usable):
        raise ModelError(f"cpu_threads {wanted} are too many: this process may use CPUs {show_cpus(usable)}, {len(usable)}")
    if affinity not in ("auto", "none"):
        return _on(affinity, usable, wanted)
    cores = find_cores(usable, root)
    here = [core for core in cores if core.node == cores[0].node]
    asked, why = (wanted, "cpu_threads") if wanted is not None else (_asked(environ), "OMP_NUM_THREADS")
    quota = cpu_quota(root)
    is_free = affinity == "auto" and not any(name in environ for name in _BINDING)
    if asked is None and (quota is None or quota >= len(here)):
        return _all_cores(cores, here, is_free)
    if asked is None:
        assert quota is not None
        whole = max(1, int(quota))
        asked, why = whole - 1 if whole > 2 else whole, f"the cgroup grants {quota:g} of {len(here)} cores"
    return Threads(asked, _nodes_for(asked, cores) if is_free else (), why=why)


def _all_cores(cores: list[Core], here: list[Core], is_free: bool) -> Threads:
    """A thread for each core of the first node, less one for the loop."""
    has_spare = len(here) > 2
    cpus = tuple(core.cpus[0] for core in here[has_spare:])
    why = "one a core" + (f", CPU {here[0].cpus[0]} is left to the event loop" if has_spare else "")
    if len(here) < len(cores):
        others = sorted({core.node for core in cores} - {here[0].node})
        why += f", all of NUMA node {here[0].node}; cpu_threads takes more, of node {show_cpus(others)}"
    return Threads(len(cpus), cpus if is_free else (), is_pinned=has_spare and is_free, why=why)


def _nodes_for(count: int, cores: list[Core]) -> tuple[int, ...]:
    """All CPUs of as few nodes as have so many cores; nothing where that is all there are."""
    taken: list[Core] = []
    for core in cores:
        if len(taken) >= count and core.node != taken[-1].node:
            break
        taken.append(core)
    return tuple(sorted(cpu for core in taken for cpu in core.cpus)) if len(taken) < len(cores) else ()


def _on(affinity: str, usable: Collection[int], wanted: int | None) -> Threads:
    """A thread on each of these CPUs, or on the first so many."""
    try:
        cpus = parse_cpus(affinity)
    except ValueError as error:
        raise ModelError(f"cpu_affinity: {error}") from None
    if missing := sorted(set(cpus) - set(usable)):
        raise ModelError(
            f"cpu_affinity names CPUs {show_cpus(missing)}, which this process may not use: it may use {show_cpus(usable)}"
        )
    if wanted is not None and wanted > len(cpus):
        raise ModelError(f"cpu_threads {wanted} are more than the {len(cpus)} CPUs of cpu_affinity")
    chosen = tuple(cpus)[:wanted]
    return Threads(len(chosen), chosen, is_pinned=True, why="cpu_affinity")


def _asked(environ: Mapping[str, str]) -> int | None:
    """OMP_NUM_THREADS; of a list, which is by level of nesting, the first."""
    value = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(value) if value.isdecimal() and int(value) > 0 else None


def _allowed() -> Collection[int]:
    """CPUs that this process may use: its affinity, which a cpuset narrows too."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def find_cores(usable: Iterable[int], root: Path = Path("/")) -> list[Core]:
    """The usable CPUs as physical cores: those of the node with most of them first, by number within a node."""
    nodes = _nodes(root)
    cores: dict[tuple[int, ...], list[int]] = {}
    for cpu in sorted(usable):
        folder = root / _SYSTEM / f"cpu/cpu{cpu}/topology"
        siblings = _read_cpus(folder / "thread_siblings_list") or _read_cpus(folder / "core_cpus_list") or (cpu,)
        cores.setdefault(siblings if cpu in siblings else (cpu,), []).append(cpu)
    found = [Core(nodes.get(cpus[0], 0), tuple(cpus)) for cpus in cores.values()]
    sizes = {core.node: sum(other.node == core.node for other in found) for core in found}
    return sorted(found, key=lambda core: (-sizes[core.node], core.node, core.cpus))


def cache_bytes(root: Path = Path("/")) -> int:
    """All last-level caches of the machine together; 0 where the kernel does not tell."""
    sizes: dict[str, int] = {}
    for folder in (root / _SYSTEM / "cpu").glob("cpu[0-9]*/cache"):
        levels = sorted(folder.glob("index[0-9]*"), key=lambda index: _read(index / "level"))
        size = _read(levels[-1] / "size") if levels else ""
        if size.endswith("K") and size[:-1].isdecimal():
            sizes[_read(levels[-1] / "shared_cpu_list") or str(folder)] = int(size[:-1]) << 10
    return sum(sizes.values())


def _nodes(root: Path) -> dict[int, int]:
    """CPU → NUMA node."""
    folders = (root / _SYSTEM / "node").glob("node[0-9]*")
    return {cpu: int(folder.name[4:]) for folder in folders for cpu in _read_cpus(folder / "cpulist")}


def parse_cpus(text: str) -> tuple[int, ...]:
    """The CPUs of "0-3,8", in the order given (cpuset(7), "List format"). Raises ValueError for anything else."""
    cpus: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)) or len(part) > 12:
            raise ValueError(f"must be CPUs such as 0-3,8, got {text!r}")
        if int(last or first) < int(first):
            raise ValueError(f"{part.strip()!r} is no range of CPUs: it ends before it begins")
        cpus.update(dict.fromkeys(range(int(first), min(int(last or first), int(first) + 8191) + 1)))
    return tuple(cpus)


def show_cpus(cpus: Iterable[int]) -> str:
    """CPUs in the same form, by number."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _read_cpus(path: Path) -> tuple[int, ...]:
    try:
        return parse_cpus(_read(path))
    except ValueError:
        return ()


def _read(path: Path) -> str:
    """Empty where there is no such file."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
