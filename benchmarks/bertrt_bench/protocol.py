"""How the parent and a worker talk: one JSON object a line, over pipes; arrays in ``.npy`` files. No pickle.

The parent writes a request, the worker answers it with one line; requests are::

    {"op": "open", "factory": "module:function", "setup": {...}}
        -> {"versions": {...}, "details": {...}, "threads": 2}
    {"op": "prepare", "index": 0, "case": {...}, "folder": PATH}    -> {"details": {...}, "threads": 2}
    {"op": "answer", "index": 0, "folder": PATH, "rows": 144}       -> {"arrays": [NAME, ...]}
    {"op": "time", "index": 0, "warmup": 1, "runs": 1, "seconds": 0.4}
        -> {"nanoseconds": [...], "idle": {"cpu_seconds": 0.0, "seconds": 1.5}}; idle of others' turns since its last
           one, null where it had none or was asked for anything else meanwhile
    {"op": "peak"}                                                  -> {"operations_per_second": 1e12}, or null

The worker answers when its threads have come to rest; ``"rested": false`` says that they would not.

A request that fails is answered with ``{"error": MESSAGE}``, and the worker goes on. It ends when its
standard input does.
"""

from __future__ import annotations

import json
import os
import selectors
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bertrt.errors import MeasurementError

# A million times of ten digits; whatever is longer is not an answer.
_LARGEST_LINE: Final = 16 << 20
_CHUNK: Final = 1 << 16


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as one line."""
    return json.dumps(message, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """The message of a line.

    Raises:
        MeasurementError: not a JSON object.
    """
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MeasurementError(f"a worker wrote a line that is not JSON: {line[:80]!r}") from error
    if not isinstance(message, dict):
        raise MeasurementError(f"a worker wrote a line that is not a JSON object: {line[:80]!r}")
    return message


class LineReader:
    """Reads lines from a pipe, each by a deadline.

    Args:
        descriptor: the pipe's reading end; the caller closes it.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer = bytearray()

    def read(self, seconds: float) -> bytes:
        """The next line, without its end.

        Raises:
            TimeoutError: it was not complete after so many seconds.
            EOFError: the other side closed the pipe.
            MeasurementError: the line is longer than any answer.
        """
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._descriptor, selectors.EVENT_READ)
            searched = 0
            while (end := self._buffer.find(b"\n", searched)) < 0:
                searched = len(self._buffer)
                if searched > _LARGEST_LINE:
                    raise MeasurementError(f"a worker wrote a line of more than {_LARGEST_LINE} bytes")
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                data = os.read(self._descriptor, _CHUNK)
                if not data:
                    raise EOFError
                self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line


def save_arrays(folder: Path, arrays: Mapping[str, npt.NDArray[Any]], *, rows: int) -> list[str]:
    """Write ``rows`` rows of each array (see `sample_rows`) for `load_arrays`; return the arrays' names."""
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", sample_rows(array, rows), allow_pickle=False)
    return list(arrays)


def load_arrays(folder: Path, names: object) -> dict[str, npt.NDArray[Any]]:
    """Read what `save_arrays` wrote.

    Raises:
        MeasurementError: a name that is no plain name, or a file that is not there or not an array.
    """
    if not isinstance(names, list) or not all(
        isinstance(name, str) and name.isidentifier() for name in names
    ):
        raise MeasurementError(f"a worker named its arrays {names!r}; expected a list of plain names")
    try:
        return {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in names}
    except (OSError, ValueError) as error:
        raise MeasurementError(f"cannot read a worker's answer: {error}") from error


def sample_rows(array: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    """At most ``rows`` rows of an array, evenly spaced, the first and the last among them.

    Which ones depends on the number of rows alone, so that all the arrays of an answer, and the answers of
    two contestants, keep the same ones.
    """
    if array.ndim == 0 or array.shape[0] <= rows:
        return array
    return array[np.linspace(0, array.shape[0] - 1, rows).astype(np.int64)]
