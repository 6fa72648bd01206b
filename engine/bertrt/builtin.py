"""Engines by name: built once into the user's cache folder by whatever package offers them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import cast

from bertrt.errors import EngineFolderError, ExportError
from bertrt.folder import MANIFEST_NAME, EngineFolder

# An entry point of this group is a callable that writes an engine folder to the path that it is given.
# The runtime finds the exporter through it and need not import it.
GROUP = "bertrt.builtin_engines"


def resolve(path: str | os.PathLike[str], *, verify: bool = True) -> Path:
    """Return the engine folder that a path or a built-in name means.

    An engine folder that is there wins. A name among the entry points of the group
    ``bertrt.builtin_engines`` means an engine in the user's cache folder, which is exported when it is not
    there or no longer opens. Processes that ask at once wait for one another, and one of them exports.
    Anything else is returned as it came.

    The cache folder is ``$BERTRT_CACHE``, else ``$XDG_CACHE_HOME/bertrt``, else ``~/.cache/bertrt``. An
    engine in it is kept for each release of BertRT, and for each ``version`` (a str) that the entry point may
    have as an attribute: it changes when another engine would be exported.

    Args:
        path: a folder or a name.
        verify: compare hashes when deciding whether the engine in the cache still opens.

    Raises:
        ExportError: the exporter is not installed or failed, or the cache folder cannot be written.
    """
    name = os.fspath(path)
    if os.path.isfile(os.path.join(name, MANIFEST_NAME)):  # noqa: PTH113,PTH118 - False for an impossible name
        return Path(name)
    # An editable installation beside another lists an entry point twice; they are the same.
    entry = next(iter(entry_points(group=GROUP, name=name)), None)
    if entry is None:
        return Path(name)
    from bertrt import __version__

    export = _load(entry)
    parts = (name, __version__, getattr(export, "version", None), "fp32")
    target = cache_folder() / "-".join(filter(None, parts))
    if _opens(target, verify=verify):
        return target
    try:
        with _locked(target.with_name(f".{target.name}.lock")):
            if not _opens(target, verify=verify):  # or else another process has just made it
                _export(name, export, target)
    except (OSError, ExportError) as error:
        # The exporter's own words name a folder that nobody asked for.
        cause = error.__cause__ if isinstance(error, ExportError) else error
        if not isinstance(cause, OSError):
            raise
        raise ExportError(
            f"cannot write the built-in engine {name!r} to the cache folder {str(target.parent)!r}: "
            f"{cause.strerror or cause}; set BERTRT_CACHE to a folder that can be written"
        ) from cause
    return target


def cache_folder() -> Path:
    """The folder in which built-in engines are kept; it need not exist.

    Raises:
        ExportError: the user has no home folder, and no variable names another.
    """
    if own := os.environ.get("BERTRT_CACHE"):
        return Path(own).absolute()
    # The XDG specification wants a relative path ignored.
    if (shared := os.environ.get("XDG_CACHE_HOME")) and Path(shared).is_absolute():
        return Path(shared) / "bertrt"
    try:
        return Path.home() / ".cache" / "bertrt"
    except RuntimeError as error:
        raise ExportError(
            "this user has no home folder to keep built-in engines in; set BERTRT_CACHE to a folder that can "
            "be written"
        ) from error


def _opens(folder: Path, *, verify: bool) -> bool:
    try:
        EngineFolder.open(folder, verify=verify)
    except EngineFolderError:
        return False
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file; the system frees the lock when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _load(entry: EntryPoint) -> Callable[[Path], object]:
    with _importing(entry.name):
        return cast(Callable[[Path], object], entry.load())


@contextlib.contextmanager
def _importing(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ExportError(
            f"the built-in engine {name!r} is made by the exporter, which cannot be imported here "
            f'({error}); install it with: pip install "bertrt[export]"'
        ) from error


def _export(name: str, export: Callable[[Path], object], target: Path) -> None:
    """Export beside the target and rename; only the holder of the lock is here."""
    # One fixed name: what a killed process left in it is swept away by the next.
    staging = target.with_name(f".{target.name}.partial")
    _remove(staging)
    staging.mkdir()
    try:
        made = staging / target.name
        with _importing(name):
            export(made)
        EngineFolder.open(made)
        _remove(target)
        made.replace(target)
    finally:
        _remove(staging)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
