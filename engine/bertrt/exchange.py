"""Putting a folder in the place of another at one stroke, where the system can."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Final

# Of linux/fcntl.h and linux/fs.h.
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
# An old kernel or another system, or a file system that cannot.
_CANNOT: Final = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})


def put_in_place(new: Path, place: Path, retired: Path) -> None:
    """Rename ``new`` to ``place``, and what is there to ``retired``; killed at any moment, one of the two is there.

    A file system that exchanges no names has a moment between two renames at which there is neither.

    Args:
        new: a folder whose files are on the disk.
        place: a folder beside it.
        retired: a name beside them that is free.

    Raises:
        OSError: as a rename does; ``place`` is as it was.
    """
    try:
        _exchange(new, place)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        place.replace(retired)
        try:
            new.replace(place)
        except BaseException:
            retired.replace(place)
            raise
    else:
        new.replace(retired)
    sync(place.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> None:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:  # musl has had it since 1.2.4 only
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    names = _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other)
    if rename(*names, _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))
