"""Memory of this machine: what is free, and whether a model fits before any of it is taken.

A process that takes more than there is gets killed in the middle of its work. So a model on a CPU is reckoned first, from
its config, and refused with the arithmetic; swap does not count, for weights are read again at every step. What is counted
is all that it will ever take:

    weights          as they are kept, adapter slots included
    KV pool          one allocation of a fixed size. Its pages come when blocks are first used, not at the start, which
                     would cost seconds: they are promised, and the next model of this process finds them gone
    working memory   of the largest step (max_num_batched_tokens, max_num_seqs), or of the largest layer while it loads
    reserve          Python: requests and text, whose sizes have bounds of their own in [server], [scheduler] and [limits]
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from llmd.errors import ModelError
from llmd.model.cgroups import memory_limit

log = logging.getLogger("llmd.model")

RESERVE_BYTES = 64 << 20


class HostMemory(NamedTuple):
    """What may still be taken, and why it is no more."""

    free_bytes: int
    why: str  # "of 23.54 GiB", "memory.max of /llmd.service is 512.00 MiB, of which 90.00 MiB are used"
    total_bytes: int = 0  # of the machine, or the limit; 0: not told
    where: str = "memory"  # or a GPU's name


def host_memory(root: Path = Path("/")) -> HostMemory:
    """The machine's memory without swap, or what the tightest cgroup leaves of it."""
    free, total = _machine(root)
    limit = memory_limit(root)
    if limit is None or limit.left_bytes >= free:
        return HostMemory(free, f"of {show(total)}", total)
    why = f"{limit.name} is {show(limit.limit_bytes)}, of which {show(limit.used_bytes)} are used"
    return HostMemory(limit.left_bytes, why, limit.limit_bytes)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory that are free for use, a container's limit included."""
    return host_memory(root).free_bytes


def _machine(root: Path) -> tuple[int, int]:
    """(available, all) bytes, as the kernel tells them."""
    found: dict[str, int] = {}
    try:
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name in ("MemAvailable", "MemTotal"):
                found[name] = int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        log.debug("no /proc/meminfo, taking the free pages")
    page = os.sysconf("SC_PAGE_SIZE")
    total = found.get("MemTotal") or os.sysconf("SC_PHYS_PAGES") * page
    if "MemAvailable" in found:
        return found["MemAvailable"], total
    names = os.sysconf_names
    return (os.sysconf("SC_AVPHYS_PAGES") * page if "SC_AVPHYS_PAGES" in names else total // 2), total


def check_room(name: str, needs: Mapping[str, int], memory: HostMemory, promised_bytes: int = 0) -> None:
    """Raise ModelError, with the sum, for a model that needs more than is free. Needs are by the words they are told in."""
    wanted = {**needs, "reserve": RESERVE_BYTES}
    total, free = sum(wanted.values()), memory.free_bytes - promised_bytes
    if total <= free:
        return
    parts = " + ".join(f"{what} {show(size)}" for what, size in wanted.items() if size)
    promised = f", {show(promised_bytes)} of it promised to other models" if promised_bytes else ""
    swap = "; swap does not count" if memory.where == "memory" else ""
    raise ModelError(
        f"{name} does not fit into {memory.where}: {parts} = {show(total)}, and {show(max(free, 0))} are free "
        f"({memory.why}{promised}{swap}): {show(total - free)} are missing. {_advice(needs, total - free)}"
    )


def _advice(needs: Mapping[str, int], missing: int) -> str:
    """What to change, the largest part first."""
    words = {
        "weights": "take fewer bits (quantization = 'int8' or 'int4') or a smaller model",
        "KV pool": "lower cache.kv_cache_bytes",
        "working memory": "lower scheduler.max_num_seqs and scheduler.max_num_batched_tokens",
        "adapter slots": "lower adapters.max_loras or adapters.max_lora_rank",
    }
    largest = sorted((what for what in needs if what in words), key=lambda what: -needs[what])
    enough = [what for what in largest if needs[what] > missing] or largest
    return f"Give it more memory, or {'; or '.join(words[what] for what in enough[:2])}"


def show(num_bytes: int) -> str:
    """Bytes for people."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes / 1024:.2f} KiB"
