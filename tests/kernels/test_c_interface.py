"""The C interface: the example is compiled and run, and the library called as a C program calls it."""

from __future__ import annotations

import ctypes
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bertrt
from bertrt.tokenization import WordPieceTokenizer

native = pytest.importorskip("bertrt._native", reason="the native kernels are not built")

ROOT = Path(__file__).parents[2]
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"]
IDS = [2, 103, 400, 103, 17, 3]
OK, INVALID_ARGUMENT, NOT_FOUND, BAD_FILE, MISSING_HEAD, UNSUPPORTED = range(6)


class Error(ctypes.Structure):
    _fields_ = [("status", ctypes.c_int), ("message", ctypes.c_char * 512)]


class Options(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("threads", ctypes.c_int32),
        ("pin", ctypes.c_int32),
        ("verify", ctypes.c_int32),
        ("huge_pages", ctypes.c_int32),
    ]


class Architecture(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        *[(f"size_{index}", ctypes.c_int32) for index in range(7)],
        ("layer_norm_eps", ctypes.c_float),
        *[(name, ctypes.c_int32) for name in ("has_mlm", "has_nsp", "has_pooler")],
        ("hidden_act", ctypes.c_char * 16),
        ("precision", ctypes.c_char * 8),
    ]


class Batch(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("input_ids", ctypes.c_void_p),
        ("token_type_ids", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("offsets", ctypes.c_void_p),
        ("sequences", ctypes.c_int64),
    ]


class Request(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("mlm_positions", ctypes.c_void_p),
        ("mlm_count", ctypes.c_int64),
        ("mlm_logits", ctypes.c_void_p),
        ("top_k", ctypes.c_int64),
        ("top_ids", ctypes.c_void_p),
        ("top_log_probs", ctypes.c_void_p),
        ("candidates", ctypes.c_void_p),
        ("candidate_count", ctypes.c_int64),
        *[
            (name, ctypes.c_void_p)
            for name in ("candidate_log_probs", "hidden_states", "pooled", "nsp_logits", "layers")
        ],
        # What a later release may add.
        ("later", ctypes.c_void_p),
    ]


REQUEST_SIZE = Request.later.offset


@pytest.fixture(scope="module")
def folder(demo_engine: Callable[..., Path]) -> Path:
    return demo_engine("int8")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(Path(bertrt.get_library_dir()) / "libbertrt.so"))
    loaded.bertrt_version.restype = loaded.bertrt_isa.restype = ctypes.c_char_p
    loaded.bertrt_isa.argtypes = loaded.bertrt_threads.argtypes = loaded.bertrt_close.argtypes = [
        ctypes.c_void_p
    ]
    loaded.bertrt_close.restype = None
    loaded.bertrt_open.argtypes = [ctypes.c_char_p] + [ctypes.c_void_p] * 3
    loaded.bertrt_run.argtypes = [ctypes.c_void_p] * 4
    loaded.bertrt_get_architecture.argtypes = [ctypes.c_void_p] * 3
    return loaded


@pytest.fixture(scope="module")
def engine(library: ctypes.CDLL, folder: Path) -> Iterator[ctypes.c_void_p]:
    opened, error = ctypes.c_void_p(), Error()
    status = library.bertrt_open(str(folder).encode(), None, ctypes.byref(opened), ctypes.byref(error))
    assert status == OK, error.message
    yield opened
    library.bertrt_close(opened)


class Run:
    """A batch of one sequence, and a request for its hidden states; fields may be changed before the call."""

    def __init__(self, library: ctypes.CDLL, engine: ctypes.c_void_p) -> None:
        self.library, self.engine = library, engine
        self.ids = np.array(IDS, np.int32)
        self.segments = np.zeros(len(IDS), np.int32)
        self.offsets = np.array([0, len(IDS)], np.int64)
        self.hidden = np.zeros((len(IDS), 256), np.float32)
        self.batch = Batch(
            struct_size=ctypes.sizeof(Batch),
            input_ids=self.ids.ctypes.data,
            token_type_ids=self.segments.ctypes.data,
            tokens=len(IDS),
            offsets=self.offsets.ctypes.data,
            sequences=1,
        )
        self.request = Request(struct_size=REQUEST_SIZE, hidden_states=self.hidden.ctypes.data)
        self.error = Error(status=99, message=b"old")

    def __call__(self) -> tuple[int, str]:
        status = self.library.bertrt_run(
            self.engine, ctypes.byref(self.batch), ctypes.byref(self.request), ctypes.byref(self.error)
        )
        assert status == self.error.status
        return status, self.error.message.decode()


