"""Engine folders on disk: opened with every check, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from bertrt.errors import (
    BertRTError,
    EngineFolderError,
    EngineNotFoundError,
    ExportError,
    HashMismatchError,
    ManifestError,
    MissingFileError,
    UnsafePathError,
)
from bertrt.exchange import put_in_place, sync
from bertrt.manifest import FileRecord, Manifest, safe_name
from bertrt.plans import BUILT_BACKEND, rebuild_command

MANIFEST_NAME = "engine.json"
# A manifest is a few kilobytes; a larger file is not one, and is not read into memory.
_LARGEST_MANIFEST = 4 << 20
_CHUNK = 1 << 20
# What a reader of models or tokenizers takes from a folder by its name. Such a file is in the manifest, with
# its hash, or the folder is refused; a README beside it harms nobody.
_READ_BY_NAME = (".bertrt", ".onnx", ".onnx_data", ".json", ".bin", ".safetensors", "vocab.txt")
_REPORT = "drift.json"
# How often a folder is loaded that is replaced at that moment each time.
_ATTEMPTS = 3

_Built = TypeVar("_Built")
# Of the folder and of each file, what changes when another takes its place; None for what is not there.
Stamp = tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True, slots=True)
class EngineFolder:
    """An engine folder whose manifest has been read and whose files have been checked."""

    path: Path
    manifest: Manifest
    # From before the manifest and the files were read.
    _stamp: Stamp = field(default=(), compare=False, repr=False)
    # Whether plans are looked at.
    _plans: bool = field(default=True, compare=False, repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True, plans: bool = True) -> EngineFolder:
        """Open a folder.

        Args:
            path: the folder.
            verify: compare every file's SHA-256; otherwise presence and sizes only, and `check` compares
                those of the files that are going to be read.
            plans: look at TensorRT plans too; not for who builds new ones, which mends a folder that lacks them, or
                who runs the graphs. What is wrong with a plan is passed over then.

        Raises:
            EngineNotFoundError: no folder, or no ``engine.json`` in it.
            ManifestError, UnsupportedVersionError, UnsafePathError: see `Manifest.from_json`; a model or
                tokenizer file that the manifest does not list is a `ManifestError` too.
            MissingFileError, HashMismatchError: a file is not there, or not the one that was written.
            EngineFolderError: the folder or a file cannot be read.
        """
        root = Path(path)
        with _reading(root):
            before = stamp(root)
            manifest = Manifest.from_json(_read_manifest(root), plans=plans)
            folder = cls(root, manifest, before + stamp(root, manifest.files)[len(before) :], plans)
            folder.check(hashes=set(manifest.files) - folder._skipped() if verify else ())
            _check_unlisted(root, manifest)
        return folder

    def is_unchanged(self) -> bool:
        """Whether the manifest and its files are still those that `open` read, by inode, size and times."""
        return stamp(self.path, self.manifest.files) == self._stamp

    def file(self, name: str) -> Path:
        """The path of a file that the manifest names.

        Raises:
            UnsafePathError: the file is a link that leaves the folder.
            MissingFileError: there is no such file.
            EngineFolderError: the folder cannot be read.
        """
        path = self.path / safe_name(name)
        with _reading(self.path):
            if not path.is_file():
                raise MissingFileError(
                    f"{name!r} is missing from the engine folder {str(self.path)!r}; {self._advice(name)}"
                )
            if not path.resolve().is_relative_to(self.path.resolve()):
                raise UnsafePathError(
                    f"{name!r} in {str(self.path)!r} is a link that leaves the engine folder; put the file itself "
                    "there, or export the engine again"
                )
        return path

    def check(self, *, hashes: Iterable[str] = (), plans: bool | None = None) -> None:
        """Compare the files with the manifest: presence and sizes of all.

        Args:
            hashes: the files whose SHA-256 is compared too.
            plans: see `open`, and as it was told by default; those that are named in ``hashes`` are looked at in any
                case.

        Raises:
            MissingFileError, HashMismatchError, UnsafePathError: as their names say.
            EngineFolderError: a file cannot be read.
        """
        with _reading(self.path):
            self._compare(frozenset(hashes), self._skipped(plans))

    def _compare(self, hashed: frozenset[str], skipped: frozenset[str]) -> None:
        for name, record in self.manifest.files.items():
            if name in skipped - hashed:
                continue
            path = self.file(name)
            size = path.stat().st_size
            if size != record.size:
                raise HashMismatchError(
                    f"{name!r} in {str(self.path)!r} has {size} bytes, the manifest says {record.size}; "
                    f"the file is truncated or was replaced: {self._advice(name)}"
                )
            if name in hashed and (found := sha256(path)) != record.sha256:
                raise HashMismatchError(
                    f"{name!r} in {str(self.path)!r} has SHA-256 {found[:16]}…, the manifest says "
                    f"{record.sha256[:16]}…; the file is corrupt or was replaced: {self._advice(name)}"
                )

    def _skipped(self, plans: bool | None = None) -> frozenset[str]:
        return frozenset() if (self._plans if plans is None else plans) else self._plan_files()

    def _plan_files(self) -> frozenset[str]:
        """What only TensorRT reads."""
        backends = self.manifest.backends
        others = {
            name for backend in backends if backend != BUILT_BACKEND for name in backends[backend].values()
        }
        return frozenset(backends.get(BUILT_BACKEND, {}).values()) - others

    def _advice(self, name: str) -> str:
        plan = self.manifest.plan
        if plan is not None and name in self._plan_files():
            return f"build the plan again with: {rebuild_command(plan, self.path)}"
        return "copy the folder again or export it anew"

    def size(self) -> int:
        """Bytes of all files of the manifest."""
        return sum(record.size for record in self.manifest.files.values())

    def replace_manifest(self, manifest: Manifest) -> EngineFolder:
        """Write another manifest in place of this one, atomically."""
        write_file(self.path / MANIFEST_NAME, manifest.to_json().encode())
        return EngineFolder(self.path, manifest)


def load_whole(
    path: Path,
    build: Callable[[EngineFolder], _Built],
    *,
    discard: Callable[[_Built], object],
    plans: bool = True,
) -> _Built:
    """Open a folder and build something from its files, all of them those of one engine.

    The check and each reader open a file by its path, which may meanwhile mean another file. When the folder
    was replaced on the way, what came of it, an error too, is dropped, and all is done again, a few times.

    Args:
        path: the folder.
        build: makes the thing; it may read the files, and compares the hashes of those that it reads.
        discard: frees one that was built of a folder that has been replaced.
        plans: see `EngineFolder.open`.

    Raises:
        EngineFolderError: see `EngineFolder.open`; also for a folder that was replaced each time.
        BertRTError: whatever ``build`` raises.
    """
    cause: BertRTError | None = None
    for _ in range(_ATTEMPTS):
        before, folder = stamp(path), None
        try:
            folder = EngineFolder.open(path, verify=False, plans=plans)
            built = build(folder)
        except BertRTError as error:
            if folder.is_unchanged() if folder else stamp(path) == before:
                raise
            cause = error
            continue
        if folder.is_unchanged():
            return built
        discard(built)
    raise EngineFolderError(
        f"the folder was replaced while it was loaded: {str(path)!r}, {_ATTEMPTS} times in a row; "
        "load it when nothing writes it any more"
    ) from cause


def stamp(folder: Path, names: Iterable[str] = ()) -> Stamp:
    """What tells a folder, its manifest and the named files from their replacements, without reading them.

    A folder that takes the place of another has another inode; a file, another inode, size or time.
    """
    found: list[tuple[int, ...] | None] = []
    for path in (folder, folder / MANIFEST_NAME, *(folder / name for name in names)):
        try:
            status = path.stat()
        except (OSError, ValueError):
            found.append(None)
            continue
        identity: tuple[int, ...] = (status.st_dev, status.st_ino)
        if path != folder:  # whose times change with every report that is put into it
            identity += (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        found.append(identity)
    return tuple(found)


def _read_manifest(root: Path) -> str:
    path = root / MANIFEST_NAME
    if not _is_there(root) or not root.is_dir():
        raise EngineNotFoundError(
            f"there is no engine folder at {str(root)!r}; make one with 'bertrt export SOURCE {root}'"
        )
    if not _is_there(path):
        raise EngineNotFoundError(
            f"{str(root)!r} has no {MANIFEST_NAME}, so it is not an engine folder; "
            f"a checkpoint becomes one with 'bertrt export {root} OUT'"
        )
    if not path.is_file():  # to open a pipe is to wait for ever
        raise EngineFolderError(f"{str(path)!r} is not a file; export the engine again")
    with path.open("rb") as file:
        data = file.read(_LARGEST_MANIFEST + 1)
    if len(data) > _LARGEST_MANIFEST:
        raise ManifestError(
            f"{str(path)!r} is larger than {_LARGEST_MANIFEST} bytes, so bertrt has not written it; export the engine "
            "again"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{str(path)!r} is not UTF-8 ({error.reason}): it was damaged or edited; export the engine again"
        ) from error


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a NUL in the name
        return False
    return True


def _check_unlisted(root: Path, manifest: Manifest) -> None:
    for path in sorted(root.iterdir()):
        name = path.name
        if (
            name.endswith(_READ_BY_NAME)
            and not name.startswith(".")
            and name not in {MANIFEST_NAME, _REPORT, *manifest.files}
            and not path.is_dir()
        ):
            raise ManifestError(
                f"{name!r} in {str(root)!r} is not among the manifest's 'files', so nobody vouches for it; "
                "remove it or export the engine again"
            )


@contextlib.contextmanager
def _reading(root: Path) -> Iterator[None]:
    """Turn what the system says into an error of ours."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(
            f"{str(error.filename or root)!r} vanished while the engine folder {str(root)!r} was read; "
            "try again when nothing else writes it"
        ) from error
    except OSError as error:
        raise EngineFolderError(
            f"cannot read {str(error.filename or root)!r}: {error.strerror or error}; "
            "check the path and its permissions"
        ) from error


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
    exists is replaced only with ``overwrite``, and only if it is an engine folder: at one stroke, so that at any
    moment, also after a crash, the old one is there or the new one (see `bertrt.exchange`).

    Raises:
        ExportError: ``out`` exists, or its parent cannot be written.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link, which rename must replace
    check_target(out, overwrite=overwrite)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(6)}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(
            f"cannot write beside {str(out)!r}: {error.strerror}; choose another place"
        ) from error
    try:
        temporary.mkdir()
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            if path.is_file() or path.is_dir():
                sync(path)
        check_target(out, overwrite=overwrite)
        if out.is_dir():
            retired = temporary.with_suffix(".retired")
            put_in_place(temporary, out, retired)
            shutil.rmtree(retired, ignore_errors=True)
        else:
            temporary.replace(out)
            sync(out.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ExportError(
            f"cannot write the engine to {str(out)!r}: {error.strerror or error}; nothing was left behind"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_target(out: Path, *, overwrite: bool) -> None:
    """See to it that an engine folder may be written at ``out``.

    Raises:
        ExportError: see `write_folder`.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise ExportError(f"{str(out)!r} exists; choose another place or pass --overwrite (overwrite=True)")
    empty = out.is_dir() and not any(out.iterdir())
    if out.is_symlink() or not (empty or (out / MANIFEST_NAME).is_file()):
        raise ExportError(f"{str(out)!r} exists and is not an engine folder; it is not overwritten")
