"""Engines in parts on ONNX Runtime with inputs and outputs at fixed places of a device: a worker for each GPU.

What goes in is copied into memory of the device, the hidden state stays there between the encoder and the heads, and
only what is asked for is copied back.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import numpy as np

from bertrt.architecture import BertArchitecture
from bertrt.backends.base import Float32, Int32, Int64
from bertrt.backends.buckets import Buckets, pad_rows, row_bucket
from bertrt.backends.onnxruntime.bindings import BoundPart, SessionPlace
from bertrt.backends.onnxruntime.captures import GATE
from bertrt.backends.onnxruntime.sessions import GPU_REMEDY, device_failure, first_line
from bertrt.backends.padded import BlockLimits
from bertrt.backends.parts import CANDIDATES, ENCODER, MLM, POOLER, Array, part_outputs, parts_of
from bertrt.errors import BackendRunError, BertRTError, DeviceLostError, EngineClosedError
from bertrt.manifest import Heads
from bertrt.plans import Shape

# Rows of logits at a time: 256 over 30,522 WordPieces are 31 MB.
MLM_ROWS: Final = 256

T = TypeVar("T")


class DeviceSessionParts:
    """Parts on GPUs: a `bertrt.backends.parts.PartsExecutor`.

    Args:
        places: one for each worker; at least one.
        buckets: the shapes of the blocks.
        architecture: the model's dimensions.
        heads: which it has.

    Raises:
        DeviceError: a GPU has not enough memory, or fails.
        BackendUnavailableError, EngineFolderError, BackendRunError: a session cannot be opened.
    """

    mlm_rows = MLM_ROWS

    def __init__(
        self,
        places: Sequence[SessionPlace],
        buckets: Buckets,
        architecture: BertArchitecture,
        heads: Heads,
    ) -> None:
        self._limits = buckets.limits(workers=len(places))
        workers = [_Worker(place, buckets, architecture, heads) for place in places]
        # They load side by side, and capture graphs one after the other.
        for worker in workers:
            worker.wait()
        for worker in workers:
            worker.prove(buckets)
        self._free = workers
        self._changed = threading.Condition()
        self._lost = ""

    @property
    def limits(self) -> BlockLimits:
        """The largest block, and a worker for each GPU."""
        return self._limits

    @contextmanager
    def encode(self, feeds: Mapping[str, Int32]) -> Iterator[_Encoded]:
        """See `bertrt.backends.parts.PartsExecutor.encode`; waits for a worker.

        Raises:
            DeviceLostError: the GPU is lost; from then on the engine is closed.
            EngineClosedError: a GPU has been lost.
            BackendRunError: the run failed; the next one may not.
        """
        worker = self._take()
        try:
            worker.encode(feeds)
            yield _Encoded(worker, feeds["input_ids"].shape)
        except DeviceLostError as error:
            self._lose(str(error))
            raise
        finally:
            self._give(worker)

    def close(self) -> None:
        """Nothing: runs under way have the workers, and the last to let go of them frees the GPU's memory."""

    def _take(self) -> _Worker:
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._lost)
            if self._lost:
                raise EngineClosedError(f"the engine was closed when a GPU was lost: {self._lost}")
            # The one that has waited longest, so that all are used.
            return self._free.pop(0)

    def _give(self, worker: _Worker) -> None:
        with self._changed:
            if not self._lost:
                self._free.append(worker)
                self._changed.notify()

    def _lose(self, reason: str) -> None:
        """Let go of all workers and wake who waits for one."""
        with self._changed:
            self._lost = self._lost or reason
            self._free.clear()
            self._changed.notify_all()


class _Encoded:
    """See `bertrt.backends.parts.Encoded`."""

    def __init__(self, worker: _Worker, shape: Shape) -> None:
        self._worker = worker
        self._shape = shape

    def hidden_states(self) -> Float32:
        return self._worker.outputs(ENCODER, self._shape, ["hidden_states"])["hidden_states"]

    def mlm(self, positions: Int64, candidates: Int64, outputs: Sequence[str]) -> dict[str, Array]:
        rows = row_bucket(len(positions), MLM_ROWS)
        feeds = {"mlm_positions": pad_rows(positions, rows), "mlm_candidates": pad_rows(candidates, rows)}
        return self._worker.head(MLM, feeds, len(positions), outputs)

    def pooler(self, rows: Int64, outputs: Sequence[str]) -> dict[str, Array]:
        feeds = {"pooled_rows": pad_rows(rows, row_bucket(len(rows), self._worker.most_sequences))}
        return self._worker.head(POOLER, feeds, len(rows), outputs)