@pytest.fixture
def run(library: ctypes.CDLL, engine: ctypes.c_void_p) -> Run:
    return Run(library, engine)


@pytest.fixture(scope="module", params=["c99", "c11"])
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler (cc)")
    program = tmp_path_factory.mktemp("example") / "fill_mask"
    libraries = bertrt.get_library_dir()
    command = [compiler, f"-std={request.param}", *WARNINGS, f"-I{bertrt.get_include()}", "-o", str(program)]
    command += [str(ROOT / "kernels" / "examples" / "fill_mask.c")]
    command += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lbertrt", "-lm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def test_the_example_answers_as_the_engine_does(example: Path, folder: Path) -> None:
    mask_id = 103
    done = subprocess.run([example, folder, str(mask_id), *map(str, IDS)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    threads = native.Engine(str(folder / "model.bertrt")).threads
    masks = np.array([1, 3])
    answer = native.Engine(str(folder / "model.bertrt")).run(
        np.array(IDS, np.int32),
        np.zeros(len(IDS), np.int32),
        np.array([0, len(IDS)]),
        mlm_positions=masks,
        top_k=5,
        nsp=True,
        hidden_states=True,
    )
    expected = [f"bertrt {native.__version__}, {native.active_isa()}, {threads} threads"]
    for mask, ids, log_probs in zip(masks, answer["mlm_top_ids"], answer["mlm_top_log_probs"], strict=True):
        expected += [f"mask at {mask}"]
        expected += [f"  {token} {log_prob:.6f}" for token, log_prob in zip(ids, log_probs, strict=True)]
    expected += ["next sentence {:.6f} {:.6f}".format(*answer["nsp_logits"][0])]
    lines = done.stdout.splitlines()
    assert lines[: len(expected)] == expected
    # The sum of squares is rounded in another order here.
    lengths = [float(line.split()[-1]) for line in lines[len(expected) :]]
    assert lengths == pytest.approx(
        [math.hypot(*row) for row in answer["hidden_states"].astype(np.float64)], abs=2e-6
    )


def test_the_examples_own_command(folder: Path, tmp_path: Path) -> None:
    """What it says of itself: how it is built, and what it is asked."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler (cc)")
    text = (ROOT / "kernels" / "examples" / "fill_mask.c").read_text(encoding="utf-8")
    build = re.search(r"^ \*   (cc .*?)\n \* where", text, re.MULTILINE | re.DOTALL)
    asked = re.search(r"^ \*   fill_mask demo-engine ([\d ]+)$", text, re.MULTILINE)
    assert build
    assert asked
    line = build[1].replace("\\\n *", " ")
    line = line.replace("$(python ", f"$({shlex.quote(sys.executable)} ")
    line = line.replace("fill_mask.c", shlex.quote(str(ROOT / "kernels" / "examples" / "fill_mask.c")))
    environment = {**os.environ, "LIB": bertrt.get_library_dir()}
    subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environment, check=True)
    arguments = asked[1].split()
    done = subprocess.run(
        [tmp_path / "fill_mask", folder, *arguments], capture_output=True, text=True, check=True
    )
    tokenizer = WordPieceTokenizer.from_folder(folder)
    assert arguments[0] == str(tokenizer.mask_id)
    [[window]] = tokenizer.encode(["He opened the [MASK]."], max_length=16)
    assert arguments[1:] == [str(token) for token in window.input_ids]
    assert f"mask at {window.input_ids.tolist().index(tokenizer.mask_id)}\n" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "usage:"),
        (["FOLDER", "4"], 2, "usage:"),
        (["/nowhere", "4", "1"], 1, "there is no engine folder '/nowhere'"),
        (["FOLDER", "4", "12", "x"], 2, "'x' is not a token id"),
        (["FOLDER", "x", "12"], 2, "'x' is not a token id"),
        (["FOLDER", "4", "12", "8192"], 1, "input_ids[1] is 8192, but must be from 0 to 8191"),
    ],
)
def test_the_example_says_what_is_wrong(
    example: Path, folder: Path, arguments: list[str], status: int, message: str
) -> None:
    given = [str(folder) if argument == "FOLDER" else argument for argument in arguments]
    done = subprocess.run([example, *given], capture_output=True, text=True)
    assert done.returncode == status
    assert message in done.stderr


@pytest.mark.parametrize("standard", ["c++11", "c++20"])
def test_the_header_is_for_cpp_too(tmp_path: Path, standard: str) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler (c++)")
    source = tmp_path / "program.cpp"
    source.write_text(
        '#include "bertrt.h"\n'
        "int main() {\n"
        "  bertrt_options options = BERTRT_OPTIONS_INIT;\n"
        "  bertrt_architecture sizes = BERTRT_ARCHITECTURE_INIT;\n"
        "  bertrt_batch batch = BERTRT_BATCH_INIT;\n"
        "  bertrt_request request = BERTRT_REQUEST_INIT;\n"
        "  bool whole = options.struct_size == sizeof options && sizes.struct_size == sizeof sizes &&\n"
        "               batch.struct_size == sizeof batch && request.struct_size == sizeof request;\n"
        "  return whole && options.verify == 1 && bertrt_version()[0] == '0' ? 0 : 1;\n"
        "}\n",
        encoding="utf-8",
    )
    libraries, program = bertrt.get_library_dir(), tmp_path / "program"
    command = [compiler, f"-std={standard}", *WARNINGS, f"-I{bertrt.get_include()}", "-o", program, source]
    command += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lbertrt"]
    subprocess.run(command, check=True)
    subprocess.run([program], check=True)


def test_nothing_but_the_interface_is_exported() -> None:
    if shutil.which("nm") is None:
        pytest.skip("there is no nm (binutils)")
    path = Path(bertrt.get_library_dir()) / "libbertrt.so"
    done = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True)
    exported = {line.split()[-1] for line in done.stdout.splitlines()}
    header = (Path(bertrt.get_include()) / "bertrt.h").read_text(encoding="utf-8")
    declared = {
        word.partition("(")[0].lstrip("*")
        for line in header.splitlines()
        if line.startswith("BERTRT_API")
        for word in line.split()
        if "(" in word
    }
    assert exported == declared
    assert "bertrt_run" in exported


def test_a_run_gives_what_python_gives(run: Run, folder: Path) -> None:
    assert run() == (OK, "")
    python = native.Engine(str(folder / "model.bertrt"))
    assert np.array_equal(
        run.hidden, python.run(run.ids, run.segments, run.offsets, hidden_states=True)["hidden_states"]
    )


def test_the_sizes_of_an_engine(library: ctypes.CDLL, engine: ctypes.c_void_p) -> None:
    sizes, error = Architecture(struct_size=ctypes.sizeof(Architecture)), Error()
    assert library.bertrt_get_architecture(engine, ctypes.byref(sizes), ctypes.byref(error)) == OK
    assert [getattr(sizes, f"size_{index}") for index in range(7)] == [256, 4, 4, 1024, 8192, 512, 2]
    assert sizes.layer_norm_eps == np.float32(1e-12)
    assert (sizes.has_mlm, sizes.has_nsp, sizes.has_pooler) == (1, 1, 1)
    assert (sizes.hidden_act, sizes.precision) == (b"gelu", b"int8")
    sizes.struct_size = 8
    assert (
        library.bertrt_get_architecture(engine, ctypes.byref(sizes), ctypes.byref(error)) == INVALID_ARGUMENT
    )
    assert b"architecture.struct_size is 8" in error.message


def test_options(library: ctypes.CDLL, folder: Path) -> None:
    opened, error = ctypes.c_void_p(), Error()

    def open_with(**options: int) -> int:
        given = Options(**{"struct_size": ctypes.sizeof(Options), "verify": 1, **options})
        return int(
            library.bertrt_open(
                str(folder).encode(), ctypes.byref(given), ctypes.byref(opened), ctypes.byref(error)
            )
        )

    assert open_with(threads=3, pin=1) == OK
    assert library.bertrt_threads(opened) == 3
    assert library.bertrt_isa(opened).decode() == native.active_isa()
    library.bertrt_close(opened)
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    on = switch.exists() and "[never]" not in switch.read_text(encoding="ascii")
    assert open_with(huge_pages=1) == (OK if on else UNSUPPORTED)
    library.bertrt_close(opened)
    assert open_with(threads=-2) == INVALID_ARGUMENT
    assert opened.value is None
    assert b"threads is -2" in error.message
    assert open_with(struct_size=0) == INVALID_ARGUMENT
    assert b"options.struct_size is 0" in error.message


def test_a_request_of_a_later_release(run: Run) -> None:
    run.request.struct_size = ctypes.sizeof(Request)
    assert run() == (OK, "")
    run.request.later = 1
    status, message = run()
    assert status == UNSUPPORTED
    assert "request asks for what a later release than" in message


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("batch", "struct_size", 0, "batch.struct_size is 0"),
        ("request", "struct_size", REQUEST_SIZE - 8, "request.struct_size is"),
        ("request", "struct_size", 1 << 40, "request.struct_size is"),
        ("batch", "input_ids", None, "input_ids is null"),
        ("batch", "token_type_ids", None, "token_type_ids is null"),
        ("batch", "offsets", None, "offsets is null"),
        ("batch", "tokens", 0, "tokens is 0"),
        ("batch", "tokens", -1, "tokens is -1"),
        ("batch", "sequences", 0, "sequences is 0"),
        ("request", "mlm_count", -1, "mlm_count is -1"),
        ("request", "mlm_count", 1, "mlm_positions is null"),
        ("request", "candidate_count", -1, "candidate_count is -1"),
        ("request", "top_k", 8193, "top_k is 8193"),
        ("request", "mlm_count", 1 << 60, "more than can be addressed"),
    ],
)
def test_refusals(run: Run, part: str, field: str, value: int | None, message: str) -> None:
    setattr(getattr(run, part), field, value)
    status, said = run()
    assert status == INVALID_ARGUMENT
    assert message in said


@pytest.mark.parametrize("missing", ["top_ids", "top_log_probs", "candidates", "candidate_log_probs"])
def test_outputs_that_belong_together(run: Run, missing: str) -> None:
    positions, numbers = np.array([1]), np.zeros(4, np.int64)
    logs = np.zeros(4, np.float32)
    whole: dict[str, Any] = {
        "mlm_positions": positions.ctypes.data,
        "mlm_count": 1,
        "top_k": 2,
        "top_ids": numbers.ctypes.data,
        "top_log_probs": logs.ctypes.data,
        "candidate_count": 2,
        "candidates": np.zeros(2, np.int64).ctypes.data,
        "candidate_log_probs": logs.ctypes.data,
    }
    for name, value in whole.items():
        setattr(run.request, name, None if name == missing else value)
    assert run() == (INVALID_ARGUMENT, f"{missing} is null; give an array")


def test_null_everywhere(library: ctypes.CDLL, engine: ctypes.c_void_p, run: Run, folder: Path) -> None:
    library.bertrt_close(None)
    assert library.bertrt_isa(None) == b""
    assert library.bertrt_threads(None) == 0
    error, opened = Error(), ctypes.c_void_p()
    batch, request = ctypes.byref(run.batch), ctypes.byref(run.request)
    for name, call in {
        "engine": lambda: library.bertrt_run(None, batch, request, ctypes.byref(error)),
        "batch": lambda: library.bertrt_run(engine, None, request, ctypes.byref(error)),
        "request": lambda: library.bertrt_run(engine, batch, None, ctypes.byref(error)),
        "folder": lambda: library.bertrt_open(None, None, ctypes.byref(opened), ctypes.byref(error)),
        "architecture": lambda: library.bertrt_get_architecture(engine, None, ctypes.byref(error)),
    }.items():
        assert call() == INVALID_ARGUMENT
        assert error.message.decode() == f"{name} is null"
    assert library.bertrt_open(str(folder).encode(), None, None, None) == INVALID_ARGUMENT
    assert library.bertrt_run(engine, batch, request, None) == OK


def test_folders_that_are_no_engines(library: ctypes.CDLL, tmp_path: Path) -> None:
    opened, error = ctypes.c_void_p(1), Error()

    def open_folder(path: Path) -> tuple[int, str]:
        status = library.bertrt_open(str(path).encode(), None, ctypes.byref(opened), ctypes.byref(error))
        assert opened.value is None
        return status, error.message.decode()

    status, message = open_folder(tmp_path)
    assert status == NOT_FOUND
    assert "holds neither engine.json nor model.bertrt" in message
    (tmp_path / "engine.json").touch()
    status, message = open_folder(tmp_path)
    assert status == NOT_FOUND
    assert (
        "has no weights for the native backend (model.bertrt); export it again with --backend native"
        in message
    )
    assert open_folder(tmp_path / "engine.json")[0] == INVALID_ARGUMENT
    (tmp_path / "model.bertrt").write_bytes(b"not a weight file" * 100)
    assert open_folder(tmp_path)[0] == BAD_FILE
    # A message is cut to its 512 bytes, at the end of a character.
    status, message = open_folder(Path("/", *["\u00e4" * 100] * 4))
    assert status == NOT_FOUND
    assert 500 < len(message.encode()) < 512
