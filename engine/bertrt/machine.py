"""What this machine gives to this process: processors, instruction sets, memory.

In a container the system counts the host's processors and memory. What a process may use of them is bounded
by its affinity mask and by the limits of its control groups (version 1 or 2), of which every ancestor's applies
too. All is read from ``/proc`` and ``/sys``; where there is neither, the plain answers of the standard
library remain.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

# The ones that decide how fast, or whether, a kernel runs; as /proc/cpuinfo spells them.
INSTRUCTION_SETS: Final = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)

_ROOT: Final = Path("/")
# More than any of these files holds on the largest machines; a bound all the same.
_LARGEST_FILE: Final = 16 << 20
# Of a control group by version: the limit on memory, what is used of it, and the entry of memory.stat for the
# pages of files that nobody uses now; they count as used, but are given back when memory runs short.
_MEMORY_FILES: Final = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine as this process sees it; ``None`` where it cannot be known.

    Attributes:
        cpu: the processor's name.
        architecture: such as ``x86_64`` or ``aarch64``.
        logical_cpus: processors of the machine, hyper-threads counted.
        affinity_cpus: those of them that this process may run on.
        cpu_quota: processors' worth of time that the control groups allow, such as 1.5; ``None``: no limit.
        usable_cpus: threads that can really run at once: the affinity, cut by the quota rounded up.
        instruction_sets: those of `INSTRUCTION_SETS` that every processor has.
        memory_bytes: memory of the machine, or the control groups' limit if that is less.
        memory_available_bytes: what can be had of it now without swapping.
        memory_limit_bytes: the control groups' limit; ``None``: no limit.
        os: the operating system, with its version.
        python: the interpreter's version.
    """

    cpu: str
    architecture: str
    logical_cpus: int
    affinity_cpus: int
    cpu_quota: float | None
    usable_cpus: int
    instruction_sets: tuple[str, ...]
    memory_bytes: int | None
    memory_available_bytes: int | None
    memory_limit_bytes: int | None
    os: str
    python: str

    def to_json(self) -> dict[str, Any]:
        """The fields by name, as JSON values."""
        return {**asdict(self), "instruction_sets": list(self.instruction_sets)}


def usable_cpus(root: Path = _ROOT) -> int:
    """Threads that can really run at once, at least 1: affinity, cut by the control groups' quota rounded up.

    Args:
        root: where ``proc`` and ``sys`` are looked for.
    """
    affinity = _affinity_cpus()
    quota = _cpu_quota(root)
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


def describe(root: Path = _ROOT) -> Machine:
    """Look at the machine; see `Machine`.

    Args:
        root: where ``proc``, ``sys`` and ``etc`` are looked for.
    """
    cpuinfo = _read(root / "proc/cpuinfo")
    meminfo = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE))
    total, available = (
        int(meminfo[name]) * 1024 if name in meminfo else None for name in ("MemTotal", "MemAvailable")
    )
    limit = None
    for level_limit, level_used in _memory_levels(root):
        # An unlimited group of version 1 says a number near 2^63.
        if total is None or level_limit < total:
            limit = level_limit if limit is None else min(limit, level_limit)
            left = max(0, level_limit - level_used)
            available = left if available is None else min(available, left)
    return Machine(
        cpu=_cpu_name(root, cpuinfo),
        architecture=platform.machine(),
        logical_cpus=os.cpu_count() or 1,
        affinity_cpus=_affinity_cpus(),
        cpu_quota=_cpu_quota(root),
        usable_cpus=usable_cpus(root),
        instruction_sets=_instruction_sets(cpuinfo),
        memory_bytes=total if limit is None else limit,
        memory_available_bytes=available,
        memory_limit_bytes=limit,
        os=_os_name(root),
        python=f"{platform.python_implementation()} {platform.python_version()}",
    )


def _affinity_cpus() -> int:
    # Not on every system that Python runs on.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_quota(root: Path) -> float | None:
    quotas = []
    for version, folder in _control_groups(root, "cpu"):
        if version == 2:
            # "max 100000" or "150000 100000": microseconds of processor time in each period.
            text = _read(folder / "cpu.max").split()
        else:
            text = (_read(folder / "cpu.cfs_quota_us") + " " + _read(folder / "cpu.cfs_period_us")).split()
        if len(text) == 2 and text[0].isdecimal() and text[1].isdecimal() and int(text[1]) and int(text[0]):
            quotas.append(int(text[0]) / int(text[1]))
    return min(quotas, default=None)


