"""All that one GPU needs to run a plan: a stream, the engines of the parts, their contexts and graphs, and memory.

Memory is allocated once, for the largest block and the most rows. What comes later are contexts and graphs of shapes
that are used again, and of those there are at most `MOST_GRAPHS`, or as many as memory has proved to hold. All
contexts share their scratch memory, since they run one after the other on one stream.

A shape's first run is by its profile's own context. From the second run on it has a context to itself, whose first run
settles what depends on the shape, as TensorRT demands before a capture; the next is captured in a graph, which later
ones launch. Where memory for that runs out, the shape is run as at first, and from then on fewer have a context to
themselves; where it runs out in a run as at first, all of those are given up for it. A graph holds the copy of the
inputs to the device too, as every run needs it. The outputs are copied outside, as it is the caller who says which.
"""

from __future__ import annotations

import traceback
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Final

import numpy as np

from bertrt.backends.buckets import Buckets, row_bucket
from bertrt.backends.cuda import on_device
from bertrt.backends.cuda.downloads import Downloads
from bertrt.backends.cuda.objects import DeviceBuffer, Stream
from bertrt.backends.parts import ENCODER, MLM, POOLER, Array, part_outputs, parts_of
from bertrt.backends.tensorrt.engine import PartEngine, make_runtime
from bertrt.backends.tensorrt.library import collect_messages
from bertrt.backends.tensorrt.parts import Part, Program, Shared
from bertrt.errors import DeviceMemoryError
from bertrt.folder import EngineFolder
from bertrt.plans import Plan, Shape

# Shapes with a context and a graph to themselves, all parts together; then the one that has rested longest makes room.
MOST_GRAPHS: Final = 64
# Results come back through two pieces of pinned memory of this size: one is filled while the other is emptied.
_PIECE: Final = 8 << 20

Key = tuple[str, tuple[int, ...]]


