"""The safetensors format: reading one tensor at a time, and writing a file without holding it in memory.

A file is the length of the header (8 bytes, little-endian), the header (JSON: for each tensor ``dtype``,
``shape`` and ``data_offsets`` from the header's end; optionally ``__metadata__``), and the data:
little-endian, row by row, without holes or overlaps (https://github.com/huggingface/safetensors, "Format").
The package of that name reads bfloat16 only with a framework that has the type, and writes only what is in
memory; hence this module.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bertrt.backends.base import Float32
from bertrt.errors import CheckpointError, CorruptCheckpointError
from bertrt_export.checkpoints.store import TensorInfo, quote

# Size in bytes and NumPy's name of each type of the format; rarer ones are refused as unknown.
_TYPES = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U64": (8, "uint64"),
    "U32": (4, "uint32"),
    "U16": (2, "uint16"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E4M3": (1, "float8_e4m3"),
}
_LENGTH_BYTES = 8
# BERT-large has a header of 50 kB. The format's own limit of 100 MB would cost a gigabyte of memory.
_LARGEST_HEADER = 16 << 20
_LARGEST_RANK = 8
_LARGEST_NUMBER = (1 << 63) - 1
_GIT_LFS = b"version https://git-lfs"


class SafetensorsFile:
    """The tensors of one file. Each read opens it anew, so that any thread may read and nothing stays open.

    Raises:
        CorruptCheckpointError: the file is not safetensors, or ends too early.
        CheckpointError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = file.read(_LENGTH_BYTES)
                length = int.from_bytes(head, "little")
                if len(head) < _LENGTH_BYTES or length > size - _LENGTH_BYTES or length > _LARGEST_HEADER:
                    if (head + file.read(len(_GIT_LFS))).startswith(_GIT_LFS):
                        raise self._corrupt("is a Git LFS pointer without the data; run 'git lfs pull'")
                    raise self._corrupt(
                        f"has {size} bytes and claims a header of {length}: not safetensors, or truncated"
                    )
                header = file.read(length)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        self._start = _LENGTH_BYTES + length
        self._offsets: dict[str, int] = {}
        self._infos = self._parse(header, size - self._start)

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Shape and type of each tensor by its stored name."""
        return self._infos

    def read(self, name: str) -> Float32:
        """Read a tensor of a float type of at most 32 bits, widened to float32.

        Raises:
            CorruptCheckpointError: the file has become shorter since it was opened.
            CheckpointError: the file cannot be read any more.
        """
        info = self._infos[name]
        stored = np.dtype({"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}[info.dtype])
        values = np.empty(info.shape, stored)
        view = values.reshape(-1).view(np.uint8).data
        try:
            with self._path.open("rb", buffering=0) as file:
                file.seek(self._start + self._offsets[name])
                done = 0
                # One read gives at most 2 GiB.
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise self._corrupt(f"ends within {name!r}; it was changed while it was being read")
                    done += count
        except OSError as error:
            raise CheckpointError(f"cannot read {self._path}: {error.strerror}") from error
        if info.dtype == "bfloat16":
            # A bfloat16 is the upper half of a float32.
            wide = values.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        return values.astype(np.float32, copy=False)

    def close(self) -> None:
        """Nothing is open between reads."""

    def _parse(self, header: bytes, data_size: int) -> dict[str, TensorInfo]:
        try:
            entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise self._corrupt(f"has a header that is not JSON ({error})") from error
        if not isinstance(entries, dict):
            raise self._corrupt("has a header that is not a JSON object")
        entries.pop("__metadata__", None)
        infos: dict[str, TensorInfo] = {}
        spans: list[tuple[int, int]] = []
        for name, entry in entries.items():
            try:
                dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
                numbers = [*shape, begin, end]
            except (TypeError, KeyError, ValueError) as error:
                raise self._corrupt(f"has a broken header entry for {quote(name)}") from error
            if (
                any(type(number) is not int or not 0 <= number <= _LARGEST_NUMBER for number in numbers)
                or len(shape) > _LARGEST_RANK
                or not isinstance(dtype, str)
                or dtype not in _TYPES
            ):
                raise self._corrupt(
                    f"has a broken header entry for {quote(name)}: {quote(dtype)} of shape {quote(shape)}"
                )
            width, kind = _TYPES[dtype]
            if end - begin != math.prod(shape) * width:
                raise self._corrupt(
                    f"gives {end - begin} bytes to {quote(name)}, {dtype} of shape {tuple(shape)} needs "
                    f"{math.prod(shape) * width}"
                )
            infos[name] = TensorInfo(shape=tuple(shape), dtype=kind)
            self._offsets[name] = begin
            spans.append((begin, end))
        position = 0
        for begin, end in sorted(spans):
            if begin != position:
                raise self._corrupt(
                    f"has tensors that overlap or leave a hole at byte {position} of the data"
                )
            position = end
        if position != data_size:
            raise self._corrupt(f"has {data_size} bytes of data, its header describes {position}")
        return infos

    def _corrupt(self, what: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{self._path} {what}; get the file anew")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], tensor: Callable[[str], Float32]
) -> None:
    """Write float32 tensors, asking for one at a time.

    Args:
        path: the file, which must not exist.
        shapes: of the tensors by name, in the order in which they are written.
        tensor: gives a tensor by its name.

    Raises:
        OSError: the file exists or cannot be written; what was written of it stays.
    """
    # transformers refuses a file that does not say which framework laid out its tensors.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # The data shall begin at a multiple of 8, so that whoever maps the file finds its floats aligned.
    text += b" " * (-len(text) % _LENGTH_BYTES)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little"))
        file.write(text)
        for name in header:
            if name != "__metadata__":
                file.write(np.ascontiguousarray(tensor(name), dtype="<f4").data)
