from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bertrt import machine

GIB = 1 << 30
MEMINFO = "MemTotal:       16777216 kB\nMemFree:  1 kB\nMemAvailable:    8388608 kB\n"  # 16 GiB, 8 GiB
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:5 - cgroup cgroup rw,cpu,cpuacct\n"
    "32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "33 30 0:29 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
)
X86 = """processor\t: 0
model name\t: Some Server CPU @ 2.0GHz
flags\t\t: fpu sse2 fma avx2 avx512f avx512_vnni amx_tile amx_int8

processor\t: 1
model name\t: Some Server CPU @ 2.0GHz
flags\t\t: fpu sse2 fma avx2 avx512f avx512_vnni amx_tile amx_int8
"""


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, "proc/cpuinfo": X86, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_proc_and_sys_the_plain_answers_remain(tmp_path: Path) -> None:
    found = machine.describe(tmp_path)
    assert (found.usable_cpus, found.affinity_cpus, found.logical_cpus) == (8, 8, 16)
    assert found.cpu_quota is None
    assert found.memory_bytes is None
    assert found.memory_available_bytes is None
    assert found.memory_limit_bytes is None
    assert found.instruction_sets == ()
    assert found.cpu
    assert found.os


def test_without_affinity_every_cpu_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.usable_cpus(tmp_path) == 16
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.usable_cpus(tmp_path) == 1


def test_no_limits(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/self/mountinfo": V2_MOUNT,
            "proc/self/cgroup": "0::/user\n",
            "sys/fs/cgroup/user/cpu.max": "max 100000\n",
            "sys/fs/cgroup/user/memory.max": "max\n",
        },
    )
    found = machine.describe(tmp_path)
    assert found.cpu_quota is None
    assert found.usable_cpus == 8
    assert (found.memory_bytes, found.memory_available_bytes) == (16 * GIB, 8 * GIB)
    assert found.memory_limit_bytes is None


@pytest.mark.parametrize(
    ("quota", "usable"),
    [
        ("50000 100000", 1),
        ("100000 100000", 1),
        ("100001 100000", 2),
        ("150000 100000", 2),
        ("150000 50000", 3),
        ("9900000 100000", 8),
        ("max 100000", 8),
        ("", 8),
        ("nonsense", 8),
        ("0 100000", 8),
        ("100000 0", 8),
    ],
)
def test_quota_of_version_2_is_rounded_up(tmp_path: Path, quota: str, usable: int) -> None:
    plant(
        tmp_path,
        {
            "proc/self/mountinfo": V2_MOUNT,
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/cpu.max": quota + "\n",
        },
    )
    assert machine.usable_cpus(tmp_path) == usable


@pytest.mark.parametrize("tightest", ["a", "a/b", "a/b/c"])
def test_every_ancestor_limits(tmp_path: Path, tightest: str) -> None:
    files = {"proc/self/mountinfo": V2_MOUNT, "proc/self/cgroup": "0::/a/b/c\n"}
    for group in ("a", "a/b", "a/b/c"):
        files[f"sys/fs/cgroup/{group}/cpu.max"] = "400000 100000\n"
        files[f"sys/fs/cgroup/{group}/memory.max"] = f"{12 * GIB}\n"
        files[f"sys/fs/cgroup/{group}/memory.current"] = f"{GIB}\n"
    files[f"sys/fs/cgroup/{tightest}/cpu.max"] = "150000 100000\n"
    files[f"sys/fs/cgroup/{tightest}/memory.max"] = f"{2 * GIB}\n"
    # Not an ancestor.
    files["sys/fs/cgroup/other/cpu.max"] = "1000 100000\n"
    found = machine.describe(plant(tmp_path, files))
    assert found.cpu_quota == 1.5
    assert found.usable_cpus == 2
    assert found.memory_limit_bytes == found.memory_bytes == 2 * GIB
    assert found.memory_available_bytes == GIB


def test_pages_of_files_that_nobody_uses_are_available(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/self/mountinfo": V2_MOUNT,
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}\nactive_file 0\n",
        },
    )
    assert machine.describe(tmp_path).memory_available_bytes == 3 * GIB


def test_the_machine_may_have_less_available_than_the_limit(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/self/mountinfo": V2_MOUNT,
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{12 * GIB}\n",
            "sys/fs/cgroup/memory.current": "0\n",
        },
    )
    found = machine.describe(tmp_path)
    assert found.memory_bytes == 12 * GIB
    assert found.memory_available_bytes == 8 * GIB


def test_version_1(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/self/mountinfo": V1_MOUNTS,
            "proc/self/cgroup": "9:cpuset:/\n5:memory:/jobs/one\n4:cpu,cpuacct:/jobs/one\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/jobs/one/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/jobs/one/cpu.cfs_period_us": "100000\n",
            # What the kernel says when there is no limit: the largest multiple of a page in 63 bits.
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{9 * GIB}\n",
            "sys/fs/cgroup/memory/jobs/one/memory.limit_in_bytes": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory/jobs/one/memory.usage_in_bytes": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory/jobs/one/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB}\n",
        },
    )
    found = machine.describe(tmp_path)
    assert found.cpu_quota == 2.5
    assert found.usable_cpus == 3
    assert found.memory_limit_bytes == 4 * GIB
    assert found.memory_available_bytes == 2 * GIB


