"""The engine of one part of a plan on one GPU, and its execution contexts.

The libraries ``tensorrt`` and ``tensorrt_rtx`` have the same API but for CUDA graphs. Runs of ``tensorrt`` are captured
by us. ``tensorrt_rtx`` compiles better kernels for a shape while it is in use already, and captures by itself whenever
they change; its documentation advises against a capture around that. For both it is advised to have one context for
each graph, all on the same scratch memory.

A context of `tensorrt_rtx` for one shape has that shape's kernels compiled at its first run, which waits for them, so
that later ones neither use others nor change them. One for any shape compiles beside its runs, and captures nothing.

Sources: TensorRT's documentation, "CUDA Graphs" (https://docs.nvidia.com/deeplearning/tensorrt/latest/performance/),
and TensorRT for RTX's, "Working with RTX CUDA Graphs" and "Working with Dynamic Shapes"
(https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/).
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Final

from bertrt.backends.cuda import failed, out_of_memory
from bertrt.backends.cuda.objects import DeviceBuffer, Stream
from bertrt.backends.parts import CANDIDATES, ENCODER, MLM, part_inputs, part_outputs
from bertrt.backends.tensorrt.check import HEADER_SIZE, check_header, check_validity
from bertrt.backends.tensorrt.library import collect_messages, library_logger
from bertrt.errors import BackendRunError, DeviceError, DeviceLostError, ShapeMismatchError
from bertrt.folder import EngineFolder
from bertrt.plans import Plan, rebuild_command

# How the libraries say that memory ran out; their errors have no codes.
_MEMORY: Final = re.compile(
    r"out.?of.?memory|could not be allocated|memory.?allocation|bad_alloc", re.IGNORECASE
)


def make_runtime(module: ModuleType, stream: Stream) -> Any:
    """The library's ``Runtime`` on the current device.

    Raises:
        DeviceError: the library could not make one.
    """
    return _ask("start", stream, module.Runtime, library_logger(module))


class PartEngine:
    """A part's plan, deserialised on the current device and compared with the manifest.

    A plan is a program: whoever loads one trusts whoever built it, as `bertrt.folder.EngineFolder` knows its hash.

    Args:
        module: the library that built the plan.
        runtime: see `make_runtime`.
        folder: the engine.
        plan: of its manifest.
        part: which one.
        stream: of the current device.

    Attributes:
        part: which one.
        profiles: how many it has.
        scratch_bytes: memory that a context needs while it runs; contexts that do not run at once may share it.

    Raises:
        PlanMismatchError, BackendUnavailableError: see `bertrt.backends.tensorrt.check`.
        ShapeMismatchError: the plan is not the one of the manifest.
        BackendRunError: the library cannot load it.
        DeviceMemoryError, DeviceLostError: the GPU has too little memory, or failed.
    """

    def __init__(
        self, module: ModuleType, runtime: Any, folder: EngineFolder, plan: Plan, part: str, stream: Stream
    ) -> None:
        self.part = part
        self._module = module
        self._name = folder.manifest.backends["tensorrt"][part]
        self._rebuild = rebuild_command(plan, folder.path)
        # An engine may not outlive it.
        self._runtime = runtime
        # Nor a configuration and its contexts the cache, which the bindings do not keep alive for them.
        self._cache: Any = None
        self._config: Any = None
        self._config_of_shape: Any = None
        self._engine = self._deserialize(runtime, folder, plan, stream)
        try:
            self._check(folder, plan)
            self.profiles = int(self._engine.num_optimization_profiles)
            self.scratch_bytes = max(
                int(self._engine.get_device_memory_size_for_profile_v2(profile))
                for profile in range(self.profiles)
            )
            self._configure(stream)
        except BaseException:
            # The error may be kept, and with it whatever it came through.
            self.close()
            raise

    def context(self, profile: int, stream: Stream, scratch: DeviceBuffer, *, one_shape: bool) -> Context:
        """A new execution context that runs shapes of a profile.

        Args:
            profile: by number.
            stream: of its runs.
            scratch: `scratch_bytes` for them.
            one_shape: whether it will run the same shape again and again, and so is worth what that takes.

        Raises:
            DeviceError: the library could not make one.
        """
        doing = f"make an execution context of the {self.part}"
        config = self._config_of_shape if one_shape else self._config
        context = _ask(doing, stream, self._engine.create_execution_context, config)
        _ask(doing, stream, context.set_optimization_profile_async, profile, stream.handle)
        _ask(doing, stream, context.set_device_memory, scratch.address, scratch.size, gives=False)
        return Context(self.part, context, stream, captures_itself=self._captures_itself)

    def close(self) -> None:
        """Let go of it, when its contexts are gone; what something depends on goes after it."""
        self._config = self._config_of_shape = None
        self._cache = self._engine = self._runtime = None

    def _configure(self, stream: Stream) -> None:
        """How contexts are made, and whether they capture graphs by themselves."""
        module, doing = self._module, f"configure the {self.part}"
        self._config = self._config_of_shape = self._make_config(stream)
        self._captures_itself = hasattr(self._config, "cuda_graph_strategy")
        if not self._captures_itself:
            return
        self._config_of_shape = self._make_config(stream)
        strategies = module.DynamicShapesKernelSpecializationStrategy
        self._config.dynamic_shapes_kernel_specialization_strategy = strategies.LAZY
        self._config.cuda_graph_strategy = module.CudaGraphStrategy.DISABLED
        self._config_of_shape.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        self._config_of_shape.cuda_graph_strategy = module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # So that a kernel is compiled once for all contexts.
        self._cache = _ask(doing, stream, self._config.create_runtime_cache)
        for config in (self._config, self._config_of_shape):
            _ask(doing, stream, config.set_runtime_cache, self._cache)

    def _make_config(self, stream: Stream) -> Any:
        config = _ask(f"configure the {self.part}", stream, self._engine.create_runtime_config)
        config.set_execution_context_allocation_strategy(
            self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        return config

    def _deserialize(self, runtime: Any, folder: EngineFolder, plan: Plan, stream: Stream) -> Any:
        path = folder.file(self._name)
        with path.open("rb") as file:
            header = file.read(HEADER_SIZE)
            check_header(plan, header, path=folder.path, name=self._name)
            check_validity(self._module, runtime, plan, header, path=folder.path, name=self._name)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                try:
                    return _ask(f"load {self._name!r}", stream, runtime.deserialize_cuda_engine, data)
                except DeviceError as error:
                    if type(error) is not DeviceError:
                        raise
                    raise BackendRunError(
                        f"{error}; if the file is to blame, build it again: {self._rebuild}"
                    ) from error

    def _check(self, folder: EngineFolder, plan: Plan) -> None:
        """Compare types, widths and profiles with what the manifest implies; see `bertrt.backends.parts`."""
        engine, types = self._engine, self._module.DataType
        architecture, heads = folder.manifest.architecture, folder.manifest.heads
        inputs, outputs = part_inputs(self.part), part_outputs(self.part, architecture, heads)
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        if names != {*inputs, *outputs}:
            self._refuse(
                f"has the tensors {_names(names)}, the manifest implies {_names({*inputs, *outputs})}"
            )
        integers = types.INT32 if self.part == ENCODER else types.INT64
        kinds = dict.fromkeys(inputs, integers) | dict.fromkeys(outputs, types.FLOAT)
        kinds |= {name: types.FLOAT for name in inputs if name == "hidden_states"}
        kinds |= {name: types.INT64 for name in outputs if name == "mlm_top_ids"}
        for name, kind in kinds.items():
            if (found := engine.get_tensor_dtype(name)) != kind:
                self._refuse(f"has {name!r} in type {found.name}, the manifest implies {kind.name}")
        for name, width in outputs.items():
            if (shape := tuple(engine.get_tensor_shape(name)))[-1:] != (width,):
                self._refuse(f"has {name!r} of shape {shape}, the manifest implies a width of {width}")
        ranges = self._ranges(plan, architecture.hidden_size)
        if engine.num_optimization_profiles != len(ranges):
            self._refuse(
                f"has {engine.num_optimization_profiles} profiles, the manifest implies {len(ranges)}"
            )
        for profile, expected in enumerate(ranges):
            for name, (least, most) in expected.items():
                shapes = [tuple(shape) for shape in engine.get_tensor_profile_shape(name, profile)]
                if (shapes[0], shapes[-1]) != (least, most):
                    self._refuse(
                        f"holds {name!r} from {shapes[0]} to {shapes[-1]}, the manifest implies {least} to {most}"
                    )

    def _ranges(self, plan: Plan, hidden: int) -> list[dict[str, tuple[tuple[int, ...], tuple[int, ...]]]]:
        """For each profile of the part the least and the most shape of each input."""
        if self.part == ENCODER:
            return [
                dict.fromkeys(part_inputs(ENCODER), (profile.least, profile.most))
                for profile in plan.profiles
            ]
        constant, most = (plan.most_tokens, hidden), plan.most_sequences
        if self.part == MLM:
            most = plan.mlm_rows
        columns = {"mlm_candidates": (CANDIDATES,)}
        rows = {
            name: ((1, *columns.get(name, ())), (most, *columns.get(name, ())))
            for name in part_inputs(self.part)[1:]
        }
        return [{"hidden_states": (constant, constant), **rows}]

    def _refuse(self, problem: str) -> None:
        raise ShapeMismatchError(
            f"the TensorRT plan {self._name!r} {problem}; build it again: {self._rebuild}"
        )


class Context:
    """An execution context, with what it reads and writes; made by `PartEngine.context`.

    Attributes:
        capturable: whether its runs can be captured in a CUDA graph; else the library does what it can by itself.
    """

    def __init__(self, part: str, context: Any, stream: Stream, *, captures_itself: bool) -> None:
        self._doing = f"run the {part}"
        self._context = context
        self._stream = stream
        self.capturable = not captures_itself

    def bind(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        """Say which shapes the inputs have, and where each input and output lies on the device.

        Raises:
            DeviceError: the library refuses them.
        """
        for name, shape in shapes.items():
            _ask(self._doing, self._stream, self._context.set_input_shape, name, shape)
        for name, address in addresses.items():
            _ask(self._doing, self._stream, self._context.set_tensor_address, name, address)

    def enqueue(self) -> None:
        """Enqueue one run.

        Raises:
            DeviceError: the library refuses, in its own words.
        """
        _ask(self._doing, self._stream, self._context.execute_async_v3, self._stream.handle)

    def close(self) -> None:
        """Let go of it."""
        self._context = None


def _ask(doing: str, stream: Stream, function: Any, *arguments: Any, gives: bool = True) -> Any:
    """Call a function of the library.

    Args:
        doing: what for, for the message.
        stream: whose device may be to blame.
        function: of the library.
        arguments: for it.
        gives: it gives something on success, else ``None`` or ``False``.

    Raises:
        DeviceMemoryError, DeviceLostError, DeviceError: it failed.
    """
    with collect_messages() as messages:
        try:
            result = function(*arguments)
        except Exception as error:  # the bindings' exceptions have no common base but this
            raise _failure(doing, [*messages.errors, str(error)], stream) from error
    if gives and (result is None or result is False):
        raise _failure(doing, messages.errors, stream)
    return result


def _failure(doing: str, said: Sequence[str], stream: Stream) -> DeviceError:
    reason = " ".join((said[0] if said else "it gives no reason").split())
    try:
        # A device that is lost says so to whoever asks next.
        stream.synchronize()
    except DeviceLostError as lost:
        return lost
    except DeviceError:
        pass
    if _MEMORY.search(" ".join(said)):
        return out_of_memory(doing, f" ({reason})")
    return failed(f"TensorRT could not {doing}: {reason}")


def _names(names: set[str]) -> str:
    return ", ".join(sorted(names))
