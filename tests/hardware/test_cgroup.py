from __future__ import annotations

from pathlib import Path

import pytest

from autoflux.hardware import cgroup, host
from tests.hardware.fakes import write

GIB = 2**30
V2 = "sys/fs/cgroup"


def test_without_cgroups_there_is_no_limit(tmp_path: Path):
    assert cgroup.memory_limits(tmp_path) == []
    assert cgroup.cpu_quota(tmp_path) is None


def test_version_2_at_the_root_of_a_container(tmp_path: Path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            f"{V2}/memory.max": 8 * GIB,
            f"{V2}/memory.current": 5 * GIB,
            f"{V2}/memory.stat": f"anon {3 * GIB}\nfile {2 * GIB}\ninactive_file {2 * GIB}\n",
            f"{V2}/cpu.max": "250000 100000\n",
        },
    )
    assert cgroup.memory_limits(tmp_path) == [cgroup.MemoryLimit(8 * GIB, 3 * GIB)]
    assert cgroup.cpu_quota(tmp_path) == 2.5


def test_version_2_without_limits(tmp_path: Path):
    write(tmp_path, {"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "max\n", f"{V2}/cpu.max": "max 100000\n"})
    assert cgroup.memory_limits(tmp_path) == []
    assert cgroup.cpu_quota(tmp_path) is None


def test_version_2_nested_groups_all_count(tmp_path: Path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user.slice/app.scope\n",
            f"{V2}/user.slice/memory.max": 4 * GIB,
            f"{V2}/user.slice/memory.current": 3 * GIB,
            f"{V2}/user.slice/app.scope/memory.max": "max",
            f"{V2}/user.slice/app.scope/memory.high": 6 * GIB,
            f"{V2}/user.slice/app.scope/memory.current": 1 * GIB,
            f"{V2}/user.slice/cpu.max": "100000 100000",
            f"{V2}/user.slice/app.scope/cpu.max": "400000 100000",
        },
    )
    limits = cgroup.memory_limits(tmp_path)
    assert [(limit.limit, limit.free) for limit in limits] == [(6 * GIB, 5 * GIB), (4 * GIB, 1 * GIB)]
    assert cgroup.cpu_quota(tmp_path) == 1.0
    assert host.container_limit(16 * GIB, limits) == 4 * GIB


def test_version_1(tmp_path: Path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/docker/abc\n",
            f"{V2}/memory/memory.limit_in_bytes": 2 * GIB,
            f"{V2}/memory/memory.usage_in_bytes": GIB,
            f"{V2}/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}\n",
            f"{V2}/cpu,cpuacct/cpu.cfs_quota_us": 150000,
            f"{V2}/cpu,cpuacct/cpu.cfs_period_us": 100000,
        },
    )
    # The path is the host's; the folder mounted in the container is the group itself.
    assert cgroup.memory_limits(tmp_path) == [cgroup.MemoryLimit(2 * GIB, GIB // 2)]
    assert cgroup.cpu_quota(tmp_path) == 1.5


def test_version_1_writes_no_limit_as_a_large_number(tmp_path: Path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/a\n4:cpu:/a\n",
            f"{V2}/memory/a/memory.limit_in_bytes": 9223372036854771712,
            f"{V2}/cpu/a/cpu.cfs_quota_us": -1,
            f"{V2}/cpu/a/cpu.cfs_period_us": 100000,
        },
    )
    assert cgroup.memory_limits(tmp_path) == []
    assert cgroup.cpu_quota(tmp_path) is None


@pytest.mark.parametrize("text", ["", "rubbish", "0::/../../..", "::", "0::/a\n0::/b"])
def test_unreadable_membership_is_no_limit(tmp_path: Path, text: str):
    write(tmp_path, {"proc/self/cgroup": text, f"{V2}/memory.max": "what?", f"{V2}/memory.stat": "x\ny z w\n"})
    assert cgroup.memory_limits(tmp_path) == []


def test_the_host_respects_the_container(tmp_path: Path):
    files = {
        "proc/self/cgroup": "0::/",
        "proc/cpuinfo": "processor : 0\nmodel name : Fake 9000\n",
        f"{V2}/memory.max": 64 * 2**20,
        f"{V2}/memory.current": 24 * 2**20,
        f"{V2}/cpu.max": "100000 100000",
    }
    found = host.read(write(tmp_path, files))
    assert found.container_limit_bytes == found.total_bytes.value == 64 * 2**20
    assert found.available_bytes.value == 40 * 2**20
    assert found.pinnable_bytes.value < found.available_bytes.value
    assert found.cores == 1
    assert found.processor == "Fake 9000"


def test_a_limit_above_the_ram_is_none(tmp_path: Path):
    found = host.read(write(tmp_path, {"proc/self/cgroup": "0::/", f"{V2}/memory.max": 2**59}))
    assert found.container_limit_bytes is None
