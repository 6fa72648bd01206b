"""Which backends there are, which of them can run here, and which one an engine gets."""

from __future__ import annotations

import importlib
import importlib.util
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from bertrt.backends import native
from bertrt.backends.base import Backend
from bertrt.backends.placement import Placement, Provider
from bertrt.errors import BackendUnavailableError, InputError, KernelsNotBuiltError
from bertrt.folder import EngineFolder
from bertrt.plans import Plan

# Not from their modules, which load the libraries.
ONNXRUNTIME: Final = "onnxruntime"
TENSORRT: Final = "tensorrt"


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendStatus:
    """Whether a backend can run on this machine.

    Attributes:
        name: the backend.
        available: whether `create_backend` can make one.
        version: of the library beneath, if it is there.
        reason: why it is not available and what to install, else an empty string.
        isa: the instruction set of its kernels, where it chooses one itself.
        blocked: whether it is there, but something is in its way that can be put right: kernels or a library that
            do not load, a driver that is too old, or what the user asked of it through the environment. That is never
            a reason to take another backend instead.
    """

    name: str
    available: bool
    version: str | None
    reason: str = ""
    isa: str | None = None
    blocked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    # Of a folder's plan, where that is what the backend would run.
    status: Callable[[Plan | None], BackendStatus]
    create: Callable[[EngineFolder, Placement], Backend]


def backend_status() -> list[BackendStatus]:
    """The state of every backend, best first."""
    return [entry.status(None) for entry in _BACKENDS.values()]


def backend_names() -> tuple[str, ...]:
    """Every backend, best first, whether it can run here or not."""
    return tuple(_BACKENDS)


def create_backend(
    name: str | None,
    folder: EngineFolder,
    threads: int | None = None,
    *,
    provider: str | None = None,
    devices: Iterable[int] | None = None,
    verify: bool = False,
) -> Backend:
    """Make the backend of a name, or the best one that works here.

    Args:
        name: a backend, or ``None`` for the first one that is available and has its files in the folder.
        folder: the engine.
        threads: of each run; by default the CPUs that the process may use.
        provider: of ONNX Runtime: ``cpu``, ``cuda`` or ``tensorrt``; by default the best that works here.
        devices: GPUs by number, one worker each; by default the first.
        verify: first compare the SHA-256 of the files that the backend reads, for a folder that was opened
            without.

    Raises:
        InputError: threads, provider or devices are out of range, or do not suit the backend.
        BackendUnavailableError: the named backend cannot run here, or the folder has no files for it. Also the
            best one when it is there but does not load, the driver beneath is too old, or it cannot do what a
            variable asks of it (``BERTRT_ISA``, ``BERTRT_PIN_THREADS``, ``BERTRT_HUGE_PAGES``): another one instead
            would be a surprise.
        BackendRunError, EngineFolderError: the backend cannot load the engine.
    """
    placement = Placement.make(threads=threads, provider=provider, devices=devices)
    chosen = choose_backend(name, folder, placement)
    if verify:
        folder.check(hashes=folder.manifest.backends[chosen].values())
    return _BACKENDS[chosen].create(folder, placement)


def choose_backend(name: str | None, folder: EngineFolder, placement: Placement) -> str:
    """Which backend `create_backend` makes.

    Raises:
        InputError, BackendUnavailableError: as `create_backend`.
    """
    if name is not None and name not in _BACKENDS:
        raise BackendUnavailableError(f"there is no backend {name!r}; there are {', '.join(_BACKENDS)}")
    if name is not None:
        _check_placement(name, placement)
    reasons, able = [], []
    candidates = [name] if name else _suitable(placement)
    for candidate in candidates:
        status = _BACKENDS[candidate].status(folder.manifest.plan)
        held_here = candidate in folder.manifest.backends
        if not status.available:
            if status.blocked and held_here and not _lacks_plan(candidate, folder):
                raise BackendUnavailableError(f"{candidate}: {status.reason}{_instead(candidate, name)}")
            reasons.append(f"{candidate}: {status.reason}")
        elif not held_here:
            held = (
                f"files for {', '.join(folder.manifest.backends)} only"
                if folder.manifest.backends
                else "none"
            )
            reasons.append(f"{candidate}: of the files that it needs the engine folder has {held}")
            able.append(candidate)
        elif _lacks_plan(candidate, folder):
            build = f"bertrt build {shlex.quote(str(folder.path))}"
            reasons.append(f"{candidate}: the plan has not been built yet; build it with: {build}")
        else:
            return candidate
    lacking = [candidate for candidate in candidates if candidate in folder.manifest.backends]
    advice = [f"install what {' or '.join(lacking)} needs"] if lacking else []
    advice += [_export_advice(able)] if able else []
    advice = advice or [f"install what {' or '.join(candidates)} needs and export the engine again for it"]
    raise BackendUnavailableError(
        f"no backend can run this engine here ({'; '.join(reasons)}); {', or '.join(advice)}"
    )


def _lacks_plan(candidate: str, folder: EngineFolder) -> bool:
    return candidate == TENSORRT and folder.manifest.plan is None


