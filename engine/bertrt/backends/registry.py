"""Which backends there are, which of them can run here, and which one an engine gets."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from bertrt.backends import native
from bertrt.backends.base import Backend
from bertrt.errors import BackendUnavailableError, InputError, KernelsNotBuiltError
from bertrt.folder import EngineFolder

# No machine of today has more processors; a larger number is a slip, and would start as many threads.
_MOST_THREADS = 4096
# Not from its module, which loads the library.
_ONNXRUNTIME = "onnxruntime"


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendStatus:
    """Whether a backend can run on this machine.

    Attributes:
        name: the backend.
        available: whether `create_backend` can make one.
        version: of the library beneath, if it is there.
        reason: why it is not available and what to install, else an empty string.
        isa: the instruction set of its kernels, where it chooses one itself.
        blocked: whether it is there, but something is in its way that can be put right: kernels that do not
            load, or what the user asked of it through the environment. That is never a reason to take another
            backend instead.
    """

    name: str
    available: bool
    version: str | None
    reason: str = ""
    isa: str | None = None
    blocked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    status: Callable[[], BackendStatus]
    create: Callable[[EngineFolder, int | None], Backend]


def backend_status() -> list[BackendStatus]:
    """The state of every backend, best first."""
    return [entry.status() for entry in _BACKENDS.values()]


def backend_names() -> tuple[str, ...]:
    """Every backend, best first, whether it can run here or not."""
    return tuple(_BACKENDS)


def create_backend(
    name: str | None, folder: EngineFolder, threads: int | None = None, *, verify: bool = False
) -> Backend:
    """Make the backend of a name, or the best one that works here.

    Args:
        name: a backend, or ``None`` for the first one that is available and has its files in the folder.
        folder: the engine.
        threads: of each run; by default the CPUs that the process may use.
        verify: first compare the SHA-256 of the files that the backend reads, for a folder that was opened
            without.

    Raises:
        InputError: ``threads`` is less than 1.
        BackendUnavailableError: the named backend cannot run here, or the folder has no files for it. Also the
            best one when it is there but does not load, or cannot do what a variable asks of it
            (``BERTRT_ISA``, ``BERTRT_PIN_THREADS``): another one instead would be a surprise.
        BackendRunError, EngineFolderError: the backend cannot load the engine.
    """
    if name is not None and name not in _BACKENDS:
        raise BackendUnavailableError(f"there is no backend {name!r}; there are {', '.join(_BACKENDS)}")
    if threads is not None and (type(threads) is not int or not 1 <= threads <= _MOST_THREADS):
        raise InputError(f"threads must be a whole number from 1 to {_MOST_THREADS}, got {threads!r}")
    reasons, able = [], []
    candidates = [name] if name else list(_BACKENDS)
    for candidate in candidates:
        status = _BACKENDS[candidate].status()
        held_here = candidate in folder.manifest.backends
        if not status.available:
            if status.blocked and held_here:
                raise BackendUnavailableError(f"{candidate}: {status.reason}")
            reasons.append(f"{candidate}: {status.reason}")
        elif not held_here:
            held = (
                f"files for {', '.join(folder.manifest.backends)} only"
                if folder.manifest.backends
                else "none"
            )
            reasons.append(f"{candidate}: of the files that it needs the engine folder has {held}")
            able.append(candidate)
        else:
            if verify:
                folder.check(hashes=folder.manifest.backends[candidate].values())
            return _BACKENDS[candidate].create(folder, threads)
    lacking = [candidate for candidate in candidates if candidate in folder.manifest.backends]
    advice = [f"install what {' or '.join(lacking)} needs"] if lacking else []
    advice += [f"export the engine again with --backend {' or '.join(able)}"] if able else []
    advice = advice or [f"install what {' or '.join(candidates)} needs and export the engine again for it"]
    raise BackendUnavailableError(
        f"no backend can run this engine here ({'; '.join(reasons)}); {', or '.join(advice)}"
    )


def _native_status() -> BackendStatus:
    name = native.NAME
    try:
        version = str(native.load_kernels().__version__)
    except BackendUnavailableError as error:
        built = not isinstance(error, KernelsNotBuiltError)
        return BackendStatus(name=name, available=False, version=None, reason=str(error), blocked=built)
    try:
        isa = native.active_isa()
        native.pins_threads()
    except (BackendUnavailableError, InputError) as error:
        # The portable kernels run anywhere, so it is a variable that stands in the way.
        return BackendStatus(name=name, available=False, version=version, reason=str(error), blocked=True)
    return BackendStatus(name=name, available=True, version=version, isa=isa)


def _create_native(folder: EngineFolder, threads: int | None) -> Backend:
    return native.NativeBackend(folder, threads=threads)


def _onnxruntime_status() -> BackendStatus:
    name = _ONNXRUNTIME
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
    native.NAME: _Entry(status=_native_status, create=_create_native),
    _ONNXRUNTIME: _Entry(status=_onnxruntime_status, create=_create_onnxruntime),
}
