"""A part on one GPU: its engine, the memory that its inputs and outputs pass through, and how a shape of it is run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from bertrt.backends.cuda.objects import DeviceBuffer, Graph, PinnedBuffer, Stream, aligned
from bertrt.backends.parts import CANDIDATES, ENCODER, Array, part_inputs
from bertrt.backends.tensorrt.engine import Context, PartEngine
from bertrt.errors import DeviceError, DeviceLostError, DeviceMemoryError

_HIDDEN = "hidden_states"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What the parts on one GPU have in common.

    Attributes:
        stream: on which all of them run.
        scratch: memory for the context that runs.
        hidden: the hidden state, which the encoder writes and the heads read.
        hidden_shape: ``(tokens, hidden)`` of that, as the heads know it.
    """

    stream: Stream
    scratch: DeviceBuffer
    hidden: DeviceBuffer
    hidden_shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Output:
    """Where an output lies on the device, for the most rows, and what it is."""

    buffer: DeviceBuffer
    width: int
    dtype: np.dtype[Any]


class Part:
    """An engine with the memory that its inputs and outputs pass through.

    Args:
        engine: of the part.
        shared: with the others.
        rows: the most that it runs on: tokens of the encoder, rows of a head.
        widths: of its outputs.
        made: to which is added what has to be given back.

    Attributes:
        outputs: where they lie.

    Raises:
        DeviceError: the library could not make a context; `DeviceMemoryError` if there is not enough memory.
    """

    def __init__(
        self, engine: PartEngine, shared: Shared, rows: int, widths: Mapping[str, int], made: ExitStack
    ) -> None:
        self._engine = engine
        self._shared = shared
        self._dtype = np.dtype(np.int32 if engine.part == ENCODER else np.int64)
        self._inputs = [name for name in part_inputs(engine.part) if name != _HIDDEN]
        size = self._end((rows,))
        self._pinned = PinnedBuffer(size)
        made.callback(self._pinned.close)
        self._device = DeviceBuffer(size)
        made.callback(self._device.close)
        self.outputs: dict[str, Output] = {}
        for name, width in widths.items():
            dtype = np.dtype(np.int64 if name == "mlm_top_ids" else np.float32)
            buffer = shared.hidden
            if name != _HIDDEN:
                buffer = DeviceBuffer(rows * width * dtype.itemsize)
                made.callback(buffer.close)
            self.outputs[name] = Output(buffer, width, dtype)
        self._captures = True
        # The profiles' own.
        self._contexts: list[Context] = []
        made.callback(self._close_contexts)
        for profile in range(engine.profiles):
            self._contexts.append(engine.context(profile, shared.stream, shared.scratch, one_shape=False))

    @property
    def output_bytes(self) -> int:
        """Of all outputs together, for the most rows."""
        return sum(aligned(output.buffer.size) for output in self.outputs.values())

    def take(self, feeds: Mapping[str, Array]) -> tuple[int, ...]:
        """Put inputs where the next run looks for them; the shape of the first."""
        shape = feeds[self._inputs[0]].shape
        for name, offset in self._places(shape).items():
            self._pinned.array(self._dtype, feeds[name].shape, offset)[...] = feeds[name]
        return shape

    def take_nothing(self, shape: tuple[int, ...]) -> None:
        """Inputs of zeros, of a shape."""
        self.take({name: np.zeros(self._input_shape(name, shape), self._dtype) for name in self._inputs})

    def run_once(self, shape: tuple[int, ...], profile: int) -> None:
        """Enqueue a run of a shape by its profile's context."""
        context = self._contexts[profile]
        self._bind(context, shape)
        self._recorder(context, shape)()

    def program(self, shape: tuple[int, ...], profile: int) -> Program:
        """A context for a shape alone."""
        context = self._engine.context(profile, self._shared.stream, self._shared.scratch, one_shape=True)
        self._bind(context, shape)
        return Program(context, self._recorder(context, shape), self._capture)

    def _capture(self, record: Callable[[], None]) -> Graph | None:
        """A graph of a run; ``None`` where the library, or CUDA, does not let its runs be captured."""
        if not self._captures:
            return None
        try:
            return self._shared.stream.capture(record)
        except (DeviceMemoryError, DeviceLostError):
            raise
        except DeviceError as error:
            self._captures = False
            warnings.warn(
                f"the {self._engine.part} cannot be captured as a CUDA graph, and runs without, which is slower; "
                f"update TensorRT or the NVIDIA driver, or build the plan again: {error}",
                RuntimeWarning,
                stacklevel=1,
            )
            return None

    def _bind(self, context: Context, shape: tuple[int, ...]) -> None:
        places = self._places(shape)
        shapes = {name: self._input_shape(name, shape) for name in places}
        addresses = {name: self._device.address + offset for name, offset in places.items()}
        addresses |= {name: output.buffer.address for name, output in self.outputs.items()}
        if self._engine.part != ENCODER:
            shapes[_HIDDEN] = self._shared.hidden_shape
            addresses[_HIDDEN] = self._shared.hidden.address
        context.bind(shapes, addresses)

    def _recorder(self, context: Context, shape: tuple[int, ...]) -> Callable[[], None]:
        size = self._end(shape)

        def record() -> None:
            self._shared.stream.copy(self._device.address, self._pinned.address, size)
            context.enqueue()

        return record

    def _places(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Where the inputs of a shape begin: one behind the other, so that one copy takes them all."""
        places, offset = {}, 0
        for name in self._inputs:
            places[name] = offset
            offset += self._size(name, shape)
        return places

    def _end(self, shape: tuple[int, ...]) -> int:
        return sum(self._size(name, shape) for name in self._inputs)

    def _size(self, name: str, shape: tuple[int, ...]) -> int:
        elements = int(np.prod(self._input_shape(name, shape), dtype=np.int64))
        return aligned(elements * self._dtype.itemsize)

    def _input_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape, CANDIDATES) if name == "mlm_candidates" else shape

    def _close_contexts(self) -> None:
        for context in self._contexts:
            context.close()
        self._contexts.clear()


class Program:
    """A shape with a context to itself; from its second run on a graph.

    Args:
        context: which runs nothing else.
        record: enqueues a run.
        capture: makes a graph of that, or ``None`` if it shall be run without.
    """

    def __init__(
        self,
        context: Context,
        record: Callable[[], None],
        capture: Callable[[Callable[[], None]], Graph | None],
    ) -> None:
        self._context = context
        self._record = record
        self._capture = capture
        self._settled = False
        self._graph: Graph | None = None

    def run(self) -> None:
        """Enqueue one run."""
        if self._settled and self._graph is None and self._context.capturable:
            self._graph = self._capture(self._record)
        if self._graph is None:
            self._record()
            self._settled = True
        else:
            self._graph.launch()

    def close(self) -> None:
        """Give back the graph, then the context that it came from."""
        if self._graph is not None:
            self._graph.close()
        self._graph = None
        self._context.close()
