"""CUDA's runtime without a GPU: ``cuda.bindings.runtime`` and ``cuda.bindings.driver`` on the memory of the host.

As lazy as the real one may be: what is enqueued runs when somebody waits for it, and not before. Memory is fresh with
every byte set, which in float32 is NaN; an address that no allocation holds is an illegal one, and loses the device; a
call that a capture forbids fails, and spoils it. What is wrong without an error of its own is in `Gpu.violations`.
"""
# ruff: noqa: N802, N816, N818 - the names are CUDA's

import ctypes
import threading
from collections import Counter
from enum import IntEnum
from types import ModuleType, SimpleNamespace

ALIGNMENT = 256


_CODES = {"InvalidValue": 1, "MemoryAllocation": 2, "InitializationError": 3, "InsufficientDriver": 35}
_CODES |= {"NoDevice": 100, "InvalidDevice": 101, "ECCUncorrectable": 214, "InvalidResourceHandle": 400}
_CODES |= {"IllegalAddress": 700, "LaunchFailure": 719, "StreamCaptureUnsupported": 900, "Unknown": 999}
_CODES |= {"StreamCaptureInvalidated": 901, "StreamCaptureWrongThread": 908}
_NAMES = {"cudaSuccess": 0, **{f"cudaError{name}": code for name, code in _CODES.items()}}
cudaError_t = IntEnum("cudaError_t", _NAMES)
E = cudaError_t
LOST = {E.cudaErrorECCUncorrectable, E.cudaErrorIllegalAddress, E.cudaErrorLaunchFailure, E.cudaErrorUnknown}


# On a lost device.
_WORK_ON = {"cudaGetErrorString", "cudaGetLastError", "cudaSetDevice", "cuCtxGetCurrent", "cuCtxSetCurrent"}


class Handle(int):
    """A stream, an event or a graph."""


class Failure(Exception):
    """What a call gives instead of success."""

    def __init__(self, error):
        super().__init__(error)
        self.error = error


