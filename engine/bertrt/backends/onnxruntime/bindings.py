"""Sessions of ONNX Runtime that read and write at fixed addresses of a device, each shape as a CUDA graph.

A graph is captured at a shape's first run, and replayed at the later ones: it reads and writes where that run did. So
every shape keeps its addresses.

Source: https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html, for I/O binding and CUDA graphs.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnxruntime

from bertrt.backends.onnxruntime.captures import GATE
from bertrt.backends.onnxruntime.sessions import first_line
from bertrt.backends.parts import Array
from bertrt.errors import BackendRunError

# CUDA graphs of one part: each holds memory, and there are more buckets than any one use of an engine sees. The first
# shapes to come get one, later ones run without.
MOST_GRAPHS: Final = 64
# Under this key a run says which graph it is; -1 is none, and 0 that of a run that says nothing.
_GRAPH_KEY: Final = "gpu_graph_id"
_NO_GRAPH: Final = "-1"
# CUDA's errors 900 to 909: something was done that cannot be captured. The stream can be used afterwards.
_CANNOT_CAPTURE: Final = re.compile(r"CUDA (?:failure|error) 90\d\b|stream is capturing", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionPlace:
    """Where the sessions of a worker run.

    Attributes:
        open: opens the session of a part; called in the worker's thread.
        device_type: of the memory, in ONNX Runtime's words: ``cuda`` or ``cpu``.
        device_id: the number of the GPU.
        graphs: whether the sessions capture CUDA graphs.
    """

    open: Callable[[str], onnxruntime.InferenceSession]
    device_type: str
    device_id: int = 0
    graphs: bool = False

    def __str__(self) -> str:
        return f"GPU {self.device_id}" if self.device_type == "cuda" else self.device_type.upper()

    def allocate(self, shape: Sequence[int], kind: type[np.generic]) -> onnxruntime.OrtValue:
        """A tensor of the device; what it holds is left open."""
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            list(shape), kind, self.device_type, self.device_id
        )


class BoundPart:
    """The session of a part, with what it reads and writes for each shape of its inputs.

    It is used by one thread, and raises what ONNX Runtime raises.

    Args:
        name: which part.
        session: its session.
        place: where it runs.
        shared: inputs that other sessions write.
        outputs: ``[rows, width]`` for each output, as many rows as there may be: all shapes write to the beginning.
    """

    def __init__(
        self,
        name: str,
        session: onnxruntime.InferenceSession,
        place: SessionPlace,
        shared: Mapping[str, onnxruntime.OrtValue],
        outputs: Mapping[str, onnxruntime.OrtValue],
    ) -> None:
        self._name = name
        self._session = session
        self._place = place
        self._shared = shared
        self._outputs = outputs
        self._bound: dict[tuple[int, ...], _Bound] = {}
        self._graphs = 0
        self._captures = place.graphs

    def run(self, feeds: Mapping[str, Array]) -> tuple[int, ...]:
        """Run it; the shape of the first input, by which `outputs` finds what was computed.

        Raises:
            BackendRunError: there is no room for outputs of that shape.
        """
        key: tuple[int, ...] = next(iter(feeds.values())).shape
        with GATE.running():
            bound = self._bound.get(key) or self._bind(key, feeds)
        captures = self._captures and bound.graph != _NO_GRAPH
        with GATE.running(capture=captures and not bound.captured) as alone:
            for name, values in feeds.items():
                bound.inputs[name].update_inplace(values)
            graph = bound.graph if captures and (bound.captured or alone) else _NO_GRAPH
            try:
                self._session.run_with_iobinding(bound.binding, self._run_options(graph))
                bound.captured |= graph != _NO_GRAPH
            except Exception as error:
                if graph != _NO_GRAPH:
                    # A run that failed while it was captured may have left a graph of half the work.
                    bound.graph = _NO_GRAPH
                if graph == _NO_GRAPH or not _CANNOT_CAPTURE.search(str(error)):
                    raise
                self._run_uncaptured(bound, first_line(error))
        return key

    def outputs(
        self, key: tuple[int, ...], names: Sequence[str], rows: int | None = None
    ) -> dict[str, Array]:
        """Copies of the named outputs, or of their first rows."""
        found = dict(zip(self._outputs, self._bound[key].binding.get_outputs(), strict=True))
        arrays = {}
        for name in names:
            with GATE.running():
                values = found[name].numpy()
            # On a CPU this is the memory itself, which the next run overwrites.
            arrays[name] = values[:rows] if values.flags.owndata else values[:rows].copy()
        return arrays

    def _run_uncaptured(self, bound: _Bound, reason: str) -> None:
        """Run without a graph what could not be captured, as all later shapes."""
        self._captures = False
        warnings.warn(
            f"onnxruntime cannot capture the {self._name} as a CUDA graph, and runs it without, which is slower "
            f"({self._place}): {reason}",
            RuntimeWarning,
            stacklevel=1,
        )
        self._session.run_with_iobinding(bound.binding, self._run_options(_NO_GRAPH))

    def _bind(self, key: tuple[int, ...], feeds: Mapping[str, Array]) -> _Bound:
        place, binding, inputs = self._place, self._session.io_binding(), {}
        for name, values in feeds.items():
            inputs[name] = place.allocate(values.shape, values.dtype.type)
            binding.bind_ortvalue_input(name, inputs[name])
        for name, value in self._shared.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            rows, width = value.shape()
            # Bound by its address: nothing beneath would notice.
            if math.prod(key) > rows:
                raise BackendRunError(
                    f"{name!r} of inputs {key} would have {math.prod(key)} rows, there is room for {rows}"
                )
            kind = np.int64 if value.data_type() == "tensor(int64)" else np.float32
            binding.bind_output(
                name, place.device_type, place.device_id, kind, [*key, width], value.data_ptr()
            )
        graph = _NO_GRAPH
        if self._graphs < MOST_GRAPHS:
            self._graphs += 1
            graph = str(self._graphs)
        bound = self._bound[key] = _Bound(binding, inputs, graph)
        return bound

    def _run_options(self, graph: str) -> onnxruntime.RunOptions:
        options = onnxruntime.RunOptions()
        if self._place.graphs:
            options.add_run_config_entry(_GRAPH_KEY, graph)
        return options


@dataclass(slots=True)
class _Bound:
    """What a session reads and writes for one shape, and the graph that it is run as."""

    binding: onnxruntime.IOBinding
    inputs: dict[str, onnxruntime.OrtValue]
    graph: str
    captured: bool = False
