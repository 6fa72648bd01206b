"""No compiled file holds instructions of a set beyond its own, and none shares functions with another."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# One line of objdump: bytes, then the instruction.
LINE = re.compile(r"^ *[0-9a-f]+:\t(?P<bytes>(?:[0-9a-f]{2} )+) *\t(?P<text>.*)$")
# Sets of instructions by a pattern of "first byte and text", where 62 begins AVX-512's encoding and c4, c5 begin AVX's.
# What came to SSE after the baseline (SSE2) goes by its names.
SETS = {
    "after SSE2": (
        r"(?!c4|c5|62).. (pshufb|phadd|pmaddu|pabs|palignr|psign|pmulhrs|ptest|pmov[sz]x"
        r"|pm(in|ax)(sb|sd|ud|uw)|pmulld|pmuldq|packusdw|blendv|pblend|pextr[bdq]|pinsr[bdq]"
        r"|round[ps][sd]|dpps|extractps|insertps|crc32|popcnt)"
    ),
    "AVX": r"c4|c5",
    "VNNI": r".. .*vpdp(bus|wss)d",
    "AVX-512": r"62|.. k(mov|or|and|xor|not|unpck|shift|test)",
    "BF16": r".. v(dpbf16ps|cvtne2?ps2?bf16|cvtneps2bf16)",
    "AMX": r".. (ld|st)tilecfg|.. tile|.. tdp",
}
# What each file may use, and what it is made for and must use, so that a pattern that finds nothing shows.
ALLOWED = {
    "portable": set[str](),
    "avx2": {"AVX"},
    "avx2_vnni": {"AVX", "VNNI"},
    "avx512_vnni": {"AVX", "VNNI", "AVX-512"},
    "avx512_bf16": {"AVX", "VNNI", "AVX-512", "BF16"},
    "amx": {"AVX", "VNNI", "AVX-512", "BF16", "AMX"},
}
# On AMX the products of integers are those of tiles.
NEEDED = ALLOWED | {"amx": ALLOWED["amx"] - {"VNNI"}}


@pytest.fixture(scope="module")
def objects() -> Path:
    """The folder of the newest build's object files."""
    if platform.machine() != "x86_64":
        pytest.skip("the instruction sets are those of x86-64")
    for tool in ("objdump", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} (binutils)")
    found = sorted(
        (ROOT / "build").glob("*/CMakeFiles/bertrt_core.dir"), key=lambda path: path.stat().st_mtime
    )
    if not found:
        pytest.skip("there are no object files in build/; an editable installation leaves them there")
    return found[-1].parent


def instructions(path: Path) -> Iterator[str]:
    """The first byte and the text of each instruction."""
    done = subprocess.run(["objdump", "-d", "-w", str(path)], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        if match := LINE.match(line):
            yield f"{match['bytes'][:2]} {match['text']}"


def used_sets(path: Path) -> dict[str, str]:
    """The sets that a file uses, each with an instruction as an example."""
    examples: dict[str, str] = {}
    count = 0
    for instruction in instructions(path):
        count += 1
        for name, pattern in SETS.items():
            if name not in examples and re.match(pattern, instruction):
                examples[name] = instruction
    assert count > 0, f"no instructions found in {path}"
    return examples


@pytest.mark.parametrize("isa", ALLOWED)
def test_kernels_use_their_own_instruction_set_and_none_beyond(objects: Path, isa: str) -> None:
    examples = used_sets(objects / f"kernels_{isa}.dir/src/kernels/kernels.cpp.o")
    assert NEEDED[isa] <= set(examples) <= ALLOWED[isa], examples


@pytest.mark.parametrize("isa", ["avx2", "avx2_vnni", "avx512_vnni", "avx512_bf16"])
def test_the_loops_that_measure_the_peak_multiply_as_often_as_they_say(objects: Path, isa: str) -> None:
    # A compiler that knows that all sums are equal computes one, and the peak comes out several times too high.
    path = objects / f"kernels_{isa}.dir/src/kernels/kernels.cpp.o"
    products: dict[str, int] = {}
    name = ""
    done = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        if line.endswith(">:"):
            name = line
        elif "peak_of" in name:
            products[name] = products.get(name, 0) + bool(
                re.search(r"\bv(pdpbusd|dpbf16ps|fmadd|pmadd)", line)
            )
    sums = 12 if isa.startswith("avx512") else 8
    assert len(products) == 2
    assert min(products.values()) >= sums, products


@pytest.mark.parametrize("isa", ALLOWED)
def test_kernels_share_no_functions(objects: Path, isa: str) -> None:
    # The linker keeps one copy of a weak symbol, and it may be the one with instructions that the processor lacks.
    path = objects / f"kernels_{isa}.dir/src/kernels/kernels.cpp.o"
    done = subprocess.run(
        ["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True
    )
    symbols = [line.split(maxsplit=2)[1:] for line in done.stdout.splitlines()]
    assert [name for kind, name in symbols if kind in "WwVvu"] == []
    assert [name for kind, name in symbols if kind.isupper()] == [f"bertrt::{isa}::kKernels"]


def test_all_else_is_for_the_baseline(objects: Path) -> None:
    paths = [
        path for path in objects.rglob("*.o") if not path.relative_to(objects).parts[0].startswith("kernels_")
    ]
    assert {"engine.cpp.o", "isa.cpp.o", "capi.cpp.o"} <= {path.name for path in paths}
    assert {path.name: used for path in paths if (used := used_sets(path))} == {}