class Allocation:
    def __init__(self, kind, size, device):
        self.kind, self.size, self.device = kind, size, device
        self.memory = ctypes.create_string_buffer(size + ALIGNMENT)
        start = ctypes.addressof(self.memory)
        self.address = -(-start // ALIGNMENT) * ALIGNMENT
        ctypes.memset(self.address, 0xFF, size)


class Stream:
    def __init__(self, device):
        self.device = device
        self.pending = []
        # While it is captured: the thread, what was recorded, and whether that is spoilt.
        self.capturer, self.recorded, self.spoilt = None, [], False


class Gpu:
    """Some GPUs, and all that anybody has of them.

    Attributes:
        count: how many there are.
        capacity: bytes of each.
        driver: the CUDA version that the driver knows; 0: there is none.
        calls: the names of all functions that were called, in order.
        violations: what the real thing would not have reported, but answered with nonsense.
        contexts: devices that have a context.
        lost: by device, what every call to it answers.
        hooks: by the name of a function, what is called before it.
    """

    def __init__(self, count=1, capacity=1 << 30):
        self.count, self.capacity = count, capacity
        self.driver, self.built = 13050, 13000
        self.calls, self.violations = [], []
        self.contexts, self.lost = set(), {}
        self.lock = threading.RLock()
        self.allocations, self.streams, self.events, self.graphs, self.executables = {}, {}, {}, {}, {}
        self._local = threading.local()
        self._handles = 1000
        self.failures, self.hooks = [], {}
        self.runtime, self.driver_module = _modules(self)

    def fail(self, name, error, *, at=1):
        """Let the ``at``-th call from now on to a function fail, once."""
        self.failures.append(SimpleNamespace(name=name, error=error, left=at))

    def live(self):
        """What has been made and not given back, by kind."""
        kinds = Counter(allocation.kind for allocation in self.allocations.values())
        for kind in ("streams", "events", "graphs", "executables"):
            if held := len(getattr(self, kind)):
                kinds[kind] = held
        return kinds

    def used(self, device=0):
        return sum(a.size for a in self.allocations.values() if a.device == device and a.kind != "pinned")

    # What the fake library builds on.

    @property
    def current(self):
        """The device that is current in this thread; None before any was chosen."""
        return getattr(self._local, "device", None)

    def allocate(self, kind, size, device):
        if size < 1:
            raise Failure(E.cudaErrorInvalidValue)
        if kind != "pinned" and self.used(device) + size > self.capacity:
            raise Failure(E.cudaErrorMemoryAllocation)
        allocation = Allocation(kind, size, device)
        self.allocations[allocation.address] = allocation
        return allocation.address

    def free(self, address, kinds):
        allocation = self.allocations.get(address)
        if allocation is None or allocation.kind not in kinds:
            raise Failure(E.cudaErrorInvalidValue)
        # What runs may need it: the real one waits too.
        for stream in self.streams.values():
            if stream.device == allocation.device or allocation.kind == "pinned":
                self.run_pending(stream)
        del self.allocations[address]

    def find(self, address, size, device):
        """The allocation that holds these bytes, reachable from a device."""
        for allocation in self.allocations.values():
            inside = allocation.address <= address and address + size <= allocation.address + allocation.size
            if inside and (allocation.kind == "pinned" or allocation.device == device):
                return allocation
        return None

    def illegal_address(self):
        """What a kernel raises that reads or writes where it may not."""
        return Failure(E.cudaErrorIllegalAddress)

    def enqueue(self, stream, operation):
        """Let a stream run something later, or record it while it is captured."""
        if stream.capturer is None:
            stream.pending.append(operation)
        elif stream.capturer != threading.get_ident():
            raise Failure(E.cudaErrorStreamCaptureWrongThread)
        else:
            stream.recorded.append(operation)

    def forbid_in_capture(self):
        """What must not be called by a thread that captures spoils its capture."""
        for stream in self.streams.values():
            if stream.capturer == threading.get_ident():
                stream.spoilt = True
                raise Failure(E.cudaErrorStreamCaptureUnsupported)

    def run_pending(self, stream, until=None):
        while stream.pending:
            operation = stream.pending.pop(0)
            if self.lost.get(stream.device) is None:
                try:
                    operation()
                except Failure as failure:
                    self.lost[stream.device] = failure.error
            if operation is until:
                break

    def stream(self, handle):
        stream = self.streams.get(int(handle))
        if stream is None or stream.device != self.current:
            raise Failure(E.cudaErrorInvalidResourceHandle)
        return stream

    def handle(self):
        self._handles += 1
        return Handle(self._handles)

    def choose(self, device):
        self._local.device = device
        self.contexts |= {device} - {None}

    def check(self, name):
        """Count a call, and fail it if it shall fail or its device is lost."""
        self.calls.append(name)
        if hook := self.hooks.get(name):
            hook()
        for failure in self.failures:
            if failure.name == name and failure.left:
                failure.left -= 1
                if not failure.left:
                    if failure.error in LOST:
                        self.lost[self.current] = failure.error
                    raise Failure(failure.error)
        if self.lost.get(self.current) and name not in _WORK_ON:
            raise Failure(self.lost[self.current])


def _modules(gpu):
    runtime, driver = ModuleType("cuda.bindings.runtime"), ModuleType("cuda.bindings.driver")
    runtime.cudaError_t = cudaError_t
    runtime.cudaStreamNonBlocking, runtime.cudaEventDisableTiming, runtime.cudaHostAllocPortable = 1, 2, 1
    runtime.cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)
    runtime.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def function(module, values=0, *, captured=False):
        """Make a function of a module: with the lock, with the failures, and which a capture forbids or not."""

        def make(body):
            def call(*arguments):
                with gpu.lock:
                    try:
                        gpu.check(body.__name__)
                        if not captured:
                            gpu.forbid_in_capture()
                        found = body(*arguments)
                    except Failure as failure:
                        if body.__name__ == "cudaStreamEndCapture":  # which ends it in any case
                            gpu.streams[arguments[0]].capturer = None
                        return (failure.error, *[None] * values)
                    return (E.cudaSuccess, *(found if isinstance(found, tuple) else [found][:values]))

            call.body = body
            setattr(module, body.__name__, call)
            return call

        return make

    @function(runtime, 1, captured=True)
    def cudaGetDeviceCount():
        if gpu.driver < gpu.built // 1000 * 1000:
            raise Failure(E.cudaErrorInsufficientDriver)
        if not gpu.count:
            raise Failure(E.cudaErrorNoDevice)
        return gpu.count

    @function(runtime, 1, captured=True)
    def cudaDriverGetVersion():
        return gpu.driver

    @function(runtime, 1, captured=True)
    def cudaRuntimeGetVersion():
        return gpu.built

    @function(runtime, 1, captured=True)
    def cudaGetDeviceProperties(device):
        if not 0 <= device < gpu.count:
            raise Failure(E.cudaErrorInvalidDevice)
        return SimpleNamespace(
            name=b"Imaginary GPU %d" % device, major=8, minor=9, totalGlobalMem=gpu.capacity
        )

    @function(runtime, captured=True)
    def cudaSetDevice(device):
        if not 0 <= device < gpu.count:
            raise Failure(E.cudaErrorInvalidDevice)
        gpu.choose(device)
        if gpu.lost.get(device):
            raise Failure(gpu.lost[device])

    @function(runtime, 2, captured=True)
    def cudaMemGetInfo():
        return gpu.capacity - gpu.used(gpu.current), gpu.capacity

    @function(runtime, 1, captured=True)
    def cudaGetErrorString(error):
        return error.name.removeprefix("cudaError").encode()

    @function(runtime, captured=True)
    def cudaGetLastError():
        return None

    @function(runtime, 1)
    def cudaMalloc(size):
        return gpu.allocate("device", size, gpu.current)

    @function(runtime, 1)
    def cudaHostAlloc(size, flags):
        assert flags == runtime.cudaHostAllocPortable
        return gpu.allocate("pinned", size, gpu.current)

    @function(runtime)
    def cudaFree(address):
        gpu.free(address, {"device"})

    @function(runtime)
    def cudaFreeHost(address):
        gpu.free(address, {"pinned"})

    @function(runtime, 1)
    def cudaStreamCreateWithFlags(flags):
        assert flags == runtime.cudaStreamNonBlocking
        handle = gpu.handle()
        gpu.streams[handle] = Stream(gpu.current)
        return handle

    @function(runtime)
    def cudaStreamDestroy(stream):
        gpu.run_pending(gpu.stream(stream))
        del gpu.streams[stream]

    @function(runtime)
    def cudaStreamSynchronize(stream):
        found = gpu.stream(stream)
        gpu.run_pending(found)
        if gpu.lost.get(found.device):
            raise Failure(gpu.lost[found.device])

    @function(runtime, captured=True)
    def cudaMemcpyAsync(target, source, size, kind, stream):
        assert kind == runtime.cudaMemcpyKind.cudaMemcpyDefault
        found = gpu.stream(stream)

        def copy():
            if not (gpu.find(source, size, found.device) and gpu.find(target, size, found.device)):
                raise Failure(E.cudaErrorIllegalAddress)
            ctypes.memmove(target, source, size)

        gpu.enqueue(found, copy)

    @function(runtime, 1)
    def cudaEventCreateWithFlags(flags):
        assert flags == runtime.cudaEventDisableTiming
        handle = gpu.handle()
        gpu.events[handle] = None
        return handle

    @function(runtime, captured=True)
    def cudaEventRecord(event, stream):
        def mark():
            """Nothing, but it has a place in the queue."""

        found = gpu.stream(stream)
        gpu.enqueue(found, mark)
        gpu.events[event] = found, mark

    @function(runtime)
    def cudaEventSynchronize(event):
        found, mark = gpu.events[event]
        if mark in found.pending:
            gpu.run_pending(found, until=mark)
        if gpu.lost.get(found.device):
            raise Failure(gpu.lost[found.device])

    @function(runtime)
    def cudaEventDestroy(event):
        del gpu.events[event]

    @function(runtime)
    def cudaStreamBeginCapture(stream, mode):
        assert mode == runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        found = gpu.stream(stream)
        found.capturer, found.recorded, found.spoilt = threading.get_ident(), [], False

    @function(runtime, 1, captured=True)
    def cudaStreamEndCapture(stream):
        found = gpu.stream(stream)
        if found.capturer != threading.get_ident():
            raise Failure(E.cudaErrorStreamCaptureWrongThread)
        found.capturer = None
        if found.spoilt:
            raise Failure(E.cudaErrorStreamCaptureInvalidated)
        handle = gpu.handle()
        gpu.graphs[handle] = found.recorded
        return handle

    @function(runtime, 1)
    def cudaGraphInstantiate(graph, flags):
        assert flags == 0
        handle = gpu.handle()
        # A graph holds memory of the device.
        gpu.executables[handle] = gpu.graphs[graph], gpu.allocate("graph", 4096, gpu.current)
        return handle

    @function(runtime)
    def cudaGraphDestroy(graph):
        del gpu.graphs[graph]

    @function(runtime, captured=True)
    def cudaGraphLaunch(executable, stream):
        recorded, _ = gpu.executables[executable]
        for operation in recorded:
            # An object of its own, as the same may be pending twice.
            gpu.enqueue(gpu.stream(stream), lambda operation=operation: operation())

    @function(runtime)
    def cudaGraphExecDestroy(executable):
        # It waits for nothing: what was launched goes on.
        del gpu.allocations[gpu.executables.pop(executable)[1]]

    # The driver's contexts: what is current in a thread.

    @function(driver, 1, captured=True)
    def cuCtxGetCurrent():
        return Handle(0 if gpu.current is None else gpu.current + 1)

    @function(driver, captured=True)
    def cuCtxSetCurrent(context):
        gpu.choose(context - 1 if context else None)

    driver.CUcontext = Handle
    return runtime, driver
