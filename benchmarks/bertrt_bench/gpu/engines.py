"""BertRT's own engines on a GPU, timed at the backend: token ids in, arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from bertrt.backends.base import Backend, Wanted
from bertrt.backends.placement import Provider
from bertrt.backends.registry import backend_status
from bertrt.engine import Engine
from bertrt.errors import MeasurementError
from bertrt_bench.cases import Question, Task
from bertrt_bench.contestants.base import Answer, Run, Setup
from bertrt_bench.contestants.parts import Assembled, Part, cut, told_of
from bertrt_bench.gpu.budgets import budgets, fastest

# After these a plan has captured what it will replay.
_FIRST_RUNS = 3


class EngineContestant:
    """An engine folder on one of its backends.

    Args:
        engine: the loaded engine.
        details: what else decides its speed.
        on_gpu: whether it runs on one.
    """

    def __init__(self, engine: Engine, details: Mapping[str, str], *, on_gpu: bool) -> None:
        self._engine = engine
        self._backend: Backend = engine.backend
        self._on_gpu = on_gpu
        self.threads = engine.backend.threads
        self.versions: Mapping[str, str] = {
            status.name: status.version
            for status in backend_status()
            if status.name == engine.backend.name and status.version
        }
        self.details: dict[str, str] = dict(details)

    def prepare(self, question: Question) -> Run:
        """Warm up; of a mix choose the size of batches that is fastest."""
        runs = {budget: self._run(question, budget) for budget in budgets(question, on_gpu=self._on_gpu)}
        budget = fastest(runs)
        self.details.update(told_of(question, budget))
        for _ in range(_FIRST_RUNS):
            runs[budget]()
        return runs[budget]

    def _run(self, question: Question, budget: int) -> Run:
        task = question.case.task
        parts = cut(question, token_budget=budget)
        if question.case.lengths is None:
            return self._part(parts[0], task)
        runs = [(part.rows(task), self._part(part, task)) for part in parts]
        size = sum(len(rows) for rows, _ in runs)
        return lambda: Assembled([(rows, run(), None) for rows, run in runs], size)

    def _part(self, part: Part, task: Task) -> Run:
        backend, tokens = self._backend, part.tokens
        name, wanted = {
            "features": ("hidden_states", Wanted(hidden_states=True)),
            "next-sentence": ("nsp_logits", Wanted(nsp=True)),
        }[task]
        answered = "logits" if task == "next-sentence" else name

        def run() -> Answer:
            values: Any = getattr(backend.run(tokens, wanted), name)
            if values is None:
                raise MeasurementError(
                    f"backend {backend.name!r} left out what was asked for; this is a defect of the backend"
                )
            return {answered: values}

        return run


def load_engine(folder: str, backend: str, threads: int) -> Engine:
    """Load an engine that this very run exported, on the first GPU that CUDA sees or on the CPU.

    Args:
        folder: the engine.
        backend: ``NAME``, or ``NAME:PROVIDER`` with a provider of ONNX Runtime.
        threads: of one run.

    Raises:
        BertRTError: as `Engine.load`.
    """
    name, _, provider = backend.partition(":")
    return Engine.load(
        folder,
        backend=name,
        threads=threads,
        # Checked in there, whatever its type here.
        provider=cast(Provider | None, provider or None),
        devices=None if provider == "cpu" else [0],
        verify=False,
    )


def open_engine(setup: Setup) -> EngineContestant:
    """Load the engine as `load_engine` does; the setup's backend says on what."""
    if setup.backend is None:
        raise MeasurementError("an engine's contestant needs to be told its backend")
    backend, _, provider = setup.backend.partition(":")
    engine = load_engine(setup.engine, setup.backend, setup.threads)
    details = {"backend": backend, **({"provider": provider} if provider else {})}
    manifest = engine.manifest
    if manifest is not None and manifest.plan is not None and backend == "tensorrt":
        details["plan"] = f"{manifest.plan.library} {manifest.plan.version}"
        details["profiles"] = ", ".join(map(str, manifest.plan.profiles))
    return EngineContestant(engine, details, on_gpu=provider != "cpu")
