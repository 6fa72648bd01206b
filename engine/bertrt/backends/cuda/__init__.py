"""CUDA through NVIDIA's own Python bindings (package ``cuda-bindings``): what there is, how it is called, our errors.

The bindings are imported when they are first needed, and PyTorch never is. What is made of memory and streams is in
`bertrt.backends.cuda.objects`.

Source: the CUDA Runtime API's reference (https://docs.nvidia.com/cuda/cuda-runtime-api/), for which errors only a new
process mends too.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from bertrt.errors import BackendUnavailableError, DeviceError, DeviceLostError, DeviceMemoryError, InputError

RUNTIME: Final = "cuda.bindings.runtime"
_DRIVER: Final = "cuda.bindings.driver"
_VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
_OUT_OF_MEMORY: Final = "cudaErrorMemoryAllocation"
# After one of these every further call of the process fails, or the device is not there any more.
_LOST: Final = frozenset(
    f"cudaError{name}"
    for name in (
        *("Assert", "Contained", "ContextIsDestroyed", "DeviceUninitialized", "DevicesUnavailable"),
        *("ECCUncorrectable", "ExternalDevice", "HardwareStackError", "IllegalAddress", "IllegalInstruction"),
        *("InitializationError", "InvalidAddressSpace", "InvalidPc", "LaunchFailure", "LaunchTimeout"),
        *("MisalignedAddress", "MpsClientTerminated", "MpsRpcFailure", "NoDevice", "NvlinkUncorrectable"),
        *("TensorMemoryLeak", "Unknown"),
    )
)
# Which device is current in a thread, for the messages.
_here = threading.local()
# The process that has used CUDA first: those that are forked from it cannot use it any more.
_users: Final[list[int]] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProperties:
    """A GPU.

    Attributes:
        name: such as ``NVIDIA L4``.
        compute_capability: such as ``8.9``.
        memory_bytes: its memory, used or free.
    """

    name: str
    compute_capability: str
    memory_bytes: int


def problem() -> str | None:
    """Why CUDA cannot be used on this machine and what to do about it, or ``None`` if it can."""
    return _look()[1]


def has_no_gpu() -> bool:
    """Whether this machine has no NVIDIA driver, or shows no GPU: nothing stands in the way then, there is no way."""
    return _look()[2]


def forked() -> str | None:
    """Why this process cannot use what it has of CUDA, if it was forked from one that has used it, and what to do."""
    if not _users or _users[0] == os.getpid():
        return None
    return (
        f"process {os.getpid()} was forked from process {_users[0]}, which had used CUDA before; CUDA does not survive "
        "that: load engines for GPUs after the fork only, or start processes with multiprocessing's 'spawn'"
    )


def device_count() -> int:
    """GPUs that CUDA can use; 0 where `problem` has a reason."""
    return _look()[0]


def device_properties(index: int) -> DeviceProperties:
    """What kind of GPU has this number.

    Raises:
        BackendUnavailableError: CUDA cannot be used; see `problem`.
        InputError: there is no such GPU.
    """
    count, reason, _ = _look()
    if reason:
        raise BackendUnavailableError(reason)
    if type(index) is not int or not 0 <= index < count:
        there = "there is one GPU, 0" if count == 1 else f"there are {count} GPUs, 0 to {count - 1}"
        raise InputError(f"there is no GPU {index!r}: {there}")
    found = call("ask what it is", "cudaGetDeviceProperties", index)
    return DeviceProperties(
        name=bytes(found.name).rstrip(b"\0").decode(errors="replace"),
        compute_capability=f"{found.major}.{found.minor}",
        memory_bytes=int(found.totalGlobalMem),
    )


@contextlib.contextmanager
def on_device(index: int) -> Iterator[None]:
    """Make a GPU the calling thread's current one.

    Afterwards the thread has the context that it had before, or none: to set the device back to 0 would make a
    context there, which costs hundreds of megabytes that nobody asked for.

    Raises:
        DeviceError: the GPU cannot be used.
        BackendUnavailableError: nor can any other; see `forked`.
    """
    if reason := forked():
        raise BackendUnavailableError(reason)
    driver = load_module(_DRIVER)
    error, before = driver.cuCtxGetCurrent()
    if error != 0:  # nothing has used CUDA yet
        before = driver.CUcontext(0)
    outer = getattr(_here, "index", None)
    _here.index = index
    try:
        call("make it current", "cudaSetDevice", index)
        _users[:] = [os.getpid()]
        with ignoring_captures():
            yield
    finally:
        _here.index = outer
        driver.cuCtxSetCurrent(before)


@contextlib.contextmanager
def ignoring_captures() -> Iterator[None]:
    """Let the calling thread do what it wants while other code of the process captures a CUDA graph.

    In CUDA's default mode, to allocate memory or to wait fails while another thread captures in that mode, as ONNX
    Runtime does, and spoils its capture too.

    Raises:
        DeviceError: CUDA does not allow it.
    """
    driver = load_module(_DRIVER)
    # The driver's function, since it needs no context and works after a failure too.
    error, before = driver.cuThreadExchangeStreamCaptureMode(
        driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    )
    if error != 0:
        raise failed(f"it could not keep apart from captures ({_name(error)}); try again in a new process")
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(before)


def memory_info() -> tuple[int, int]:
    """Free and all memory of the current device, in bytes."""
    runtime = load_module(RUNTIME)
    error, free, total = runtime.cudaMemGetInfo()
    if error != 0:
        raise _failure(runtime, error, "ask for its free memory")
    return int(free), int(total)


def in_words(size: int) -> str:
    """A number of bytes for a reader."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def out_of_memory(
    doing: str, reason: str = "", *, size: int | None = None, host: bool = False
) -> DeviceMemoryError:
    """The error that says how much memory was asked for and is free, and what to do."""
    asked = f", which needs {in_words(size)}" if size else ""
    if host:
        return DeviceMemoryError(
            f"{_place()}cannot {doing}{asked}{reason}; run where there is more memory, or build the plan for smaller "
            "blocks (bertrt build --profile)"
        )
    with contextlib.suppress(DeviceError):
        free, total = memory_info()
        asked += f"; {in_words(free)} of {in_words(total)} are free"
    return DeviceMemoryError(
        f"{_place()}not enough memory to {doing}{asked}{reason}. Free some ('nvidia-smi' shows who holds it), take "
        "another GPU (devices), or build the plan for smaller blocks (bertrt build --profile)"
    )


