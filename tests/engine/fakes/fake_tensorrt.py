"""TensorRT without a GPU: ``tensorrt`` or ``tensorrt_rtx`` on a `fake_cuda.Gpu`, on ONNX Runtime.

A context computes, when the stream comes to it, what the part's graph says of the arrays that lie at the addresses it
was given, in the shapes it was given. It is as strict as the real one; where that would answer with nonsense, it says
so in `Gpu.violations`: a graph whose context has changed or is gone since it was captured, a context that is made with
a runtime cache that nobody holds any more.

Public names are those of the real library, with as many parameters; the tests compare them. All else begins with an
underscore.
"""

import ctypes
import json
import math
import threading
import weakref
from enum import IntEnum
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
from fake_plans import HEADER, VERSIONS

# Of each context, for itself alone.
_PERSISTENT = 512
_sessions = {}
_lock = threading.Lock()


class DataType(IntEnum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    INT64 = 8


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class CudaGraphStrategy(IntEnum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class DynamicShapesKernelSpecializationStrategy(IntEnum):
    LAZY = 0
    EAGER = 1
    NONE = 2


class EngineValidity(IntEnum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class ComputeCapability(IntEnum):
    NONE = 0
    CURRENT = 1
    SM75 = 75
    SM80 = 80
    SM86 = 86
    SM89 = 89
    SM120 = 120
    SM121 = 121


ENUMS = (DataType, ExecutionContextAllocationStrategy)
RTX_ENUMS = (
    CudaGraphStrategy,
    DynamicShapesKernelSpecializationStrategy,
    EngineValidity,
    ComputeCapability,
)
_TYPES = {
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(int32)": (DataType.INT32, np.int32),
    "tensor(int64)": (DataType.INT64, np.int64),
}


def make_library(gpu, name="tensorrt"):
    """The library as a module."""
    module = ModuleType(name)
    module.__version__ = VERSIONS[name]
    module.ILogger = ILogger
    rtx = name == "tensorrt_rtx"
    module.Runtime = partial(RtxRuntime if rtx else Runtime, gpu)
    for kind in (*ENUMS, *(RTX_ENUMS if rtx else ())):
        setattr(module, kind.__name__, kind)
    return module


class ILogger:
    ERROR, WARNING = 1, 2


class Runtime:
    def __init__(self, gpu, logger):
        self._gpu, self._logger = gpu, logger

    def deserialize_cuda_engine(self, serialized_engine):
        data = bytes(serialized_engine)
        try:
            content = json.loads(data[HEADER:])
            memory = _Memory(self._gpu, "engine", len(data))
            for text in self._gpu.warnings_of_library:
                self._logger.log(ILogger.WARNING, text)
            return self._make_engine(content, memory)
        except ValueError:
            self._logger.log(1, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization")
        except MemoryError as error:
            self._logger.log(1, str(error))
        return None

    def _make_engine(self, content, memory):
        return ICudaEngine(self, content, memory, IRuntimeConfig)


class RtxRuntime(Runtime):
    def get_engine_validity(self, buffer):
        return (EngineValidity.VALID if len(buffer) >= HEADER else EngineValidity.INVALID), 0

    def _make_engine(self, content, memory):
        return ICudaEngine(self, content, memory, RtxRuntimeConfig)


class _Memory:
    """Memory of the current device that the library holds; given back when nobody needs it any more."""

    def __init__(self, gpu, kind, size):
        with gpu.lock:
            try:
                gpu.check(f"library:{kind}")
                gpu.forbid_in_capture()
                address = gpu.allocate(kind, size, gpu.current)
            except Exception as failure:
                raise MemoryError(f"Error Code 1: Cuda Runtime ({failure.error.name})") from failure
        self.device = gpu.current
        weakref.finalize(self, _give_back, gpu, address, kind).atexit = False


def _give_back(gpu, address, kind):
    with gpu.lock:
        gpu.destroyed(kind)
        gpu.free(address, {kind})


class ICudaEngine:
    def __init__(self, runtime, content, memory, config):
        self._gpu, self._logger, self._config = runtime._gpu, runtime._logger, config
        self._profiles, self._scratch, self._memory = content["profiles"], content["scratch"], memory
        self._session = _session(content["graph"])
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = {value.name: value for value in self._session.get_outputs()}
        self._tensors = {**self._inputs, **self._outputs}

    @property
    def num_io_tensors(self):
        return len(self._tensors)

    @property
    def num_optimization_profiles(self):
        return len(self._profiles)

    def get_tensor_name(self, index):
        return list(self._tensors)[index]

    def get_tensor_dtype(self, name):
        return _TYPES[self._tensors[name].type][0]

    def get_tensor_shape(self, name):
        return [size if isinstance(size, int) else -1 for size in self._tensors[name].shape]

    def get_tensor_profile_shape(self, name, profile_index):
        return self._profiles[profile_index][name]

    def get_device_memory_size_for_profile_v2(self, profile_index):
        return self._scratch * (profile_index + 1)

    def create_runtime_config(self):
        return self._config(self._gpu)

    def create_execution_context(self, runtime_config):
        assert runtime_config._allocation is ExecutionContextAllocationStrategy.USER_MANAGED
        runtime_config._use()
        try:
            return IExecutionContext(self, _Memory(self._gpu, "context", _PERSISTENT), runtime_config)
        except MemoryError as error:
            self._logger.log(1, str(error))
            return None


class IRuntimeConfig:
    _graphs = CudaGraphStrategy.DISABLED
    # TensorRT has the right kernels for every shape from the start.
    _specialization = DynamicShapesKernelSpecializationStrategy.EAGER
    _cache = None

    def __init__(self, gpu):
        self._gpu = gpu
        self._allocation = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy):
        self._allocation = strategy

    def _use(self):
        """A context is made of it."""


class IRuntimeCache:
    """Kernels that were compiled. Nobody keeps it alive but who made it: not the configuration, not its contexts."""

    def __init__(self, gpu):
        self._users = weakref.WeakSet()
        weakref.finalize(self, _check_unused, gpu, self._users).atexit = False


def _check_unused(gpu, users):
    if len(users):
        gpu.violations.append("a runtime cache went before what uses it")


class RtxRuntimeConfig(IRuntimeConfig):
    _specialization = DynamicShapesKernelSpecializationStrategy.LAZY

    @property
    def cuda_graph_strategy(self):
        return self._graphs

    @cuda_graph_strategy.setter
    def cuda_graph_strategy(self, strategy):
        self._graphs = CudaGraphStrategy(strategy)

    @property
    def dynamic_shapes_kernel_specialization_strategy(self):
        return self._specialization

    @dynamic_shapes_kernel_specialization_strategy.setter
    def dynamic_shapes_kernel_specialization_strategy(self, strategy):
        self._specialization = DynamicShapesKernelSpecializationStrategy(strategy)

    def create_runtime_cache(self):
        return IRuntimeCache(self._gpu)

    def set_runtime_cache(self, cache):
        self._cache = weakref.ref(cache)
        cache._users.add(self)
        return True

    def _use(self):
        if self._cache is not None and self._cache() is None:
            self._gpu.violations.append("a context was made with a runtime cache that is gone")


class IExecutionContext:
    def __init__(self, engine, memory, config):
        self._engine, self._memory, self._gpu = engine, memory, engine._gpu
        # With one profile, the first context has it from the start; others choose.
        self._profile = None
        self._shapes, self._addresses, self._scratch = {}, {}, None
        self._captures_itself = config._graphs != CudaGraphStrategy.DISABLED
        self._specialization, self._specialized = config._specialization, set()
        if config._cache is not None and (cache := config._cache()) is not None:
            cache._users.add(self)
        # The shapes of the last run, and how often anything was set.
        self._settled, self._changes = None, 0

    def set_optimization_profile_async(self, profile_index, stream_handle):
        assert stream_handle in self._gpu.streams
        if not 0 <= profile_index < len(self._engine._profiles):
            raise RuntimeError("Error in set optimization profile async.")
        self._profile, self._shapes, self._changes = profile_index, {}, self._changes + 1
        return True

    def set_device_memory(self, memory, size):
        assert memory % 256 == 0
        self._scratch, self._changes = (memory, size), self._changes + 1

    def set_input_shape(self, name, shape):
        least, _, most = self._engine._profiles[self._profile][name]
        if len(shape) != len(least) or any(
            not a <= b <= c for a, b, c in zip(least, shape, most, strict=True)
        ):
            return self._refuse(f"setInputShape: {name} {shape} is not between {least} and {most}")
        if self._shapes.get(name) != tuple(shape):
            self._shapes[name], self._changes = tuple(shape), self._changes + 1
        return True

    def set_tensor_address(self, name, memory):
        if name not in self._engine._tensors or memory % 256 or not memory:
            return self._refuse(f"setTensorAddress: {name} at {memory:#x}")
        if self._addresses.get(name) != memory:
            self._addresses[name], self._changes = memory, self._changes + 1
        return True

    def execute_async_v3(self, stream_handle):
        gpu, engine = self._gpu, self._engine
        with gpu.lock:
            stream = gpu.streams[stream_handle]
            device = engine._memory.device
            if not gpu.current == stream.device == device:
                return self._refuse(f"enqueueV3: device {gpu.current}, stream {stream.device}, {device}")
            unset = [*(engine._inputs.keys() - self._shapes), *(engine._tensors.keys() - self._addresses)]
            if unset:
                return self._refuse(f"enqueueV3: Error Code 3: API Usage Error ({sorted(unset)} not set)")
            needed = engine.get_device_memory_size_for_profile_v2(self._profile)
            if not self._scratch or self._scratch[1] < needed:
                return self._refuse("enqueueV3: Error Code 3: API Usage Error (not enough device memory)")
            captured, shapes = stream.capturer is not None, dict(self._shapes)
            try:
                gpu.check("library:enqueue")
            except Exception as failure:
                stream.spoilt |= captured
                return self._refuse(f"enqueueV3: Error Code 1: Cuda Runtime ({failure.error.name})")
            if captured and (gpu.refuses_captures or self._captures_itself or self._settled != shapes):
                stream.spoilt = True
                return self._refuse(
                    "enqueueV3: Error Code 1: Cuda Runtime (operation not permitted when capturing)"
                )
            self._choose_kernels(shapes)
            gpu.enqueue(stream, self._run(stream, shapes, dict(self._addresses), captured=captured))
            self._settled = shapes
        return True

    def _choose_kernels(self, shapes):
        """Compile what the strategy asks for; a run by kernels that are for any shape is noted."""
        key = tuple(sorted(shapes.items()))
        if self._specialization is not DynamicShapesKernelSpecializationStrategy.EAGER and (
            key not in self._specialized
        ):
            self._gpu.fallbacks.append(shapes)
        if self._specialization is not DynamicShapesKernelSpecializationStrategy.NONE:
            self._specialized.add(key)

    def _run(self, stream, shapes, addresses, *, captured):
        """What the stream will do; the context may be gone by then, which is a mistake."""
        context, changes, gpu = weakref.ref(self), self._changes, self._gpu

        def compute():
            alive = context()
            if alive is None:
                gpu.violations.append("a context went while its run was under way, or its graph was used")
                return
            if captured and alive._changes != changes:
                gpu.violations.append("a graph was launched whose context has changed since")
            alive._compute(shapes, addresses, stream.device)

        return compute

    def _compute(self, shapes, addresses, device):
        engine = self._engine
        # As kernels do, whose scratch memory nobody may rely on.
        ctypes.memset(self._at(self._scratch[0], self._scratch[1], device), 0xAB, self._scratch[1])
        feeds = {
            name: self._array(addresses[name], shapes[name], _TYPES[value.type][1], device).copy()
            for name, value in engine._inputs.items()
        }
        try:
            found = engine._session.run(list(engine._outputs), feeds)
        except Exception as error:  # an index that is out of range, which a kernel would have followed
            raise self._gpu.illegal_address() from error
        for name, values in zip(engine._outputs, found, strict=True):
            self._array(addresses[name], values.shape, values.dtype, device)[...] = values

    def _array(self, address, shape, dtype, device):
        size = math.prod(shape) * np.dtype(dtype).itemsize
        memory = (ctypes.c_char * size).from_address(self._at(address, size, device))
        return np.frombuffer(memory, dtype).reshape(shape)

    def _at(self, address, size, device):
        if self._gpu.find(address, size, device) is None:
            raise self._gpu.illegal_address()
        return address

    def _refuse(self, message):
        self._engine._logger.log(1, message)
        return False


def _session(graph):
    """Graphs are loaded once: engines on several devices, and those of other tests, share them."""
    key = graph, Path(graph).stat().st_mtime_ns
    with _lock:
        if key not in _sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = 1, 4
            _sessions[key] = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return _sessions[key]