class _Worker:
    """The sessions of one device, the memory that they share, and the one thread that touches them.

    ONNX Runtime keeps CUDA graphs for each thread that runs a session: called from whichever thread asks, every one
    would capture them anew.
    """

    def __init__(
        self, place: SessionPlace, buckets: Buckets, architecture: BertArchitecture, heads: Heads
    ) -> None:
        limits = buckets.limits()
        self.most_sequences, tokens = limits.sequences or 1, limits.tokens or 1  # buckets have an end
        self._place = place
        self._parts: dict[str, BoundPart] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"bertrt {place}")
        self._loaded: Future[None] | None = self._thread.submit(self._load, tokens, architecture, heads)

    def wait(self) -> None:
        """Until it is loaded."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.result()

    def prove(self, buckets: Buckets) -> None:
        """Run before anyone waits, so that a GPU that cannot is an error of loading.

        Single sequences are where the capture of a graph would be felt: theirs are made ready too.
        """
        lengths = {(buckets.shape(1, length) or (1, length)) for length in range(1, buckets.longest + 1)}
        for shape in sorted(lengths) if self._place.graphs else [min(lengths)]:
            ones = np.ones(shape, np.int32)
            self.encode({"input_ids": 0 * ones, "attention_mask": ones, "token_type_ids": 0 * ones})
        row = np.zeros(1, np.int64)
        candidates = np.zeros((1, CANDIDATES), np.int64)
        for part, feeds in (
            (MLM, {"mlm_positions": row, "mlm_candidates": candidates}),
            (POOLER, {"pooled_rows": row}),
        ):
            if part in self._parts:
                self.head(part, feeds, 1, [])

    def encode(self, feeds: Mapping[str, Int32]) -> None:
        """Run the encoder; the hidden state stays on the device."""
        self._do(self._run, ENCODER, feeds)

    def head(
        self, part: str, feeds: Mapping[str, Int64], rows: int, outputs: Sequence[str]
    ) -> dict[str, Array]:
        """Run a head on the hidden state that is there; the first ``rows`` of the named outputs."""

        def run() -> dict[str, Array]:
            key = self._run(part, feeds)
            return self._copied(part, key, outputs, rows)

        return self._do(run)

    def outputs(self, part: str, key: tuple[int, ...], names: Sequence[str]) -> dict[str, Array]:
        """The named outputs of a part's last run, which was of this shape."""
        return self._do(self._copied, part, key, names)

    def _do(self, function: Callable[..., T], *arguments: Any) -> T:
        return self._thread.submit(function, *arguments).result()

    def _load(self, tokens: int, architecture: BertArchitecture, heads: Heads) -> None:
        place = self._place
        with GATE.loading(), self._failing("cannot make the engine ready"):
            # First: a session makes its GPU the thread's current one.
            sessions = {part: place.open(part) for part in parts_of(heads)}
            hidden = place.allocate((tokens, architecture.hidden_size), np.float32)
            rows = {MLM: MLM_ROWS, POOLER: self.most_sequences}
            for part, session in sessions.items():
                widths = part_outputs(part, architecture, heads)
                if part == ENCODER:
                    self._parts[part] = BoundPart(part, session, place, {}, {"hidden_states": hidden})
                else:
                    outputs = {
                        name: place.allocate(
                            (rows[part], width), np.int64 if name == "mlm_top_ids" else np.float32
                        )
                        for name, width in widths.items()
                    }
                    self._parts[part] = BoundPart(part, session, place, {"hidden_states": hidden}, outputs)

    def _run(self, part: str, feeds: Mapping[str, Array]) -> tuple[int, ...]:
        shape = "x".join(map(str, next(iter(feeds.values())).shape))
        with self._failing(f"failed in the {part} on a shape of {shape}"):
            return self._parts[part].run(feeds)

    def _copied(
        self, part: str, key: tuple[int, ...], names: Sequence[str], rows: int | None = None
    ) -> dict[str, Array]:
        with self._failing(f"failed to copy what the {part} found"):
            return self._parts[part].outputs(key, names, rows)

    @contextmanager
    def _failing(self, doing: str) -> Iterator[None]:
        """Turn what ONNX Runtime raises into errors of ours."""
        try:
            yield
        except BertRTError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions have no common base but this
            doing = f"onnxruntime {doing} ({self._place})"
            failure = device_failure(error, doing)
            if isinstance(failure, DeviceLostError):
                # Never freed: where the GPU is lost, ONNX Runtime cannot free a CUDA graph, and ends the process.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
            raise failure or BackendRunError(f"{doing}: {first_line(error)}; {GPU_REMEDY}") from error
