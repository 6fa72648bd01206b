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


def start(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    # The tools that pip has installed lie beside the interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    tool = shutil.which(command[0], path=path)
    if tool is None:
        pytest.skip(f"there is no {command[0]}")
    return subprocess.run(
        [tool, *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": path, **variables},
    )


def run(*command: str | Path) -> None:
    done = start(*command)
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


OLD = '#!/bin/sh\nexec g++ -U__GNUC__ -D__GNUC__=11 -U__GNUC_MINOR__ -D__GNUC_MINOR__=4 "$@"\n'


@pytest.mark.parametrize(("program", "problem"), [(None, "no C++ compiler was found"), (OLD, "is GNU 11.4")])
def test_a_compiler_that_will_not_do(tmp_path: Path, program: str | None, problem: str) -> None:
    """It is said what is needed, and another one is taken the next time."""
    compiler, build = tmp_path / "c++-11", tmp_path / "build"
    if program is not None:
        if shutil.which("g++") is None:
            pytest.skip("there is no GCC (g++)")
        compiler.write_text(program, encoding="utf-8")
        compiler.chmod(0o755)
    configure = ("cmake", "-S", ROOT / "kernels", "-B", build, "-G", "Ninja", "-DBERTRT_PYTHON=OFF")
    done = start(*configure, CXX=str(compiler))
    assert done.returncode != 0
    said = " ".join(done.stdout.split())
    assert problem in said
    assert "the native kernels need GCC 12 or Clang 15, or later ones" in said
    assert "-C cmake.define.BERTRT_KERNELS=OFF" in said
    run(*configure)
