"""A build of ``libbertrt.so``, called through its C interface; several can be loaded into one process."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bertrt.errors import BertRTError, InputError

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

_LIBRARY: Final = "libbertrt.so"


class _Error(ctypes.Structure):
    _fields_ = [("status", ctypes.c_int), ("message", ctypes.c_char * 512)]


class _Options(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        *[(name, ctypes.c_int32) for name in ("threads", "pin", "verify", "huge_pages")],
    ]


class _Architecture(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("hidden_size", ctypes.c_int32),
        ("inner_sizes", ctypes.c_int32 * 3),
        ("vocab_size", ctypes.c_int32),
        ("max_position_embeddings", ctypes.c_int32),
        ("type_vocab_size", ctypes.c_int32),
        ("layer_norm_eps", ctypes.c_float),
        ("heads", ctypes.c_int32 * 3),
        ("hidden_act", ctypes.c_char * 16),
        ("precision", ctypes.c_char * 8),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("input_ids", ctypes.c_void_p),
        ("token_type_ids", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("offsets", ctypes.c_void_p),
        ("sequences", ctypes.c_int64),
    ]


class _Request(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("mlm_positions", ctypes.c_void_p),
        ("mlm_count", ctypes.c_int64),
        ("mlm_logits", ctypes.c_void_p),
        ("top_k", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("top_ids", "top_log_probs", "candidates")],
        ("candidate_count", ctypes.c_int64),
        *[
            (name, ctypes.c_void_p)
            for name in ("candidate_log_probs", "hidden_states", "pooled", "nsp_logits", "layers")
        ],
    ]


def build(sources: Path, folder: Path) -> Path:
    """Compile the sources that hold ``kernels/``, as a release is compiled; give the library.

    Raises:
        BertRTError: the compiler refused them.
        OSError: CMake or ninja is not there (``pip install "bertrt[dev]"``).
    """
    configure = [
        "cmake",
        "-S",
        str(sources / "kernels"),
        "-B",
        str(folder),
        "-G",
        "Ninja",
        "-DBERTRT_PYTHON=OFF",
    ]
    for command in (configure, ["cmake", "--build", str(folder), "--target", "bertrt"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the paths are ours
        if done.returncode != 0:
            raise BertRTError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return folder / _LIBRARY


class Library:
    """A loaded build with an engine open.

    Args:
        path: of the library.
        engine: an engine folder with native weights.
        threads: of each run.

    Raises:
        InputError: the engine cannot be opened.
        OSError: the library cannot be loaded.
    """

    def __init__(self, path: Path, engine: str, threads: int) -> None:
        # Symbols of one build must not answer for those of another.
        self._library = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_NOW)
        self._library.bertrt_isa.restype = ctypes.c_char_p
        self._engine = ctypes.c_void_p()
        options = _Options(ctypes.sizeof(_Options), threads, 0, 0, 0)
        self._check(
            self._library.bertrt_open, os.fsencode(engine), ctypes.byref(options), ctypes.byref(self._engine)
        )
        architecture = _Architecture(ctypes.sizeof(_Architecture))
        self._check(self._library.bertrt_get_architecture, self._engine, ctypes.byref(architecture))
        self.hidden_size = int(architecture.hidden_size)
        self.vocab_size = int(architecture.vocab_size)
        self.longest = int(architecture.max_position_embeddings)

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return bytes(self._library.bertrt_isa(self._engine)).decode()

    def prepare(self, ids: Int32) -> tuple[Callable[[], None], Float32]:
        """A call without arguments that computes the hidden states of ``ids`` [batch, sequence], and where they appear.

        The states are ``[batch x sequence, hidden_size] float32``.
        """
        segments = np.zeros_like(ids)
        offsets = np.arange(len(ids) + 1, dtype=np.int64) * ids.shape[1]
        states = np.zeros((ids.size, self.hidden_size), dtype=np.float32)
        batch = _Batch(
            struct_size=ctypes.sizeof(_Batch),
            input_ids=ids.ctypes.data,
            token_type_ids=segments.ctypes.data,
            tokens=ids.size,
            offsets=offsets.ctypes.data,
            sequences=len(ids),
        )
        request = _Request(struct_size=ctypes.sizeof(_Request), hidden_states=states.ctypes.data)
        arguments = (self._engine, ctypes.byref(batch), ctypes.byref(request))

        # The default value keeps the arrays alive.
        def run(_kept: tuple[Any, ...] = (ids, segments, offsets, states)) -> None:
            self._check(self._library.bertrt_run, *arguments)

        return run, states

    def close(self) -> None:
        """Close the engine; the library stays loaded, as its threads do."""
        self._library.bertrt_close(self._engine)
        self._engine = ctypes.c_void_p()

    @staticmethod
    def _check(function: Any, *arguments: Any) -> None:
        error = _Error()
        if function(*arguments, ctypes.byref(error)) != 0:
            raise InputError(error.message.decode(errors="replace"))