def test_version_1_without_limits(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/self/mountinfo": V1_MOUNTS,
            "proc/self/cgroup": "5:memory:/\n4:cpu,cpuacct:/\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
        },
    )
    found = machine.describe(tmp_path)
    assert found.cpu_quota is None
    assert found.memory_limit_bytes is None
    assert found.memory_bytes == 16 * GIB


@pytest.mark.parametrize(
    "group",
    [
        "/docker/f00",  # the mount begins at this group
        "/docker/f00/worker",  # below it
        "/system.slice/elsewhere",  # the host's path, which the container does not see
        "/../outside",  # what a control-group namespace shows of a process from outside
    ],
)
def test_in_a_container_the_mount_may_begin_below_the_top(tmp_path: Path, group: str) -> None:
    plant(
        tmp_path,
        {
            "proc/self/mountinfo": V2_MOUNT.replace(" / /sys", " /docker/f00 /sys"),
            "proc/self/cgroup": f"0::{group}\n",
            "sys/fs/cgroup/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/worker/cpu.max": "max 100000\n",
            "sys/fs/outside/cpu.max": "100000 100000\n",
        },
    )
    assert machine.usable_cpus(tmp_path) == 3


def test_both_versions_mounted_at_once(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/self/mountinfo": V1_MOUNTS
            + "41 31 0:38 / /sys/fs/cgroup/uni\\040fied rw - cgroup2 cgroup2 rw\n",
            "proc/self/cgroup": "4:cpu,cpuacct:/\n0::/x:y\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "500000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/uni fied/x:y/cpu.max": "400000 100000\n",
        },
    )
    assert machine.usable_cpus(tmp_path) == 4


@pytest.mark.parametrize(
    "mountinfo", ["", "\n", "garbage", "1 2 3 - cgroup2\n", "a b c d e f - cgroup2 x y\n", "- - - - - -\n"]
)
@pytest.mark.parametrize("groups", ["", "garbage\n", "0::\n", "::::\n"])
def test_malformed_files_mean_no_limit(tmp_path: Path, mountinfo: str, groups: str) -> None:
    plant(tmp_path, {"proc/self/mountinfo": mountinfo, "proc/self/cgroup": groups})
    assert machine.usable_cpus(tmp_path) == 8
    assert machine.describe(tmp_path).memory_limit_bytes is None


def test_x86(tmp_path: Path) -> None:
    found = machine.describe(plant(tmp_path, {}))
    assert found.cpu == "Some Server CPU @ 2.0GHz"
    assert found.instruction_sets == ("avx2", "fma", "avx512f", "avx512_vnni", "amx_tile", "amx_int8")


def test_only_what_all_cores_have(tmp_path: Path) -> None:
    cpuinfo = "flags : avx2 avx512f\n\nflags : avx2\n\nflags : avx2 avx512f\n"
    found = machine.describe(plant(tmp_path, {"proc/cpuinfo": cpuinfo}))
    assert found.instruction_sets == ("avx2",)


@pytest.mark.parametrize(
    ("board", "name"), [("Board Model 4\0", "Board Model 4"), ("", "implementer 0x41, part 0xd40")]
)
def test_arm(tmp_path: Path, board: str, name: str) -> None:
    cpuinfo = (
        "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp i8mm bf16 sve\n"
        "CPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
    )
    files = {"proc/cpuinfo": cpuinfo} | ({"proc/device-tree/model": board} if board else {})
    found = machine.describe(plant(tmp_path, files))
    assert found.cpu == name
    assert found.instruction_sets == ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve")


def test_operating_system(tmp_path: Path) -> None:
    release = 'NAME="X"\nPRETTY_NAME="Some Linux 12"\n'
    assert machine.describe(plant(tmp_path, {"etc/os-release": release})).os.startswith("Some Linux 12, ")


def test_json(tmp_path: Path) -> None:
    value = machine.describe(plant(tmp_path, {})).to_json()
    assert value["usable_cpus"] == 8
    assert value["instruction_sets"][0] == "avx2"


def test_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    affinity = len(os.sched_getaffinity(0))
    found = machine.describe()
    assert found.affinity_cpus == affinity
    if found.cpu_quota is None:
        assert found.usable_cpus == affinity
    else:
        assert found.usable_cpus == max(1, min(affinity, -(-found.cpu_quota // 1)))
    assert found.memory_available_bytes is not None
    assert found.memory_bytes is not None
    assert 0 < found.memory_available_bytes <= found.memory_bytes


def test_a_narrow_affinity_is_honoured() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from bertrt.machine import usable_cpus; print(usable_cpus())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "1\n"
