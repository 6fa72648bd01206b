"""TensorRT without a GPU: ``tensorrt`` or ``tensorrt_rtx`` on a `fake_cuda.Gpu`, on ONNX Runtime.

A context computes, when the stream comes to it, what the part's graph says of the arrays that lie at the addresses it
was given, in the shapes it was given. It is as strict as the real one; where that would answer with nonsense, it says
so in `Gpu.violations`: a graph whose context has changed or is gone since it was captured.
"""

import ctypes
import dataclasses
import json
import math
import re
import shutil
import threading
import weakref
from enum import IntEnum
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime

from bertrt.backends.parts import parts_of
from bertrt.folder import EngineFolder, record_files
from bertrt.plans import Plan, Profile
from bertrt_export.plans.profiles import input_ranges, mlm_rows

VERSIONS = {"tensorrt": "11.1.0.106", "tensorrt_rtx": "1.7.1.116"}
_TAGS = {"tensorrt": b"ftrt", "tensorrt_rtx": b"vtrt"}
_HEADER = 64
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
    USER_MANAGED = 2


class CudaGraphStrategy(IntEnum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class EngineValidity(IntEnum):
    VALID = 0
    INVALID = 2


_TYPES = {
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(int32)": (DataType.INT32, np.int32),
    "tensor(int64)": (DataType.INT64, np.int64),
}


def make_plan(graph, profiles, *, library="tensorrt", scratch=4096):
    """The bytes of a plan of an ONNX graph.

    Args:
        graph: the path of the graph.
        profiles: for each profile the least, best and most shape of each input.
        library: that builds it.
        scratch: bytes that a context of the first profile needs; of the second twice as many, and so on.
    """
    numbers = bytes(int(number) & 0xFF for number in re.findall(r"\d+", VERSIONS[library])[:4])
    header = (_TAGS[library].ljust(24, b"\0") + numbers).ljust(_HEADER, b"\0")
    return header + json.dumps({"graph": str(graph), "profiles": profiles, "scratch": scratch}).encode()


def build_plans(source, out, profiles, *, library="tensorrt", most_mlm_rows=1024):
    """Copy an engine in parts, with plans; the folder.

    Args:
        source: an engine that was exported for TensorRT.
        out: where it goes.
        profiles: of the encoder, as text.
        library: that builds the plans.
        most_mlm_rows: of one run of the masked-LM head.
    """
    folder = EngineFolder.open(shutil.copytree(source, out))
    manifest = folder.manifest
    parsed = [Profile.parse(profile) for profile in profiles]
    rows = min(most_mlm_rows, mlm_rows(parsed, manifest.heads))
    for part in parts_of(manifest.heads):
        ranges = [
            {
                name: [list(getattr(range_, which)) for which in ("least", "best", "most")]
                for name, range_ in one.items()
            }
            for one in input_ranges(part, parsed, manifest.architecture)
        ]
        for name in ("mlm_positions", "mlm_candidates") if part == "mlm" else ():
            ranges[0][name] = [[min(rows, shape[0]), *shape[1:]] for shape in ranges[0][name]]
        (folder.path / f"{part}.plan").write_bytes(
            make_plan(folder.path / f"{part}.onnx", ranges, library=library)
        )
    plan = Plan(
        library=library,
        version=VERSIONS[library],
        compute_capabilities=("8.9",),
        profiles=tuple(parsed),
        mlm_rows=rows,
    )
    files = record_files(folder.path)
    backends = {**manifest.backends, "tensorrt": {part: f"{part}.plan" for part in parts_of(manifest.heads)}}
    return folder.replace_manifest(dataclasses.replace(manifest, plan=plan, files=files, backends=backends))


def make_library(gpu, name="tensorrt"):
    """The library as a module."""
    module = ModuleType(name)
    module.__version__ = VERSIONS[name]
    module.ILogger = _ILogger
    module.Runtime = lambda logger: _Runtime(gpu, module, logger)
    for kind in (DataType, ExecutionContextAllocationStrategy):
        setattr(module, kind.__name__, kind)
    if name == "tensorrt_rtx":
        module.CudaGraphStrategy = CudaGraphStrategy
        module.EngineValidity = EngineValidity
    return module


class _ILogger:
    ERROR, WARNING = 1, 2


class _Runtime:
    def __init__(self, gpu, module, logger):
        self.gpu, self.module, self.logger = gpu, module, logger
        if module.__name__ == "tensorrt_rtx":
            self.get_engine_validity = lambda header: (EngineValidity.VALID, 0)

    def deserialize_cuda_engine(self, data):
        data = bytes(data)
        try:
            content = json.loads(data[_HEADER:])
            memory = _Memory(self.gpu, "engine", len(data))
            return _Engine(self, content, memory)
        except ValueError:
            self.logger.log(1, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization")
        except MemoryError as error:
            self.logger.log(1, str(error))
        return None


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
        gpu.free(address, {kind})


class _Engine:
    def __init__(self, runtime, content, memory):
        self.gpu, self.module, self.logger = runtime.gpu, runtime.module, runtime.logger
        self.profiles, self.scratch, self.memory = content["profiles"], content["scratch"], memory
        self.device = memory.device
        self.session = _session(content["graph"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.tensors = {**self.inputs, **self.outputs}

    @property
    def num_io_tensors(self):
        return len(self.tensors)

    @property
    def num_optimization_profiles(self):
        return len(self.profiles)

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name):
        return _TYPES[self.tensors[name].type][0]

    def get_tensor_shape(self, name):
        return [size if isinstance(size, int) else -1 for size in self.tensors[name].shape]

    def get_tensor_profile_shape(self, name, profile):
        return self.profiles[profile][name]

    def get_device_memory_size_for_profile_v2(self, profile):
        return self.scratch * (profile + 1)

    def create_runtime_config(self):
        return _Config(self.module.__name__ == "tensorrt_rtx")

    def create_execution_context(self, config):
        assert config.strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        try:
            return _Context(self, _Memory(self.gpu, "context", _PERSISTENT), config)
        except MemoryError as error:
            self.logger.log(1, str(error))
            return None


class _Config:
    def __init__(self, rtx):
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        if rtx:
            self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
            self.create_runtime_cache = object
            self.set_runtime_cache = lambda cache: True

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy


class _Context:
    def __init__(self, engine, memory, config):
        self.engine, self.memory, self.gpu = engine, memory, engine.gpu
        # With one profile, the first context has it from the start; others choose.
        self.profile = None
        self.shapes, self.addresses, self.scratch = {}, {}, None
        self.captures_itself = getattr(config, "cuda_graph_strategy", CudaGraphStrategy.DISABLED) != 0
        # The shapes of the last run, and how often anything was set.
        self.settled, self.changes = None, 0

    def set_optimization_profile_async(self, profile, stream):
        assert stream in self.gpu.streams
        if not 0 <= profile < len(self.engine.profiles):
            raise RuntimeError("Error in set optimization profile async.")
        self.profile, self.shapes, self.changes = profile, {}, self.changes + 1
        return True

    def set_device_memory(self, address, size):
        assert address % 256 == 0
        self.scratch, self.changes = (address, size), self.changes + 1

    def set_input_shape(self, name, shape):
        least, _, most = self.engine.profiles[self.profile][name]
        if len(shape) != len(least) or any(
            not a <= b <= c for a, b, c in zip(least, shape, most, strict=True)
        ):
            return self._refuse(f"setInputShape: {name} {shape} is not between {least} and {most}")
        if self.shapes.get(name) != tuple(shape):
            self.shapes[name], self.changes = tuple(shape), self.changes + 1
        return True

    def set_tensor_address(self, name, address):
        if name not in self.engine.tensors or address % 256 or not address:
            return self._refuse(f"setTensorAddress: {name} at {address:#x}")
        if self.addresses.get(name) != address:
            self.addresses[name], self.changes = address, self.changes + 1
        return True

    def execute_async_v3(self, handle):
        gpu, engine = self.gpu, self.engine
        with gpu.lock:
            stream = gpu.streams[handle]
            if not gpu.current == stream.device == engine.device:
                return self._refuse(
                    f"enqueueV3: device {gpu.current}, stream {stream.device}, {engine.device}"
                )
            if missing := [*(engine.inputs.keys() - self.shapes), *(engine.tensors.keys() - self.addresses)]:
                return self._refuse(f"enqueueV3: Error Code 3: API Usage Error ({sorted(missing)} not set)")
            if not self.scratch or self.scratch[1] < engine.get_device_memory_size_for_profile_v2(
                self.profile
            ):
                return self._refuse("enqueueV3: Error Code 3: API Usage Error (not enough device memory)")
            try:
                gpu.check("library:enqueue")
            except Exception as failure:
                return self._refuse(f"enqueueV3: Error Code 1: Cuda Runtime ({failure.error.name})")
            shapes = dict(self.shapes)
            if stream.capturer is not None and (self.captures_itself or self.settled != shapes):
                stream.spoilt = True
                return self._refuse(
                    "enqueueV3: Error Code 1: Cuda Runtime (operation not permitted when capturing)"
                )
            gpu.enqueue(
                stream, self._run(stream, shapes, dict(self.addresses), captured=stream.capturer is not None)
            )
            self.settled = shapes
        return True

    def _run(self, stream, shapes, addresses, *, captured):
        """What the stream will do; the context may be gone by then, which is a mistake."""
        context, changes, gpu = weakref.ref(self), self.changes, self.gpu

        def compute():
            alive = context()
            if alive is None:
                gpu.violations.append("a context went while its run was under way, or its graph was used")
                return
            if captured and alive.changes != changes:
                gpu.violations.append("a graph was launched whose context has changed since")
            alive._compute(shapes, addresses, stream.device)

        return compute

    def _compute(self, shapes, addresses, device):
        engine = self.engine
        # As kernels do, whose scratch memory nobody may rely on.
        ctypes.memset(self._at(self.scratch[0], self.scratch[1], device), 0xAB, self.scratch[1])
        feeds = {
            name: self._array(addresses[name], shapes[name], _TYPES[value.type][1], device).copy()
            for name, value in engine.inputs.items()
        }
        try:
            found = engine.session.run(list(engine.outputs), feeds)
        except Exception as error:  # an index that is out of range, which a kernel would have followed
            raise self.gpu.illegal_address() from error
        for name, values in zip(engine.outputs, found, strict=True):
            self._array(addresses[name], values.shape, values.dtype, device)[...] = values

    def _array(self, address, shape, dtype, device):
        size = math.prod(shape) * np.dtype(dtype).itemsize
        memory = (ctypes.c_char * size).from_address(self._at(address, size, device))
        return np.frombuffer(memory, dtype).reshape(shape)

    def _at(self, address, size, device):
        if self.gpu.find(address, size, device) is None:
            raise self.gpu.illegal_address()
        return address

    def _refuse(self, message):
        self.engine.logger.log(1, message)
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
