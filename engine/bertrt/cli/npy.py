"""A two-dimensional ``.npy`` file, written row by row, of a length that is known only at the end."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import struct
from pathlib import Path
from types import TracebackType
from typing import Final

from bertrt.backends.base import Float32
from bertrt.errors import InputError

# Magic, version 1.0, length of the rest of the header (https://numpy.org/doc/stable/reference/generated/
# numpy.lib.format.html). 128 bytes in all leave room for any shape, so that the real one can be written over
# the first one; and the data after them is aligned to 64.
_HEADER_BYTES: Final = 128
_MAGIC: Final = b"\x93NUMPY\x01\x00"


class NpyWriter:
    """Writes beside the place and renames at the end; an exception leaves nothing behind.

    Args:
        path: of the file, which is replaced if it is there.

    Attributes:
        rows: written so far.
        columns: of the array; 0 before the first rows.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
        try:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            self._file = self._temporary.open("xb")
        except OSError as error:
            raise InputError(f"cannot write {str(path)!r}: {error.strerror}; choose another place") from error
        self.rows = 0
        self.columns = 0

    def write(self, rows: Float32) -> None:
        """Append ``[rows, columns] float32``.

        Raises:
            OSError: the disk is full.
        """
        if not self.columns:
            self.columns = int(rows.shape[1])
            self._file.write(bytes(_HEADER_BYTES))
        self._file.write(rows.astype("<f4", order="C", copy=False).data)
        self.rows += int(rows.shape[0])

    def __enter__(self) -> NpyWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._file.seek(0)
                self._file.write(_header(self.rows, self.columns))
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if kind is None:
                self._temporary.replace(self._path)
        finally:
            with contextlib.suppress(OSError):
                self._file.close()
            with contextlib.suppress(OSError):
                self._temporary.unlink()


def _header(rows: int, columns: int) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}"
    length = _HEADER_BYTES - len(_MAGIC) - 2
    return _MAGIC + struct.pack("<H", length) + text.ljust(length - 1).encode("ascii") + b"\n"
