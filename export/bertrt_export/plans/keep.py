"""Putting plans into an engine's folder: all of a build or none, and never half of one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from bertrt.backends.registry import TENSORRT
from bertrt.errors import PlanBuildError
from bertrt.folder import EngineFolder, sha256, stamp
from bertrt.manifest import FileRecord, Manifest
from bertrt.plans import Plan

_PREFIX: Final = ".plans."


class Staging:
    """A folder inside the engine's in which plans lie until all are there.

    What a build that was killed has left there is removed by the next one.

    Args:
        folder: the engine.
        sources: the files that the plans are built of.
    """

    def __init__(self, folder: EngineFolder, sources: tuple[str, ...]) -> None:
        self._folder = folder
        self._sources = sources
        # From before the files are read.
        self._stamp = stamp(folder.path, sources)[-len(sources) :]
        self._path = folder.path / f"{_PREFIX}{secrets.token_hex(6)}"
        self._records: dict[str, tuple[str, FileRecord]] = {}
        self._owned = contextlib.ExitStack()

    def __enter__(self) -> Staging:
        try:
            with _locked(self._folder.path):
                for abandoned in self._folder.path.glob(f"{_PREFIX}*"):
                    with contextlib.suppress(BlockingIOError), _locked(abandoned, wait=False):
                        shutil.rmtree(abandoned, ignore_errors=True)
                self._path.mkdir()
                # For as long as this process lives, if it does not end the block.
                self._owned.enter_context(_locked(self._path))
        except OSError as error:
            raise _cannot_write(self._folder.path, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        self._owned.close()

    def add(self, part: str, data: Any) -> FileRecord:
        """Write the plan of a part; ``data`` is a buffer.

        Raises:
            PlanBuildError: the disk is full or read-only.
        """
        name = f"{part}.plan"
        path = self._path / name
        try:
            with path.open("xb") as file:
                file.write(memoryview(data))
                file.flush()
                os.fsync(file.fileno())
            record = FileRecord(size=path.stat().st_size, sha256=sha256(path))
        except OSError as error:
            raise _cannot_write(self._folder.path, error) from error
        self._records[part] = name, record
        return record

    def keep(self, plan: Plan) -> Manifest:
        """Put the plans in the place of older ones, and what is known about them into the manifest.

        The manifest loses the older plan first and gets the new one last: a reader at any moment, also after a
        crash, finds a whole plan or none, and then the engine says that it has to be built. A drift report of the
        older plan is not one of this plan: its summary goes too.

        Raises:
            PlanBuildError: the folder cannot be written; or its graphs are others by now.
        """
        try:
            with _locked(self._folder.path):
                return self._exchange(plan)
        except OSError as error:
            raise _cannot_write(self._folder.path, error) from error

    def _exchange(self, plan: Plan) -> Manifest:
        path, known = self._folder.path, self._folder.manifest.files
        there = EngineFolder.open(path, verify=False, plans=False)
        same = all(there.manifest.files.get(name) == known[name] for name in self._sources)
        if not same or stamp(path, self._sources)[-len(self._sources) :] != self._stamp:
            raise PlanBuildError(
                f"the engine {str(path)!r} was replaced while its plan was built; build it again"
            )
        names = {part: name for part, (name, _) in self._records.items()}
        bare = there.manifest.without_plan()
        there.replace_manifest(bare)
        for name in names.values():
            (self._path / name).replace(path / name)
        built = replace(
            bare,
            backends={**bare.backends, TENSORRT: names},
            files={**bare.files, **dict(self._records.values())},
            plan=plan,
        )
        there.replace_manifest(built)
        return built


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Let one process at a time be in the block; in that of an engine's folder none is for longer than some renames.

    Raises:
        BlockingIOError: another is, and this one shall not wait.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> PlanBuildError:
    return PlanBuildError(
        f"cannot write the plans to {str(path)!r}: {error.strerror or error}; make room, or choose an engine folder "
        "that can be written"
    )
