"""CUDA's runtime without a GPU: ``cuda.bindings.runtime`` and ``cuda.bindings.driver`` on the memory of the host.

As lazy as the real one may be: what is enqueued runs when somebody waits for it, and not before. What the GPUs are, and
what they notice, is in `fake_gpu`.
"""
# ruff: noqa: N802 - the names are CUDA's

import ctypes
import threading
from types import ModuleType, SimpleNamespace

import fake_gpu
from fake_gpu import E, Failure, Handle, Stream, cudaError_t


class Gpu(fake_gpu.Gpu):
    """Some GPUs, and the modules of the bindings that reach them."""

    def __init__(self, count=1, capacity=1 << 30):
        super().__init__(count, capacity)
        self.runtime, self.driver_module = _modules(self)


def _modules(gpu):
    runtime, driver = ModuleType("cuda.bindings.runtime"), ModuleType("cuda.bindings.driver")
    runtime.cudaError_t = cudaError_t
    runtime.cudaStreamNonBlocking, runtime.cudaEventDisableTiming, runtime.cudaHostAllocPortable = 1, 2, 1
    runtime.cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)
    runtime.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=fake_gpu.THREAD_LOCAL)
    driver.CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=fake_gpu.THREAD_LOCAL)

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
        major, minor = gpu.compute_capability
        return SimpleNamespace(
            name=b"Imaginary GPU %d" % device, major=major, minor=minor, totalGlobalMem=gpu.capacity
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

    @function(driver, 1, captured=True)
    def cuThreadExchangeStreamCaptureMode(mode):
        before, gpu.mode = gpu.mode, mode
        return before

    driver.CUcontext = Handle
    return runtime, driver