def failed(problem: str) -> DeviceError:
    """The error that says which GPU has a problem."""
    return DeviceError(f"{_place()}{problem}")


def call(doing: str, name: str, *arguments: Any, size: int | None = None, host: bool = False) -> Any:
    """Call a function of the runtime; what it gives.

    Raises:
        DeviceMemoryError, DeviceLostError, DeviceError: it failed.
    """
    runtime = load_module(RUNTIME)
    error, *values = getattr(runtime, name)(*arguments)
    if error != 0:
        raise _failure(runtime, error, doing, size=size, host=host)
    return values[0] if values else None


def _look() -> tuple[int, str | None, bool]:
    """How many GPUs there are; or why none can be used, and whether that is because there is none."""
    try:
        runtime = load_module(RUNTIME)
    except BackendUnavailableError as error:
        return 0, str(error), not _has_driver()
    if reason := forked():
        return 0, reason, False
    status, count = runtime.cudaGetDeviceCount()
    if status == 0 and count:
        _users[:] = [os.getpid()]
        return int(count), None, False
    # A failed call would be reported again by the next one that asks for the last error.
    runtime.cudaGetLastError()
    driver, built = runtime.cudaDriverGetVersion()[1] or 0, runtime.cudaRuntimeGetVersion()[1] or 0
    if not driver:
        return (
            0,
            (
                "no NVIDIA driver was found; install it, or give the container its GPUs (docker run --gpus all). "
                "Engines for CPUs need none"
            ),
            True,
        )
    if _name(status) == "cudaErrorInsufficientDriver":
        return (
            0,
            (
                f"the NVIDIA driver is too old: it knows CUDA {_version(driver)}, cuda-bindings is for CUDA "
                f"{_version(built)}; update the driver"
            ),
            False,
        )
    if status == 0 or _name(status) == "cudaErrorNoDevice":
        hidden = f" ({_VISIBLE} is {os.environ[_VISIBLE]!r})" if _VISIBLE in os.environ else ""
        return 0, f"the NVIDIA driver sees no GPU{hidden}; 'nvidia-smi' lists those that there are", True
    said = _describe(runtime, status)
    return 0, f"CUDA does not start: {said}; 'nvidia-smi' shows whether the driver works", False


def _has_driver() -> bool:
    """Whether there is a driver, for where the bindings cannot tell."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _failure(
    runtime: ModuleType, error: Any, doing: str, *, size: int | None = None, host: bool = False
) -> DeviceError:
    reason = _describe(runtime, error)
    # Or the next call that looks for the last error, perhaps not ours, would find this one.
    runtime.cudaGetLastError()
    if _name(error) == _OUT_OF_MEMORY:
        return out_of_memory(doing, f" ({reason})", size=size, host=host)
    if _name(error) in _LOST:
        return DeviceLostError(
            f"{_place()}lost, as it could not {doing}: {reason}. Only a new process can use it again; if that fails "
            "too, see 'nvidia-smi' and the kernel's log"
        )
    return failed(f"it could not {doing}: {reason}; try again, or in a new process")


def release(name: str, handle: Any) -> None:
    """Call a function of the runtime that gives something back, whatever it says to that.

    In a process that was forked it does nothing: what is there belongs to the other one.
    """
    if forked():
        return
    runtime = load_module(RUNTIME)
    if getattr(runtime, name)(handle)[0] != 0:
        runtime.cudaGetLastError()


def _place() -> str:
    index = getattr(_here, "index", None)
    return "GPU: " if index is None else f"GPU {index}: "


def _describe(runtime: ModuleType, error: Any) -> str:
    text = runtime.cudaGetErrorString(error)[1]
    return f"{text.decode(errors='replace') if text else 'unknown error'} ({_name(error)})"


def _name(error: Any) -> str:
    return str(getattr(error, "name", error))


def _version(number: int) -> str:
    """CUDA writes 13.5 as 13050."""
    return f"{number // 1000}.{number % 1000 // 10}"


def load_module(name: str) -> ModuleType:
    """A module of the bindings, such as `RUNTIME`.

    Raises:
        BackendUnavailableError: they are not installed, or do not load.
    """
    # Quicker than to import it again, and every call to the GPU comes through here.
    if (module := sys.modules.get(name)) is not None:
        return module
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == "cuda":
            raise BackendUnavailableError(
                'cuda-bindings, NVIDIA\'s Python interface to CUDA, is not installed; pip install "bertrt[tensorrt]", '
                '"bertrt[tensorrt-rtx]" or "bertrt[cuda]"'
            ) from error
        raise BackendUnavailableError(
            f"cuda-bindings is installed but does not load ({error}); "
            'pip install --force-reinstall "cuda-bindings>=13"'
        ) from error
