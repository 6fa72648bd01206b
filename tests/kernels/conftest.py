"""Fixtures for the kernels: each instruction set in turn, AMX by an emulator where the processor lacks it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ISAS = ("portable", "avx2", "avx2-vnni", "avx512-vnni", "avx512-bf16", "amx")


def _processor_has_amx() -> bool:
    # The spaces keep "amx_tile" from being found inside another flag.
    return " amx_tile " in Path("/proc/cpuinfo").read_text(encoding="utf-8").replace("\n", " \n")


@pytest.fixture(scope="session")
def processor_has_amx() -> bool:
    """Whether the processor runs AMX itself; skips where it could not even be emulated."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("AMX is for x86-64 processors, and used on Linux only")
    return _processor_has_amx()


@pytest.fixture(scope="session")
def compile_c(processor_has_amx: bool) -> Callable[..., None]:
    """A function that compiles one C file of this folder: name, result, options of the compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler (cc)")

    def run(source: str, out: Path, *options: str) -> None:
        command = [
            compiler,
            *options,
            "-Wall",
            "-Wextra",
            "-Werror",
            "-o",
            str(out),
            str(FOLDER / source),
            "-lm",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"

    return run


@pytest.fixture(scope="session")
def amx_emulator(compile_c: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulator of AMX, a library for LD_PRELOAD. On a processor with AMX it does nothing."""
    library = tmp_path_factory.mktemp("amx_emulator") / "libamx_emulator.so"
    compile_c("amx_emulator.c", library, "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")
    return library


@pytest.fixture(scope="session")
def isa_problems() -> dict[str, str]:
    """Why each instruction set cannot be used here; empty for those that can, be it by emulation."""
    native = pytest.importorskip("bertrt._native", reason="the native kernels are not built")
    problems = dict(native.isa_status())
    # The kernels for AMX also use AVX-512, which is not emulated.
    if not problems.get("avx512-bf16", "lacking") and not _processor_has_amx() and shutil.which("cc"):
        problems["amx"] = ""
    return problems


@pytest.fixture(scope="session")
def available_isas(isa_problems: dict[str, str]) -> list[str]:
    """The instruction sets that can be used here, be it by emulation; the plainest first."""
    return [isa for isa in ISAS if not isa_problems.get(isa, "lacking")]


@pytest.fixture(scope="session")
def isa_environment(
    request: pytest.FixtureRequest, isa_problems: dict[str, str]
) -> Callable[[str], dict[str, str]]:
    """A function that gives the environment of a process that runs the kernels of one instruction set.

    Skips the test where that set cannot be used, saying why.
    """

    def environment(isa: str) -> dict[str, str]:
        problem = isa_problems.get(isa, "it is not compiled in")
        if problem:
            pytest.skip(f"{isa} cannot be used here: {problem}")
        variables = {**os.environ, "BERTRT_ISA": isa}
        if isa == "amx" and not _processor_has_amx():
            emulator = request.getfixturevalue("amx_emulator")
            variables["LD_PRELOAD"] = " ".join([str(emulator), *os.environ.get("LD_PRELOAD", "").split()])
        return variables

    return environment


@pytest.fixture(scope="session", params=ISAS)
def isa(request: pytest.FixtureRequest, isa_problems: dict[str, str]) -> str:
    """Each instruction set in turn; those that cannot be used here are skipped by name."""
    problem = isa_problems.get(request.param, "it is not compiled in")
    if problem:
        pytest.skip(f"{request.param} cannot be used here: {problem}")
    return str(request.param)
