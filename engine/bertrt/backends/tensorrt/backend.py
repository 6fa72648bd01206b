"""The backend on TensorRT plans, by ``tensorrt`` or ``tensorrt_rtx``.

Sequences are padded to the buckets of the plan's profiles (`bertrt.backends.buckets`). Each GPU has a worker with all
that it needs; a block of sequences takes the worker that has been free for longest, or waits for one.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from bertrt.backends import cuda
from bertrt.backends.base import BatchOutput, Float32, Int32, Int64, TokenBatch, Wanted
from bertrt.backends.buckets import BucketRunner, Buckets, pad_rows, row_bucket
from bertrt.backends.padded import BlockLimits, PaddedBackend
from bertrt.backends.parts import ENCODER, MLM, POOLER, Array, parts_of
from bertrt.backends.tensorrt.check import check_plan, find_plan_library, warn_of_another_gpu
from bertrt.backends.tensorrt.library import capabilities_built_for, library_version
from bertrt.backends.tensorrt.worker import Worker
from bertrt.errors import (
    BackendUnavailableError,
    DeviceError,
    DeviceLostError,
    EngineClosedError,
    InputError,
    ManifestError,
)
from bertrt.folder import EngineFolder
from bertrt.plans import Plan

NAME: Final = "tensorrt"
_CLOSED: Final = "the engine is closed; load it again"


class TensorRTBackend(PaddedBackend):
    """Runs an engine folder's TensorRT plans.

    Contexts and graphs of the shapes that the plan is tuned for are made before it is ready. A GPU that runs out of
    memory leaves the engine as it was; one that is lost closes it.

    Args:
        folder: the engine; whoever opened it has compared the plans' SHA-256, or chose not to.
        devices: GPUs by number, one worker each.

    Raises:
        InputError: there is no such GPU, or one is named twice.
        BackendUnavailableError: there is no driver, GPU or library.
        ManifestError: the folder has no plan.
        PlanMismatchError: the plan is for another library, another release or other GPUs.
        ShapeMismatchError: the plan is not the one of the manifest.
        BackendRunError: a plan cannot be loaded; of its kind `DeviceMemoryError` and `DeviceLostError`.
    """

    def __init__(self, folder: EngineFolder, *, devices: Sequence[int] = (0,)) -> None:
        manifest = folder.manifest
        plan = _plan(folder)
        if reason := cuda.problem():
            raise BackendUnavailableError(f"the backend {NAME} cannot run here: {reason}")
        self._devices = check_devices(devices)
        module = find_plan_library(plan)
        properties = [cuda.device_properties(device) for device in self._devices]
        for found in properties:
            check_plan(
                plan,
                path=folder.path,
                library=module.__name__,
                version=library_version(module),
                compute_capability=found.compute_capability,
                builds_for=capabilities_built_for(module),
            )
        for device, found in zip(self._devices, properties, strict=True):
            warn_of_another_gpu(plan, path=folder.path, index=device, name=found.name)
        self._names = tuple(found.name for found in properties)
        buckets = Buckets(plan.profiles, rebuild=f"bertrt build {shlex.quote(str(folder.path))}")
        workers: list[Worker] = []
        try:
            for device in self._devices:
                workers.append(Worker(module, folder, plan, buckets, device))
        except BaseException:
            for worker in workers:
                _close(worker)
            raise
        self._executor = DeviceParts(workers, plan, buckets)
        super().__init__(
            NAME,
            BucketRunner(self._executor, manifest.architecture, buckets),
            architecture=manifest.architecture,
            heads=manifest.heads,
            threads=len(workers),
        )

    @property
    def devices(self) -> tuple[int, ...]:
        """The GPUs by number."""
        return self._devices

    @property
    def device_names(self) -> tuple[str, ...]:
        """What they are, such as ``NVIDIA L4``."""
        return self._names

    def run(self, batch: TokenBatch, wanted: Wanted) -> BatchOutput:
        """See `bertrt.backends.base.Backend.run`.

        Raises:
            DeviceMemoryError, DeviceError: the engine can still be used.
            DeviceLostError: it has closed itself.
            SequenceTooLongError: no profile of the plan holds a sequence.
            EngineClosedError: after ``close``, or after a GPU was lost.
            BackendUnavailableError: the engine was loaded before this process was forked.
        """
        with self._executor.running():
            return super().run(batch, wanted)


class DeviceParts:
    """Parts on GPUs: a `bertrt.backends.parts.PartsExecutor`.

    Args:
        workers: one for each GPU, at least one.
        plan: that they run.
        buckets: of its profiles.
    """

    def __init__(self, workers: Sequence[Worker], plan: Plan, buckets: Buckets) -> None:
        self.limits: BlockLimits = buckets.limits(workers=len(workers))
        self.mlm_rows = plan.mlm_rows
        self._most = {MLM: plan.mlm_rows, POOLER: plan.most_sequences}
        self._pool = _Pool(workers)
        # An engine that nobody closed gives its GPUs back when it is forgotten.
        weakref.finalize(self, self._pool.close).atexit = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keep the workers through all blocks of a run, even if it is closed meanwhile.

        Raises:
            EngineClosedError: it was closed before.
        """
        self._pool.begin()
        try:
            yield
        finally:
            self._pool.end()

    @contextmanager
    def encode(self, feeds: Mapping[str, Int32]) -> Iterator[_Encoded]:
        """See `bertrt.backends.parts.PartsExecutor.encode`.

        Raises:
            DeviceMemoryError, DeviceError: the engine can still be used.
            DeviceLostError: it cannot.
            EngineClosedError: it was closed, or a GPU was lost before.
        """
        worker = self._pool.take()
        try:
            with worker.active():
                worker.run(ENCODER, feeds)
                yield _Encoded(worker, feeds["input_ids"].shape, self._most)
                # What failed since the last result belongs to this caller, not to the next.
                worker.finish()
        except DeviceLostError as error:
            self._pool.close(f"the engine closed itself, since a GPU failed: {error}", at_once=True)
            raise
        finally:
            self._pool.give_back(worker)

    def close(self) -> None:
        """See `bertrt.backends.parts.PartsExecutor.close`."""
        self._pool.close()


