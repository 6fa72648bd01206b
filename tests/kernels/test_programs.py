"""The kernels' own test programs (``kernels/tests``), and some seconds of fuzzing; built with warnings as errors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("bertrt._native", reason="the native kernels are not built")

ROOT = Path(__file__).parents[2]
# Kept, so that only what has changed is compiled again.
BUILD = ROOT / "build" / "tests"
PROGRAMS = [path.stem for path in sorted((ROOT / "kernels" / "tests").glob("test_*.cpp"))]
HARNESSES = [path.stem for path in sorted((ROOT / "kernels" / "fuzz").glob("fuzz_*.cpp"))]


def run(*command: str | Path) -> None:
    # The tools that pip has installed lie beside the interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    tool = shutil.which(command[0], path=path)
    if tool is None:
        pytest.skip(f"there is no {command[0]}")
    done = subprocess.run(
        [tool, *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def programs() -> Path:
    options = ["-DBERTRT_PYTHON=OFF", "-DBERTRT_TESTS=ON", "-DBERTRT_WERROR=ON"]
    run("cmake", "-S", ROOT / "kernels", "-B", BUILD, "-G", "Ninja", *options)
    run("cmake", "--build", BUILD)
    return BUILD


@pytest.mark.parametrize("name", [*PROGRAMS, *HARNESSES])
def test_program(programs: Path, name: str) -> None:
    run("ctest", "--test-dir", programs, "--no-tests=error", "--output-on-failure", "-R", f"^{name}$")
