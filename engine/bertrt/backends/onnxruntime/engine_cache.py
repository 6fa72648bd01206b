"""Where ONNX Runtime's TensorRT provider keeps the engines that it builds: whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

import onnxruntime

from bertrt.backends.onnxruntime.sessions import NAME
from bertrt.builtin import cache_folder
from bertrt.errors import BackendRunError, BackendUnavailableError, ExportError
from bertrt.folder import EngineFolder

# How the provider says that an engine in its cache was cut short, or is none.
_DAMAGED: Final = "could not deserialize engine from cache"

T = TypeVar("T")


def engine_cache(folder: EngineFolder, part: str, shapes: Sequence[str]) -> Path:
    """The place of a part's engines: in the user's cache folder, never in the engine folder.

    The provider names them by the graph without its weights, so that those of two models would be one file: the
    folder's name holds the hashes of both.

    Raises:
        BackendUnavailableError: there is no cache folder.
    """
    roles, files = folder.manifest.backends[NAME], folder.manifest.files
    key = [onnxruntime.__version__, *(files[roles[role]].sha256 for role in (part, "weights")), *shapes]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    with _writing():
        return cache_folder() / "onnxruntime-tensorrt" / name


def open_cached(path: Path, load: Callable[[Path], T]) -> T:
    """Load what reads engines from a folder, and builds and writes those that are not there.

    The provider writes an engine in its place, over minutes: who is killed meanwhile leaves half of one, which fails
    each later load. So it writes beside the place, and the folder is renamed when all is loaded. One that holds a
    damaged engine all the same is removed, and built once more. Of several processes one builds, and the others wait.

    Args:
        path: see `engine_cache`.
        load: given the folder.

    Raises:
        BackendUnavailableError: there is no such folder and none can be made.
        BertRTError: whatever ``load`` raises.
    """
    damaged = False
    if path.is_dir():
        try:
            return load(path)
        except BackendRunError as error:
            if _DAMAGED not in f"{error} {error.__cause__}":
                raise
            damaged = True
    staging = path.with_name(f".{path.name}.partial")
    with contextlib.ExitStack() as stack:
        with _writing():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(_locked(path.with_name(f".{path.name}.lock")))
            if damaged:
                shutil.rmtree(path, ignore_errors=True)
            if not path.is_dir():
                # What a killed process has left there goes.
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(mode=0o700)
        if path.is_dir():  # another process has built them
            return load(path)
        stack.callback(shutil.rmtree, staging, ignore_errors=True)
        loaded = load(staging)
        with _writing():
            staging.replace(path)
        return loaded


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file; the system frees the lock when the process ends, however it ends."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except (OSError, ExportError) as error:
        raise BackendUnavailableError(
            f"the engines that TensorRT builds have no folder to be kept in ({error}); set BERTRT_CACHE to a folder "
            "that can be written"
        ) from error
