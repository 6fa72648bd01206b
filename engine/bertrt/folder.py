"""Engine folders on disk: opened with every check, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bertrt.errors import (
    EngineFolderError,
    EngineNotFoundError,
    ExportError,
    HashMismatchError,
    ManifestError,
    MissingFileError,
    UnsafePathError,
)
from bertrt.manifest import FileRecord, Manifest, safe_name

MANIFEST_NAME = "engine.json"
# A manifest is a few kilobytes; a larger file is not one, and is not read into memory.
_LARGEST_MANIFEST = 4 << 20
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class EngineFolder:
    """An engine folder whose manifest has been read and whose files have been checked."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> EngineFolder:
        """Open a folder.

        Args:
            path: the folder.
            verify: compare every file's SHA-256; otherwise presence and sizes only.

        Raises:
            EngineNotFoundError: no folder, or no ``engine.json`` in it.
            ManifestError, UnsupportedVersionError, UnsafePathError: see `Manifest.from_json`.
            MissingFileError, HashMismatchError: a file is not there, or not the one that was written.
        """
        root = Path(path)
        if not root.is_dir():
            raise EngineNotFoundError(
                f"there is no engine folder at {str(root)!r}; make one with 'bertrt export SOURCE {root}'"
            )
        try:
            with (root / MANIFEST_NAME).open("rb") as file:
                data = file.read(_LARGEST_MANIFEST + 1)
        except FileNotFoundError as error:
            raise EngineNotFoundError(
                f"{str(root)!r} has no {MANIFEST_NAME}, so it is not an engine folder; "
                f"a checkpoint becomes one with 'bertrt export {root} OUT'"
            ) from error
        except OSError as error:
            raise EngineFolderError(f"cannot read {root / MANIFEST_NAME}: {error.strerror}") from error
        if len(data) > _LARGEST_MANIFEST:
            raise ManifestError(f"{root / MANIFEST_NAME} is larger than {_LARGEST_MANIFEST} bytes")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ManifestError(f"{root / MANIFEST_NAME} is not UTF-8 ({error.reason})") from error
        folder = cls(root, Manifest.from_json(text))
        folder.check(hashes=verify)
        return folder

    def file(self, name: str) -> Path:
        """The path of a file that the manifest names.

        Raises:
            UnsafePathError: the file is a link that leaves the folder.
            MissingFileError: there is no such file.
        """
        path = self.path / safe_name(name)
        if not path.is_file():
            raise MissingFileError(
                f"{name!r} is missing from the engine folder {str(self.path)!r}; "
                "copy the folder again or export it anew"
            )
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise UnsafePathError(f"{name!r} in {str(self.path)!r} is a link that leaves the engine folder")
        return path

    def check(self, *, hashes: bool) -> None:
        """Compare the files with the manifest: presence and sizes, and the SHA-256 of each if ``hashes``.

        Raises:
            MissingFileError, HashMismatchError, UnsafePathError: as their names say.
        """
        for name, record in self.manifest.files.items():
            path = self.file(name)
            size = path.stat().st_size
            if size != record.size:
                raise HashMismatchError(
                    f"{name!r} in {str(self.path)!r} has {size} bytes, the manifest says {record.size}; "
                    "the file is truncated or was replaced: copy the folder again or export it anew"
                )
            if hashes and (found := sha256(path)) != record.sha256:
                raise HashMismatchError(
                    f"{name!r} in {str(self.path)!r} has SHA-256 {found[:16]}…, the manifest says "
                    f"{record.sha256[:16]}…; the file is corrupt or was replaced: "
                    "copy the folder again or export it anew"
                )

    def size(self) -> int:
        """Bytes of all files of the manifest."""
        return sum(record.size for record in self.manifest.files.values())

    def replace_manifest(self, manifest: Manifest) -> EngineFolder:
        """Write another manifest in place of this one, atomically."""
        write_file(self.path / MANIFEST_NAME, manifest.to_json().encode())
        return EngineFolder(self.path, manifest)


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Size and SHA-256 of every file below a folder, by its name relative to it."""
    return {
        path.relative_to(folder).as_posix(): FileRecord(size=path.stat().st_size, sha256=sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }


def write_file(path: Path, data: bytes) -> None:
    """Write a file beside its place and rename it, so that no reader sees half of it.

    Raises:
        OSError: the disk is full or read-only; nothing is left behind.
    """
    # Not tempfile: its files are private, and an engine's files shall follow the user's umask.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def write_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a new folder beside ``out`` to be filled; on success it takes the place of ``out``.

    When the block raises, or is interrupted, the folder is removed and ``out`` is as it was. An ``out`` that
    exists is replaced only with ``overwrite``, and only if it is an engine folder.

    Raises:
        ExportError: ``out`` exists, or its parent cannot be written.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link, which rename must replace
    _check_target(out, overwrite=overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.name}.{secrets.token_hex(6)}.partial")
        temporary.mkdir()
    except OSError as error:
        raise ExportError(
            f"cannot write beside {str(out)!r}: {error.strerror}; choose another place"
        ) from error
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _sync(path)
        _check_target(out, overwrite=overwrite)
        if out.is_dir():
            retired = temporary.with_suffix(".retired")
            out.replace(retired)
            try:
                temporary.replace(out)
            except BaseException:
                retired.replace(out)
                raise
            shutil.rmtree(retired, ignore_errors=True)
        else:
            temporary.replace(out)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ExportError(
            f"cannot write the engine to {str(out)!r}: {error.strerror or error}; nothing was left behind"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _check_target(out: Path, *, overwrite: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise ExportError(f"{str(out)!r} exists; choose another place or pass --overwrite (overwrite=True)")
    empty = out.is_dir() and not any(out.iterdir())
    if out.is_symlink() or not (empty or (out / MANIFEST_NAME).is_file()):
        raise ExportError(f"{str(out)!r} exists and is not an engine folder; it is not overwritten")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
