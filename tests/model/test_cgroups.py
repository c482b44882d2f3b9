"""What control groups allow, of both versions, from the process's own group up to the top."""

import pytest
from model.machines import add_cgroup1, add_cgroup2, write

from llmd.model.cgroups import cpu_quota, memory_limit

GIB = 1 << 30


def test_without_groups_nothing_is_limited(tmp_path):
    assert cpu_quota(tmp_path) is None
    assert memory_limit(tmp_path) is None


def test_the_tightest_group_above_counts(tmp_path):
    top = add_cgroup2(tmp_path, "/system.slice/llmd.service")
    write(top, "system.slice/cpu.max", "150000 100000")
    write(top, "system.slice/llmd.service/cpu.max", "max 100000")
    write(top, "system.slice/memory.max", str(2 * GIB))
    write(top, "system.slice/memory.current", str(GIB))
    write(top, "system.slice/llmd.service/memory.max", str(3 * GIB // 2))
    write(top, "system.slice/llmd.service/memory.current", "1000")
    assert cpu_quota(tmp_path) == 1.5
    limit = memory_limit(tmp_path)
    assert limit.left_bytes == GIB
    assert limit.name == "memory.max of /system.slice"


def test_the_page_cache_is_not_in_use(tmp_path):
    top = add_cgroup2(tmp_path)
    write(top, "memory.max", str(GIB))
    write(top, "memory.current", "900")
    write(top, "memory.stat", "anon 300\nfile 600\ninactive_file 400\nactive_file 100\nshmem 100")
    assert memory_limit(tmp_path).used_bytes == 400


def test_a_soft_limit_counts_too(tmp_path):
    top = add_cgroup2(tmp_path)
    write(top, "memory.max", "max")
    write(top, "memory.high", str(GIB))
    assert memory_limit(tmp_path).name == "memory.high of /"


def test_the_first_version(tmp_path):
    top = add_cgroup1(tmp_path, "/docker/abc")
    for folder, quota, size in (("docker", "-1", 1 << 63), ("docker/abc", "250000", GIB)):
        write(top, f"cpu,cpuacct/{folder}/cpu.cfs_quota_us", quota)
        write(top, f"cpu,cpuacct/{folder}/cpu.cfs_period_us", "100000")
        write(top, f"memory/{folder}/memory.limit_in_bytes", str(size))
    write(top, "memory/docker/abc/memory.usage_in_bytes", "5000")
    write(top, "memory/docker/abc/memory.stat", "inactive_file 1\ntotal_inactive_file 1000\ntotal_active_file 2000")
    assert cpu_quota(tmp_path) == 2.5
    limit = memory_limit(tmp_path)
    assert (limit.limit_bytes, limit.used_bytes) == (GIB, 2000)
    assert limit.name == "memory.limit_in_bytes of /docker/abc"


@pytest.mark.parametrize("add", [add_cgroup1, add_cgroup2])
def test_in_a_container_its_own_group_is_the_top(tmp_path, add):
    """Without a namespace of its own the process sees the host's names, but only its own group is mounted."""
    top = add(tmp_path, "/docker/abc/inner", mounted="/docker/abc")
    folder = top / "memory" if add is add_cgroup1 else top
    name = "memory.limit_in_bytes" if add is add_cgroup1 else "memory.max"
    write(folder, f"inner/{name}", str(GIB))
    write(folder, name, str(GIB // 2))
    assert memory_limit(tmp_path).limit_bytes == GIB // 2


@pytest.mark.parametrize("name", ["/../other", "/elsewhere"])
def test_a_group_outside_of_what_is_mounted(tmp_path, name):
    top = add_cgroup2(tmp_path, name, mounted="/docker/abc" if name == "/elsewhere" else "/")
    write(top, "cpu.max", "50000 100000")
    assert cpu_quota(tmp_path) == 0.5


@pytest.mark.parametrize("text", ["", "max", "x y", "100000 0", "100000"])
def test_nonsense_is_no_limit(tmp_path, text):
    top = add_cgroup2(tmp_path)
    write(top, "cpu.max", text)
    write(top, "memory.max", text)
    assert cpu_quota(tmp_path) is None
    assert text == "100000" or memory_limit(tmp_path) is None
