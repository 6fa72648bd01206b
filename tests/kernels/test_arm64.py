"""The kernels are portable C++: they compile for 64-bit ARM too, where a compiler for it is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
COMPILER = "aarch64-linux-gnu-g++"
# The binding needs Python's headers for that machine.
SOURCES = [path for path in sorted((KERNELS / "src").glob("*.cpp")) if path.name != "python.cpp"]
OPTIONS = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion"]
OPTIONS += ["-Wno-sign-conversion", "-Werror", "-DBERTRT_ISA=portable", "-DBERTRT_POISON=0"]
OPTIONS += ['-DBERTRT_VERSION="0"', f"-I{KERNELS / 'src'}", f"-I{KERNELS / 'include'}"]


@pytest.mark.parametrize(
    "source", [*SOURCES, KERNELS / "src/kernels/kernels.cpp"], ids=lambda path: path.stem
)
def test_it_compiles(source: Path) -> None:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no compiler for 64-bit ARM ({COMPILER})")
    done = subprocess.run([COMPILER, *OPTIONS, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