def _instead(candidate: str, name: str | None) -> str:
    """What to do where a blocked backend cannot be put right."""
    return (
        f'; or name the backend {ONNXRUNTIME} (backend="{ONNXRUNTIME}")'
        if candidate == TENSORRT and not name
        else ""
    )


def _export_advice(able: list[str]) -> str:
    options = ["--target tensorrt"] if TENSORRT in able else []
    names = [name for name in able if name != TENSORRT]
    options += [f"--backend {' or '.join(names)}"] if names else []
    return f"export the engine again with {' or '.join(options)}"


def _suitable(placement: Placement) -> list[str]:
    """The backends that can do what a placement asks for, best first."""
    if placement.provider is not None:
        return [ONNXRUNTIME]
    return [TENSORRT, ONNXRUNTIME] if placement.devices else list(_BACKENDS)


def _check_placement(name: str, placement: Placement) -> None:
    if name != ONNXRUNTIME and placement.provider is not None:
        raise InputError(f"a provider is the backend {ONNXRUNTIME}'s; leave it out for {name}")
    if name == native.NAME and placement.devices:
        raise InputError(
            f"the backend {name} computes on processors; devices are for {TENSORRT} and {ONNXRUNTIME}"
        )


def _native_status(_plan: Plan | None) -> BackendStatus:
    name = native.NAME
    try:
        version = str(native.load_kernels().__version__)
    except BackendUnavailableError as error:
        built = not isinstance(error, KernelsNotBuiltError)
        return BackendStatus(name=name, available=False, version=None, reason=str(error), blocked=built)
    try:
        isa = native.active_isa()
        native.pins_threads()
        native.takes_huge_pages()
    except (BackendUnavailableError, InputError) as error:
        # The portable kernels run anywhere, so it is a variable that stands in the way.
        return BackendStatus(name=name, available=False, version=version, reason=str(error), blocked=True)
    return BackendStatus(name=name, available=True, version=version, isa=isa)


def _create_native(folder: EngineFolder, placement: Placement) -> Backend:
    return native.NativeBackend(folder, threads=placement.threads)


def _tensorrt_status(plan: Plan | None) -> BackendStatus:
    # Imported here, with all that speaks to a GPU.
    from bertrt.backends import cuda
    from bertrt.backends.tensorrt import library as trt_library
    from bertrt.backends.tensorrt.check import plan_library_name

    # Others beside it may be too old, or broken: that does not matter to the plan.
    name = None if plan is None else plan_library_name(plan)
    library = trt_library.library_problem(name)
    version = None if library else trt_library.describe_library(name)
    problems = [problem for problem in (library, cuda.problem()) if problem]
    # Where there is no GPU, an engine for GPUs runs on the processor, whatever else is the matter.
    installed = any(map(trt_library.is_installed, [name] if name else trt_library.LIBRARIES))
    return BackendStatus(
        name=TENSORRT,
        available=not problems,
        version=version,
        reason="; ".join(problems),
        blocked=bool(problems) and installed and not cuda.has_no_gpu(),
    )


def _create_tensorrt(folder: EngineFolder, placement: Placement) -> Backend:
    from bertrt.backends.tensorrt.backend import TensorRTBackend

    return TensorRTBackend(folder, devices=placement.devices or (0,))


def _onnxruntime_status(_plan: Plan | None) -> BackendStatus:
    name = ONNXRUNTIME
    if importlib.util.find_spec(name) is None:
        reason = 'onnxruntime is not installed; pip install "bertrt[ort]"'
        return BackendStatus(name=name, available=False, version=None, reason=reason)
    try:
        version = str(importlib.import_module(name).__version__)
    except (ImportError, AttributeError) as error:
        reason = f'onnxruntime is installed but does not load ({error}); pip install --force-reinstall "bertrt[ort]"'
        return BackendStatus(name=name, available=False, version=None, reason=reason)
    return BackendStatus(name=name, available=True, version=version)


def choose_provider(folder: EngineFolder, placement: Placement) -> Provider:
    """Which of ONNX Runtime's providers runs an engine: the one that is asked for, else the best that works here."""
    if placement.provider is not None:
        return placement.provider
    if placement.devices:
        return "cuda"
    if folder.manifest.target == "cpu":
        return "cpu"
    from bertrt.backends.onnxruntime.backend import provider_problem

    return "cpu" if provider_problem("cuda") else "cuda"


def _create_onnxruntime(folder: EngineFolder, placement: Placement) -> Backend:
    # Imported here: the package is heavy, and `import bertrt` shall not load it.
    from bertrt.backends.onnxruntime.backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend(
        folder,
        threads=placement.threads,
        provider=choose_provider(folder, placement),
        devices=placement.devices,
    )


_BACKENDS: dict[str, _Entry] = {
    native.NAME: _Entry(status=_native_status, create=_create_native),
    TENSORRT: _Entry(status=_tensorrt_status, create=_create_tensorrt),
    ONNXRUNTIME: _Entry(status=_onnxruntime_status, create=_create_onnxruntime),
}
