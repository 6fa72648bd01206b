"""Which backends there are, which of them can run here, and which one an engine gets."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from bertrt.backends.base import Backend
from bertrt.errors import BackendUnavailableError, InputError
from bertrt.folder import EngineFolder

# No machine of today has more processors; a larger number is a slip, and would start as many threads.
_MOST_THREADS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendStatus:
    """Whether a backend can run on this machine.

    Attributes:
        name: the backend.
        available: whether `create_backend` can make one.
        version: of the library beneath, if it is there.
        reason: why it is not available and what to install, else an empty string.
    """

    name: str
    available: bool
    version: str | None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    status: Callable[[], BackendStatus]
    create: Callable[[EngineFolder, int | None], Backend]


def backend_status() -> list[BackendStatus]:
    """The state of every backend, best first."""
    return [entry.status() for entry in _BACKENDS.values()]


def create_backend(name: str | None, folder: EngineFolder, threads: int | None = None) -> Backend:
    """Make the backend of a name, or the best one that works here.

    Args:
        name: a backend, or ``None`` for the first one that is available and has its files in the folder.
        folder: the engine.
        threads: of each run; by default the CPUs that the process may use.

    Raises:
        InputError: ``threads`` is less than 1.
        BackendUnavailableError: the named backend cannot run here, or the folder has no files for it.
        BackendRunError, ShapeMismatchError, ManifestError: the backend cannot load the engine.
    """
    if name is not None and name not in _BACKENDS:
        raise BackendUnavailableError(f"there is no backend {name!r}; there are {', '.join(_BACKENDS)}")
    if threads is not None and (type(threads) is not int or not 1 <= threads <= _MOST_THREADS):
        raise InputError(f"threads must be a whole number from 1 to {_MOST_THREADS}, got {threads!r}")
    reasons = []
    for candidate in [name] if name else list(_BACKENDS):
        status = _BACKENDS[candidate].status()
        if not status.available:
            reasons.append(f"{candidate}: {status.reason}")
        elif candidate not in folder.manifest.backends:
            held = (
                f"files for {', '.join(folder.manifest.backends)} only"
                if folder.manifest.backends
                else "none"
            )
            reasons.append(f"{candidate}: of the files that it needs the engine folder has {held}")
        else:
            return _BACKENDS[candidate].create(folder, threads)
    raise BackendUnavailableError(f"no backend can run this engine here ({'; '.join(reasons)})")


def _onnxruntime_status() -> BackendStatus:
    name = "onnxruntime"
    if importlib.util.find_spec(name) is None:
        reason = 'onnxruntime is not installed; pip install "bertrt[ort]"'
        return BackendStatus(name=name, available=False, version=None, reason=reason)
    try:
        version = str(importlib.import_module(name).__version__)
    except (ImportError, AttributeError) as error:
        reason = f'onnxruntime is installed but does not load ({error}); pip install --force-reinstall "bertrt[ort]"'
        return BackendStatus(name=name, available=False, version=None, reason=reason)
    return BackendStatus(name=name, available=True, version=version)


def _create_onnxruntime(folder: EngineFolder, threads: int | None) -> Backend:
    # Imported here: the package is heavy, and `import bertrt` shall not load it.
    from bertrt.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(folder, threads=threads)


_BACKENDS: dict[str, _Entry] = {
    "onnxruntime": _Entry(status=_onnxruntime_status, create=_create_onnxruntime),
}
