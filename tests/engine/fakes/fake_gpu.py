"""The state of GPUs that are not there: who holds what, what is under way, what goes wrong when.

`fake_cuda` puts CUDA's functions before it. Memory is that of the host, fresh with every byte set, which in float32 is
NaN; an address that no allocation holds is an illegal one, and loses the device; a call that a capture forbids fails,
and spoils it; in a process that was forked from one that has used the GPUs every call fails. What is wrong without an
error of its own is in `Gpu.violations`.
"""
# ruff: noqa: N816, N818 - the names are CUDA's

import ctypes
import os
import threading
from collections import Counter
from enum import IntEnum
from types import SimpleNamespace

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
_WORK_ON |= {"cuThreadExchangeStreamCaptureMode"}
# In a process that was forked.
_TELL = {"cudaGetErrorString", "cudaGetLastError", "cudaDriverGetVersion", "cudaRuntimeGetVersion"}
# Modes of capture, and of threads towards the captures of others.
GLOBAL, THREAD_LOCAL, RELAXED = range(3)


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
        refuses_captures: whether the library says no to every capture of its work.
        warnings_of_library: what the library remarks on every plan that it loads.
        fallbacks: shapes that the library ran by kernels which are for any shape.
        foreign_capture: whether other code of the process captures, in CUDA's global mode.
        foreign_spoilt: whether somebody has spoilt that.
    """

    def __init__(self, count=1, capacity=1 << 30):
        self.count, self.capacity = count, capacity
        self.driver, self.built = 13050, 13000
        self.compute_capability = 8, 9
        self.calls, self.violations = [], []
        self.contexts, self.lost = set(), {}
        self.lock = threading.RLock()
        self.allocations, self.streams, self.events, self.graphs, self.executables = {}, {}, {}, {}, {}
        self.refuses_captures, self.warnings_of_library, self.fallbacks = False, [], []
        self.foreign_capture, self.foreign_spoilt = False, False
        self._pid, self._used = os.getpid(), False
        self._local = threading.local()
        self._handles = 1000
        self.failures, self.hooks = [], {}

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

    @property
    def mode(self):
        """How the calls of this thread meet captures in others."""
        return getattr(self._local, "mode", GLOBAL)

    @mode.setter
    def mode(self, mode):
        self._local.mode = mode

    def destroyed(self, what):
        """Something is given back, which only the process may do that made it."""
        if os.getpid() != self._pid:
            self.violations.append(f"{what} was destroyed in another process")

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
        """What must not be called by a thread that captures spoils its capture, or that of another thread."""
        if self.foreign_capture and self.mode == GLOBAL:
            self.foreign_spoilt = True
            raise Failure(E.cudaErrorStreamCaptureUnsupported)
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
        if os.getpid() != self._pid and self._used and name not in _TELL:
            if "Free" in name or "Destroy" in name:
                self.destroyed(name)
            raise Failure(E.cudaErrorInitializationError)
        # Versions can be asked for before CUDA starts.
        self._used |= name not in _TELL
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
