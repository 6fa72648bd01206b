"""Memory, streams and graphs of a GPU.

All belong to the device that `bertrt.backends.cuda.on_device` has made current in the calling thread. They are given
back by ``close``, which never raises: what a lost device held is gone with it.

Source: the CUDA Runtime API's reference (https://docs.nvidia.com/cuda/cuda-runtime-api/), and the programming guide's
chapter on CUDA graphs.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bertrt.backends.cuda import RUNTIME, call, forked, ignoring_captures, load_module, release
from bertrt.errors import DeviceError

# Addresses of tensors are multiples of this: TensorRT asks for 256 bytes.
ALIGNMENT: Final = 256


class DeviceBuffer:
    """Memory of the current device.

    Attributes:
        address: of its first byte.
        size: in bytes.

    Raises:
        DeviceMemoryError: there is not enough.
    """

    def __init__(self, size: int) -> None:
        self.size = max(size, ALIGNMENT)
        self.address = int(call("hold the engine", "cudaMalloc", self.size, size=self.size))

    def close(self) -> None:
        """Free it; again does nothing."""
        if self.address:
            release("cudaFree", self.address)
        self.address = 0


class PinnedBuffer:
    """Memory of the host that a GPU copies from and to by itself.

    It lives until it is closed and no array looks at it any more.

    Attributes:
        address: of its first byte; 0 once it is closed.
        size: in bytes.

    Raises:
        DeviceMemoryError: the host does not give that much.
    """

    def __init__(self, size: int) -> None:
        self.size = max(size, ALIGNMENT)
        # Portable: pinned for every device, whichever is current when it is freed.
        portable = load_module(RUNTIME).cudaHostAllocPortable
        self.address = int(
            call("pin memory of the host", "cudaHostAlloc", self.size, portable, size=self.size, host=True)
        )
        self._memory: _Pinned | None = _Pinned(self.address, self.size)

    def array(self, dtype: npt.DTypeLike, shape: int | tuple[int, ...], offset: int = 0) -> npt.NDArray[Any]:
        """A view of its bytes from ``offset`` on."""
        kind, sizes = np.dtype(dtype), (shape,) if isinstance(shape, int) else shape
        end = offset + kind.itemsize * int(np.prod(sizes, dtype=np.int64))
        if self._memory is None or end > self.size:
            raise ValueError(f"[PinnedBuffer] bytes {offset} to {end} of {self.size if self._memory else 0}")
        return np.asarray(self._memory)[offset:end].view(kind).reshape(sizes)

    def close(self) -> None:
        """Let go of it; again does nothing."""
        self.address, self._memory = 0, None


class _Pinned:
    """Owner of pinned memory: arrays made of it keep it alive."""

    def __init__(self, address: int, size: int) -> None:
        self.__array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
        finalizer = weakref.finalize(self, _free_pinned, address)
        # The process gives all back when it ends, and CUDA may be gone by then.
        finalizer.atexit = False


def _free_pinned(address: int) -> None:
    # In whichever thread the last array goes.
    if not forked():
        with contextlib.suppress(DeviceError), ignoring_captures():
            release("cudaFreeHost", address)


class Stream:
    """A queue of work on the current device, which does not wait for the default stream's.

    Attributes:
        handle: the ``cudaStream_t`` as a number, as TensorRT takes it.
    """

    def __init__(self) -> None:
        self._stream = call(
            "make a stream", "cudaStreamCreateWithFlags", load_module(RUNTIME).cudaStreamNonBlocking
        )
        self.handle = int(self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy of ``size`` bytes between device memory and pinned memory, whichever is which."""
        kind = load_module(RUNTIME).cudaMemcpyKind.cudaMemcpyDefault
        call("copy", "cudaMemcpyAsync", target, source, size, kind, self._stream)

    def synchronize(self) -> None:
        """Wait until all is done; what failed on the device is raised here."""
        call("finish a run", "cudaStreamSynchronize", self._stream)

    def settle(self) -> None:
        """Wait until nothing runs, however it ends."""
        release("cudaStreamSynchronize", self._stream)

    def capture(self, record: Callable[[], None]) -> Graph:
        """Record, without running it, what ``record`` enqueues.

        Raises:
            DeviceError: it did what cannot be captured, such as waiting or allocating; or what it raised itself.
                The stream is usable afterwards.
        """
        runtime = load_module(RUNTIME)
        # Of this thread only: another may allocate meanwhile.
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("begin a capture", "cudaStreamBeginCapture", self._stream, mode)
        try:
            record()
        except BaseException:
            error, graph = runtime.cudaStreamEndCapture(self._stream)
            runtime.cudaGetLastError()
            if error == 0:
                release("cudaGraphDestroy", graph)
            raise
        graph = call("end a capture", "cudaStreamEndCapture", self._stream)
        try:
            return Graph(self, call("make a graph of a capture", "cudaGraphInstantiate", graph, 0))
        finally:
            release("cudaGraphDestroy", graph)

    def close(self) -> None:
        """Give it back; again does nothing."""
        if self.handle:
            release("cudaStreamDestroy", self._stream)
        self.handle = 0


class Graph:
    """Work that was recorded, and is launched as one; made by `Stream.capture`."""

    def __init__(self, stream: Stream, graph: Any) -> None:
        self._stream = stream
        self._graph = graph

    def launch(self) -> None:
        """Enqueue it on the stream that it was recorded on."""
        call("launch a graph", "cudaGraphLaunch", self._graph, self._stream.handle)

    def close(self) -> None:
        """Give it back; again does nothing."""
        if self._graph is not None:
            release("cudaGraphExecDestroy", self._graph)
        self._graph = None


class Event:
    """A place in a stream that can be waited for."""

    def __init__(self) -> None:
        # Without times, which cost.
        self._event = call(
            "make an event", "cudaEventCreateWithFlags", load_module(RUNTIME).cudaEventDisableTiming
        )

    def record(self, stream: Stream) -> None:
        """Put it behind what the stream holds now."""
        call("record an event", "cudaEventRecord", self._event, stream.handle)

    def synchronize(self) -> None:
        """Wait until the stream has come to it."""
        call("finish a run", "cudaEventSynchronize", self._event)

    def close(self) -> None:
        """Give it back; again does nothing."""
        if self._event is not None:
            release("cudaEventDestroy", self._event)
        self._event = None


def aligned(size: int) -> int:
    """``size`` rounded up, so that what lies behind it is aligned."""
    return -(-size // ALIGNMENT) * ALIGNMENT
