"""The emulator of AMX, against scalar code; on a processor with AMX, the scalar code against the processor."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

AMX = ("-mamx-tile", "-mamx-int8", "-mamx-bf16", "-O2", "-pthread")
Run = Callable[..., "subprocess.CompletedProcess[str]"]

NOT_CONFIGURED = "the tiles are not configured"
# What is forbidden, the signal that ends it, and what the emulator says.
FORBIDDEN = {
    "unconfigured-zero": (signal.SIGILL, f"TILEZERO at .*: #UD: {NOT_CONFIGURED}"),
    "unconfigured-load": (signal.SIGILL, f"TILELOADD at .*: #UD: {NOT_CONFIGURED}"),
    "unconfigured-product": (signal.SIGILL, f"TDPBSSD at .*: #UD: {NOT_CONFIGURED}"),
    "released": (signal.SIGILL, f"TILEZERO at .*: #UD: {NOT_CONFIGURED}"),
    "palette-0": (signal.SIGILL, f"TILEZERO at .*: #UD: {NOT_CONFIGURED}"),
    "palette-2": (signal.SIGSEGV, "LDTILECFG at .*: #GP: the palette is not 0 or 1"),
    "reserved-bytes-2": (signal.SIGSEGV, "LDTILECFG at .*: #GP: bytes 2 to 15 are not zero"),
    "reserved-bytes-32": (signal.SIGSEGV, "LDTILECFG at .*: #GP: bytes 32 to 47 are not zero"),
    "reserved-bytes-56": (signal.SIGSEGV, "LDTILECFG at .*: #GP: bytes 56 to 63 are not zero"),
    "17-rows": (signal.SIGSEGV, "LDTILECFG at .*: #GP: a tile has more than 16 rows"),
    "68-bytes": (signal.SIGSEGV, "LDTILECFG at .*: #GP: a tile has more than 64 bytes in a row"),
    "rows-without-columns": (signal.SIGSEGV, "LDTILECFG at .*: #GP: a tile has only rows or only columns"),
    "columns-without-rows": (signal.SIGSEGV, "LDTILECFG at .*: #GP: a tile has only rows or only columns"),
    "odd-columns": (signal.SIGILL, "TILELOADD at .*: #UD: the tile's rows are not a multiple of 4 bytes"),
    "start-row": (signal.SIGILL, "TILELOADD at .*: #UD: start_row is beyond the tile's rows"),
    "other-rows": (signal.SIGILL, "TDPBSSD at .*: #UD: destination and first source differ in rows"),
    "other-columns": (signal.SIGILL, "TDPBSSD at .*: #UD: destination and second source differ in columns"),
    "other-inner": (signal.SIGILL, "TDPBSSD at .*: #UD: the sources differ in their inner dimension"),
    "tile-left-out": (signal.SIGILL, "TILEZERO at .*: #UD: the configuration leaves this tile out"),
    "tile-left-out-of-product": (signal.SIGILL, "TDPBUUD at .*: #UD: the configuration leaves this tile out"),
    "same-tile-twice": (signal.SIGILL, "TDPBF16PS at .*: #UD: a tile is used twice"),
    "own-source": (signal.SIGILL, "TDPBUSD at .*: #UD: a tile is used twice"),
    "bad-address": (signal.SIGSEGV, ""),
    "other-instruction": (signal.SIGILL, ""),
    "sent": (signal.SIGILL, ""),
}


@pytest.fixture(scope="module")
def program(compile_c: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("amx_program") / "amx_program"
    compile_c("amx_program.c", out, *AMX)
    return out


@pytest.fixture(scope="module")
def program_library(compile_c: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("amx_program") / "libamx_program.so"
    compile_c("amx_program.c", out, *AMX, "-shared", "-fPIC")
    return out


def start(*command: object, **variables: object) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    added = {name: str(value) for name, value in variables.items()}
    words = [str(word) for word in command]
    return subprocess.run(words, env=inherited | added, capture_output=True, text=True, timeout=120)


@pytest.fixture
def preload(processor_has_amx: bool, amx_emulator: Path) -> Mapping[str, object]:
    """The variables that bring the emulator into a process."""
    if processor_has_amx:
        pytest.skip("this processor has AMX, so the emulator stands aside")
    return {"LD_PRELOAD": amx_emulator}


@pytest.fixture(params=["emulated", "native"])
def way(request: pytest.FixtureRequest, processor_has_amx: bool) -> Mapping[str, object]:
    """The variables for each way to run AMX."""
    if request.param == "emulated":
        return dict(request.getfixturevalue("preload"))
    if not processor_has_amx:
        pytest.skip("this processor lacks AMX")
    return {}


@pytest.mark.parametrize("what", ["products", "moves", "configs", "modes", "handlers", "threads", "count"])
def test_every_instruction_does_what_scalar_code_does(
    program: Path, way: Mapping[str, object], what: str
) -> None:
    done = start(program, what, **way)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


@pytest.mark.parametrize("case", FORBIDDEN)
def test_what_is_forbidden_ends_the_process(
    program: Path, way: Mapping[str, object], case: str, tmp_path: Path
) -> None:
    number, message = FORBIDDEN[case]
    done = start(program, "die", case, **way)
    assert done.returncode == -number
    if not way or not message:
        assert done.stderr == ""
    else:
        assert re.fullmatch(f"amx emulator: {message}\n", done.stderr)


def test_nothing_runs_without_the_emulator(program: Path, processor_has_amx: bool) -> None:
    if processor_has_amx:
        pytest.skip("this processor has AMX")
    assert start(program, "products").returncode == -signal.SIGILL


def test_each_process_reports_how_often_it_ran_each_instruction(
    program: Path, preload: Mapping[str, object], tmp_path: Path
) -> None:
    report = tmp_path / "report"
    for _ in range(2):
        assert start(program, "count", AMX_EMULATOR_REPORT=report, **preload).returncode == 0
    line = (
        "LDTILECFG 1 STTILECFG 1 TILERELEASE 1 TILEZERO 1 TILELOADD 3 TILELOADDT1 3 TILESTORED 1 "
        "TDPBSSD 6 TDPBSUD 3 TDPBUSD 12 TDPBUUD 15 TDPBF16PS 18\n"
    )
    assert report.read_text() == line * 2


class TestPython:
    """A library with AMX that Python loads, while Python has handlers of SIGILL of its own."""

    LOAD = "import ctypes, faulthandler, signal, sys; library = ctypes.CDLL(sys.argv[1]); "

    def test_a_loaded_library_sees_the_emulator(
        self, program_library: Path, preload: Mapping[str, object]
    ) -> None:
        code = self.LOAD + "print(library.sees_emulator())"
        assert start(sys.executable, "-c", code, program_library, **preload).stdout == "1\n"
        assert start(sys.executable, "-c", code, program_library).stdout == "0\n"

    def test_handlers_of_python_do_not_replace_the_emulator(
        self, program_library: Path, preload: Mapping[str, object]
    ) -> None:
        code = self.LOAD + (
            "faulthandler.enable(); "
            "a = library.run(b'products'); "
            "signal.signal(signal.SIGILL, lambda *ignored: None); "
            "b = library.run(b'products'); "
            "counts = ctypes.CDLL(None).bertrt_amx_executed; "
            "counts.restype = ctypes.c_long; "
            "print(a, b, counts(b'TDPBF16PS'), counts(b'TDPBSSD'), counts(b'NOP'))"
        )
        done = start(sys.executable, "-X", "faulthandler", "-c", code, program_library, **preload)
        assert (done.stdout, done.stderr) == ("0 0 120 120 -1\n", "")

    def test_faulthandler_still_reports_what_is_not_of_amx(
        self, program_library: Path, preload: Mapping[str, object]
    ) -> None:
        code = self.LOAD + "library.die(b'other-instruction')"
        done = start(sys.executable, "-X", "faulthandler", "-c", code, program_library, **preload)
        assert done.returncode == -signal.SIGILL
        assert "Fatal Python error: Illegal instruction" in done.stderr

    def test_a_python_handler_gets_a_signal_that_is_sent(self, preload: Mapping[str, object]) -> None:
        code = (
            "import os, signal; signal.signal(signal.SIGILL, lambda *ignored: print('caught')); "
            "os.kill(os.getpid(), signal.SIGILL); print(signal.getsignal(signal.SIGILL) is not None)"
        )
        done = start(sys.executable, "-c", code, **preload)
        assert (done.returncode, done.stdout) == (0, "caught\nTrue\n")


def test_the_kernels_run_on_amx(
    isa_environment: Callable[[str], dict[str, str]], processor_has_amx: bool, tmp_path: Path
) -> None:
    code = (
        "from bertrt import _native; "
        "assert _native.peak('int8', seconds=0.01) > 0 and _native.peak('float', seconds=0.01) > 0; "
        "print(_native.active_isa(), dict(_native.isa_status())['amx'] == '')"
    )
    environment = isa_environment("amx") | {"AMX_EMULATOR_REPORT": str(tmp_path / "report")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "amx True\n", "")
    if not processor_has_amx:
        words = (tmp_path / "report").read_text().split()
        counts = dict(zip(words[::2], map(int, words[1::2]), strict=True))
        assert counts["TDPBSSD"] > 0
        assert counts["TDPBF16PS"] > 0