class _Encoded:
    """A block on a worker; see `bertrt.backends.parts.Encoded`."""

    def __init__(self, worker: Worker, shape: tuple[int, ...], most: Mapping[str, int]) -> None:
        self._worker = worker
        self._shape = shape
        self._most = most

    def hidden_states(self) -> Float32:
        return self._worker.results(ENCODER, ["hidden_states"], self._shape)["hidden_states"]

    def mlm(self, positions: Int64, candidates: Int64, outputs: Sequence[str]) -> dict[str, Array]:
        return self._head(MLM, outputs, mlm_positions=positions, mlm_candidates=candidates)

    def pooler(self, rows: Int64, outputs: Sequence[str]) -> dict[str, Array]:
        return self._head(POOLER, outputs, pooled_rows=rows)

    def _head(self, part: str, outputs: Sequence[str], **feeds: Int64) -> dict[str, Array]:
        count = len(next(iter(feeds.values())))
        rows = row_bucket(count, self._most[part])
        self._worker.run(part, {name: pad_rows(values, rows) for name, values in feeds.items()})
        return self._worker.results(part, outputs, (count,))


class _Pool:
    """Workers that wait for work, and the count of runs that need them.

    In a process that was forked it refuses, and gives nothing back: what is there belongs to the other one.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._free = deque(workers)
        # Also those that somebody has.
        self._workers = tuple(workers)
        _pools.add(self)
        self._runs = 0
        # Why no run may begin, and whether those that are under way have to stop too.
        self._closed: str | None = None
        self._stopped = False
        self._changed = threading.Condition()

    def begin(self) -> None:
        """A run begins, which may take workers until its end.

        Raises:
            EngineClosedError: it is closed.
            BackendUnavailableError: it is another process's.
        """
        if reason := cuda.forked():  # before the lock, which nobody here may ever release
            raise BackendUnavailableError(reason)
        with self._changed:
            if self._closed:
                raise EngineClosedError(self._closed)
            self._runs += 1

    def end(self) -> None:
        """A run has ended."""
        with self._changed:
            self._runs -= 1
        self._retire()

    def take(self) -> Worker:
        """The worker that has been free for longest; waits for one if none is.

        Raises:
            EngineClosedError: it is closed and no run is under way, or a GPU was lost, perhaps while this waited.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._is_over())
            if self._is_over():
                raise EngineClosedError(self._closed)
            return self._free.popleft()

    def give_back(self, worker: Worker) -> None:
        """Let others have it."""
        with self._changed:
            self._free.append(worker)
            self._changed.notify()
        self._retire()

    def close(self, reason: str = _CLOSED, *, at_once: bool = False) -> None:
        """Let no run begin, and close the workers when the last one has ended; the first reason counts.

        Args:
            reason: for whoever comes later.
            at_once: runs that are under way get no worker any more either.
        """
        if cuda.forked():
            return
        with self._changed:
            self._closed = self._closed or reason
            self._stopped |= at_once
            self._changed.notify_all()
        self._retire()

    def _is_over(self) -> bool:
        return self._closed is not None and (self._stopped or not self._runs)

    def _retire(self) -> None:
        """Close the workers that nobody will take again."""
        with self._changed:
            retired = list(self._free) if self._is_over() else []
            if retired:
                self._free.clear()
                # A block outside a run may wait for one of them.
                self._changed.notify_all()
        for worker in retired:
            _close(worker)


def _keep_pools() -> None:
    """Let nothing of the process that this one was forked from be destroyed here, not even at the end."""
    for pool in list(_pools):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))


_pools: Final[weakref.WeakSet[_Pool]] = weakref.WeakSet()
os.register_at_fork(after_in_child=_keep_pools)


def check_devices(devices: Sequence[int]) -> tuple[int, ...]:
    """GPUs by number, each once, each there.

    Raises:
        InputError: they are not.
        BackendUnavailableError: CUDA cannot be used.
    """
    if not devices:
        raise InputError(f"devices names no GPU; the backend {NAME} needs one, such as [0]")
    for device in devices:
        cuda.device_properties(device)
    if len(set(devices)) != len(devices):
        raise InputError(f"devices names a GPU twice: {list(devices)}; name each once")
    return tuple(devices)


def _plan(folder: EngineFolder) -> Plan:
    plan, roles = folder.manifest.plan, folder.manifest.backends.get(NAME, {})
    missing = [part for part in parts_of(folder.manifest.heads) if part not in roles]
    if plan is None or missing:
        raise ManifestError(
            f"{str(folder.path)!r} has no TensorRT plan{f' of the {missing[0]}' if missing else ''}; build it with: "
            f"bertrt build {shlex.quote(str(folder.path))}"
        )
    return plan


def _close(worker: Worker) -> None:
    # A lost device cannot be made current, and what it held is gone with it.
    with suppress(DeviceError), worker.active():
        worker.close()
        return
    worker.close()