class Worker:
    """Runs the parts on one GPU, for one caller at a time, whichever thread it is in.

    All but making it happens inside `active`.

    Args:
        module: the library that built the plan.
        folder: the engine.
        plan: of its manifest.
        buckets: of the plan's profiles.
        device: the GPU's number.

    Raises:
        BackendError, EngineFolderError: see `bertrt.backends.tensorrt.engine.PartEngine`; nothing is left behind.

    Warns:
        RuntimeWarning: with what the library remarked meanwhile.
    """

    def __init__(
        self, module: ModuleType, folder: EngineFolder, plan: Plan, buckets: Buckets, device: int
    ) -> None:
        self.device = device
        self._buckets = buckets
        self._most = {ENCODER: plan.most_tokens, MLM: plan.mlm_rows, POOLER: plan.most_sequences}
        # Of which parts the last run may not be over.
        self._running: set[str] = set()
        self._programs: OrderedDict[Key, Program] = OrderedDict()
        self._seen: set[Key] = set()
        # Of programs.
        self._limit = MOST_GRAPHS
        try:
            with on_device(device), collect_messages() as said, ExitStack() as made:
                self._stream = Stream()
                made.callback(self._stream.close)
                self._parts = self._open(module, folder, plan, made)
                most = max(part.output_bytes for part in self._parts.values())
                self._downloads = Downloads(self._stream, min(_PIECE, most), made)
                made.callback(self._drop_programs)
                # Before anything goes that a run may need.
                made.callback(self._stream.settle)
                self._prepare(plan)
                _pass_on(said.warnings, device)
                self._made = made.pop_all()
        except BaseException as error:
            _forget(error)
            raise

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make its GPU the calling thread's current one."""
        with on_device(self.device):
            yield

    def run(self, part: str, feeds: Mapping[str, Array]) -> None:
        """Enqueue a part on arrays of one of its shapes.

        Raises:
            DeviceError: the GPU or the library failed.
        """
        if part in self._running:
            # It still reads the memory that the inputs pass through.
            self.finish()
        found = self._parts[part]
        shape = found.take(feeds)
        self._running.add(part)
        key = part, shape
        if key in self._programs or (key in self._seen and self._limit):
            self._run_program(key)
        else:
            self._seen.add(key)
            self._run_once(key)

    def results(self, part: str, names: Sequence[str], shape: tuple[int, ...]) -> dict[str, Array]:
        """Wait for a part's last run, and copy the named outputs: the first rows, ``[*shape, width]``.

        Raises:
            DeviceError: the GPU failed.
        """
        if not names:
            self.finish()
        outputs = self._parts[part].outputs
        arrays: dict[str, Array] = {
            name: np.empty((*shape, outputs[name].width), outputs[name].dtype) for name in names
        }
        self._downloads.fetch([(outputs[name].buffer.address, array) for name, array in arrays.items()])
        self._running.clear()
        return arrays

    def finish(self) -> None:
        """Wait until nothing runs.

        Raises:
            DeviceError: the GPU failed.
        """
        if self._running:
            self._stream.synchronize()
            self._running.clear()

    def close(self) -> None:
        """Give all back."""
        self._made.close()

    def _open(self, module: ModuleType, folder: EngineFolder, plan: Plan, made: ExitStack) -> dict[str, Part]:
        manifest, stream = folder.manifest, self._stream
        runtime = make_runtime(module, stream)
        engines = {}
        for name in parts_of(manifest.heads):
            engines[name] = PartEngine(module, runtime, folder, plan, name, stream)
            made.callback(engines[name].close)
        scratch = DeviceBuffer(max(engine.scratch_bytes for engine in engines.values()))
        made.callback(scratch.close)
        shape = plan.most_tokens, manifest.architecture.hidden_size
        hidden = DeviceBuffer(shape[0] * shape[1] * np.dtype(np.float32).itemsize)
        made.callback(hidden.close)
        shared = Shared(stream=stream, scratch=scratch, hidden=hidden, hidden_shape=shape)
        return {
            name: Part(
                engine,
                shared,
                self._most[name],
                part_outputs(name, manifest.architecture, manifest.heads),
                made,
            )
            for name, engine in engines.items()
        }

    def _profile(self, part: str, shape: tuple[int, ...]) -> int:
        # The heads have one profile.
        return self._buckets.profile((shape[0], shape[1])) if part == ENCODER else 0

    def _prepare(self, plan: Plan) -> None:
        """Make graphs before anyone waits for them; a GPU that cannot run the plan is an error of loading."""
        shapes: set[Shape] = {profile.best for profile in plan.profiles}
        tuned = max(sequences for sequences, _ in shapes)
        keys: list[Key] = [(ENCODER, shape) for shape in sorted(shapes)]
        for part in sorted(self._parts.keys() - {ENCODER}):
            most = self._most[part]
            keys += [(part, (rows,)) for rows in sorted({1, row_bucket(min(tuned, most), most)})]
        for part, shape in keys:
            self._seen.add((part, shape))
            for _ in range(2):  # which is a run and a capture
                self._parts[part].take_nothing(shape)
                self._program((part, shape)).run()
                self._stream.synchronize()

    def _run_program(self, key: Key) -> None:
        try:
            self._program(key).run()
        except DeviceMemoryError:
            self._stream.synchronize()
            self._drop(key)
            # Else each shape that comes again would be tried again, and push out what others have.
            self._limit = len(self._programs)
            # The profile's own context has its memory.
            self._run_once(key)

    def _run_once(self, key: Key) -> None:
        part, profile = self._parts[key[0]], self._profile(*key)
        try:
            part.run_once(key[1], profile)
        except DeviceMemoryError:
            if not self._programs:
                raise
            # They are worth less than an answer, and if as many came back they would be given up time and again.
            self._stream.synchronize()
            self._limit = len(self._programs) // 2
            self._drop_programs()
            part.run_once(key[1], profile)

    def _program(self, key: Key) -> Program:
        if key in self._programs:
            self._programs.move_to_end(key)
            return self._programs[key]
        part, shape = key
        if len(self._programs) >= self._limit:
            self._stream.synchronize()
            oldest = next(iter(self._programs))
            self._drop(oldest)
            # A shape that comes once in a while shall not push out another each time.
            self._seen.discard(oldest)
        self._programs[key] = self._parts[part].program(shape, self._profile(part, shape))
        return self._programs[key]

    def _drop(self, key: Key) -> None:
        if program := self._programs.pop(key, None):
            program.close()

    def _drop_programs(self) -> None:
        for key in list(self._programs):
            self._drop(key)


def _pass_on(said: Iterable[str], device: int) -> None:
    """Let the user hear what the library remarked while it loaded the plan."""
    for text in dict.fromkeys(said):
        warnings.warn(f"TensorRT on GPU {device}: {text.strip()}", RuntimeWarning, stacklevel=1)


def _forget(error: BaseException | None) -> None:
    """Whoever keeps an error, to handle it, shall not keep engines in its tracebacks' variables and so on the GPU."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