def _memory_levels(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of each control group with a limit on memory that the process is in."""
    for version, folder in _control_groups(root, "memory"):
        limit_file, used_file, cached = _MEMORY_FILES[version]
        limit, used = _read(folder / limit_file).strip(), _read(folder / used_file).strip()
        if not limit.isdecimal():
            continue
        cache = re.search(rf"^{cached} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
        held = int(used) if used.isdecimal() else 0
        yield int(limit), max(0, held - (int(cache[1]) if cache else 0))


def _control_groups(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """Version and folder of every control group that bounds this process, innermost first."""
    for version, mounted_group, mount in _control_group_mounts(root, controller):
        path = _group_path(root, version, controller)
        if path is None:
            continue
        # In a container the mount shows the hierarchy from some group down, and the path may be the host's.
        if path.is_relative_to(mounted_group):
            inside = path.relative_to(mounted_group)
        else:
            inside = PurePosixPath(path.as_posix().lstrip("/"))
        if ".." in inside.parts or not (mount / inside).is_dir():
            inside = PurePosixPath()
        for level in (inside, *inside.parents) if inside.parts else (inside,):
            yield version, mount / level


def _control_group_mounts(root: Path, controller: str) -> Iterator[tuple[int, PurePosixPath, Path]]:
    """Version, group at its top, and place of each mounted hierarchy that can bound a controller.

    A line of ``/proc/self/mountinfo`` (proc_pid_mountinfo(5)) is
    ``36 35 98:0 ROOT MOUNT_POINT OPTIONS [TAGS] - TYPE SOURCE SUPER_OPTIONS``.
    """
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, separator, after = line.partition(" - ")
        left, right = before.split(" "), after.split(" ")
        if not separator or len(left) < 5 or len(right) < 3:
            continue
        version = {"cgroup": 1, "cgroup2": 2}.get(right[0])
        if version == 2 or (version == 1 and controller in right[2].split(",")):
            group, point = (_unescape(part) for part in left[3:5])
            yield version, PurePosixPath(group), root / point.lstrip("/")


def _group_path(root: Path, version: int, controller: str) -> PurePosixPath | None:
    """The process's group in a hierarchy: ``/proc/self/cgroup`` has ``ID:CONTROLLERS:PATH`` a line."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if not separator:
            continue
        if (number == "0" and not controllers) if version == 2 else controller in controllers.split(","):
            return PurePosixPath(path or "/")
    return None


def _unescape(text: str) -> str:
    """Undo the octal escapes (of space, tab, newline and backslash) in a field of mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _instruction_sets(cpuinfo: str) -> tuple[str, ...]:
    """Those that every processor has: cores of one machine can differ."""
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    sets = [frozenset(line.split()) for line in dict.fromkeys(lines)]
    common = frozenset.intersection(*sets) if sets else frozenset()
    return tuple(name for name in INSTRUCTION_SETS if name in common)


def _cpu_name(root: Path, cpuinfo: str) -> str:
    for pattern in (r"^model name\s*:\s*(\S.*)$", r"^Hardware\s*:\s*(\S.*)$", r"^cpu model\s*:\s*(\S.*)$"):
        if found := re.search(pattern, cpuinfo, re.MULTILINE):
            return found[1].strip()
    # ARM servers give numbers only; boards say what they are in the device tree.
    board = _read(root / "proc/device-tree/model").strip("\0\n ")
    numbers = [
        f"{name.split()[-1]} {found[1]}"
        for name in ("CPU implementer", "CPU part")
        if (found := re.search(rf"^{name}\s*:\s*(\S+)$", cpuinfo, re.MULTILINE))
    ]
    return board or ", ".join(numbers) or platform.processor() or platform.machine() or "unknown"


def _os_name(root: Path) -> str:
    system = f"{platform.system()} {platform.release()}"
    release = re.search(r'^PRETTY_NAME="?([^"\n]+)"?$', _read(root / "etc/os-release"), re.MULTILINE)
    return f"{release[1]}, {system}" if release else system


def _read(path: Path) -> str:
    """The text of a file of the system; empty if it is not there or may not be read."""
    try:
        with path.open("rb") as file:
            return file.read(_LARGEST_FILE).decode("utf-8", "replace")
    except OSError:
        return ""
