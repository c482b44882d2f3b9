"""Machines made of files: /proc, /sys and cgroups under a folder, for what reads them through a root."""

from pathlib import Path


def write(root: Path, path: str, text: str) -> None:
    """A file and the folders above it."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(f"{text}\n")


def add_cpus(root: Path, cores: list[list[int]], nodes: list[list[int]], cache_kib: int = 32768) -> None:
    """Physical cores by their hardware threads, and NUMA nodes by their CPUs; a last-level cache for each node."""
    shared = {cpu: ",".join(map(str, node)) for node in nodes for cpu in node}
    for core in cores:
        for cpu in core:
            folder = f"sys/devices/system/cpu/cpu{cpu}"
            write(root, f"{folder}/topology/thread_siblings_list", ",".join(map(str, core)))
            for level, size, whose in ((1, 32, str(cpu)), (2, 1024, str(cpu)), (3, cache_kib, shared[cpu])):
                write(root, f"{folder}/cache/index{level}/level", str(level))
                write(root, f"{folder}/cache/index{level}/size", f"{size}K")
                write(root, f"{folder}/cache/index{level}/shared_cpu_list", whose)
    for number, node in enumerate(nodes):
        write(root, f"sys/devices/system/node/node{number}/cpulist", ",".join(map(str, node)))


def add_cgroup2(root: Path, name: str = "/", mounted: str = "/") -> Path:
    """This process in a group of version 2; the folder of the whole hierarchy."""
    write(root, "proc/self/cgroup", f"0::{name}")
    write(
        root,
        "proc/self/mountinfo",
        f"30 24 0:26 {mounted} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate",
    )
    return root / "sys/fs/cgroup"


def add_cgroup1(root: Path, name: str, mounted: str = "/") -> Path:
    """The same in version 1, with the second version mounted beside it for systemd."""
    lines = [f"5:memory:{name}", f"4:cpu,cpuacct:{name}", f"1:name=systemd:{name}", f"0::{name}"]
    write(root, "proc/self/cgroup", "\n".join(lines))
    mounts = [
        f"31 30 0:29 {mounted} /sys/fs/cgroup/{what} rw - cgroup cgroup rw,{what}" for what in ("cpu,cpuacct", "memory")
    ]
    mounts.append("38 30 0:41 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw")
    write(root, "proc/self/mountinfo", "\n".join(mounts))
    return root / "sys/fs/cgroup"


def add_memory(root: Path, available: int, total: int | None = None) -> None:
    """What /proc/meminfo tells, in bytes."""
    write(
        root,
        "proc/meminfo",
        f"MemTotal: {(total or available) // 1024} kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB",
    )
