"""What the steps of a run do: engines, contestants that come and stay, turns, drift."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bertrt.errors import BackendUnavailableError, BertRTError, MeasurementError
from bertrt.manifest import Precision
from bertrt_bench.agreement import rows_compared
from bertrt_bench.cases import Case
from bertrt_bench.contestants import Setup
from bertrt_bench.gpu.abilities import Abilities
from bertrt_bench.gpu.clock import Share
from bertrt_bench.gpu.device import Gpu
from bertrt_bench.gpu.judge import Judge
from bertrt_bench.gpu.lineup import ONNX, ONNXRUNTIME, TENSORRT, Contender, Step
from bertrt_bench.gpu.options import GpuOptions
from bertrt_bench.gpu.processes import run_job
from bertrt_bench.gpu.subject import Subject
from bertrt_bench.process import ContestantProcess
from bertrt_bench.turns import order_of_round

# Seconds more for a case, or a turn, that was begun within its step's time: what is cut off costs the contestant.
_CASE_GRACE: Final = 60.0
_TURN_GRACE: Final = 15.0
# No turn begins with less than this before the very end.
_LEAST_TURN: Final = 2.0


@dataclass(slots=True, kw_only=True)
class Present:
    """A contestant that has been started.

    Attributes:
        contender: who.
        process: where.
        cases: the indices of those that it has prepared and answered as the others do.
    """

    contender: Contender
    process: ContestantProcess
    cases: list[int] = field(default_factory=list)


class Bench:
    """Carries out steps; a context manager that ends all processes.

    Attributes:
        present: the contestants that are there, by name.
        times: by case (its index) and contestant: for each round, by its number, the nanoseconds of each run.
        agreements: by case and contestant what `bertrt_bench.gpu.judge.Judge.check` found.

    Args:
        options: of the run.
        subject: what is measured.
        libraries: what was found of each, see `bertrt_bench.gpu.jobs.probe`.
        gpu: ``None`` in a rehearsal.
        scratch: a folder for engines and for what processes write.
    """

    def __init__(
        self,
        options: GpuOptions,
        subject: Subject,
        libraries: Mapping[str, Mapping[str, str | None]],
        *,
        gpu: Gpu | None,
        scratch: Path,
    ) -> None:
        self.present: dict[str, Present] = {}
        self.times: dict[tuple[int, str], dict[int, list[int]]] = {}
        self.agreements: dict[tuple[int, str], dict[str, Any]] = {}
        self._options = options
        self._subject = subject
        self._abilities = Abilities(libraries, gpu)
        self._gpu = gpu
        self._scratch = scratch
        self._judge = Judge(architecture=subject.architecture)
        self._engines: dict[Precision, Path] = {}
        self._planned: set[Precision] = set()
        self._rounds = 0
        self._folders = 0

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        for here in self.present.values():
            here.process.abandon()

    def take(self, step: Step, share: Share) -> dict[str, Any]:
        """Take a step within its share of the time, and return what a record says of it.

        Raises:
            BackendUnavailableError: it cannot be taken here; says what is missing.
            BertRTError, OSError: it failed.
        """
        if step.kind == "turns":
            return self.turns(share)
        if step.kind == "contestant" and step.contender is not None:
            return self.enter(step.contender, share)
        if step.precision is None:
            raise MeasurementError(f"the step {step.name!r} says not of what; this is a defect of the lineup")
        return (self.engine if step.kind == "engine" else self.drift)(step.precision, share)

    def engine(self, precision: Precision, share: Share) -> dict[str, Any]:
        """Export an engine, and build its plan where TensorRT is installed."""
        self._abilities.require_precision(precision)
        # Says what is missing if nothing here could run it.
        self._abilities.engine_backend()
        subject, out = self._subject, self._scratch / f"engine-{precision}"
        found = self._export(subject.checkpoint, subject.random, precision, out, share)
        self._engines[precision] = out
        if not self._abilities.builds_plans:
            return found
        found |= self._build(out, self._options.scale.profiles, share)
        self._planned.add(precision)
        return found

    def enter(self, contender: Contender, share: Share) -> dict[str, Any]:
        """Start a contestant, let it prepare and answer every case, and keep it for the turns.

        A case for which the time does not suffice is left out by name; one that it cannot prepare, or answers
        otherwise than the others do, has failed by name. If no case is left, the contestant has failed.
        """
        self._abilities.require_precision(contender.precision)
        self._abilities.require(*contender.needs)
        engine = self._engine_of(contender)
        before = None if self._gpu is None else self._gpu.used_bytes()
        began = time.monotonic()
        setup = Setup(
            engine=str(engine),
            threads=self._options.threads,
            backend=contender.backend,
            reference=str(self._subject.weights),
            precision=contender.precision,
        )
        patience = share.with_grace(_CASE_GRACE)
        process = ContestantProcess(contender.kind, setup, self._folder(), patience=patience)
        here = Present(contender=contender, process=process)
        with contextlib.ExitStack() as stack:
            stack.callback(process.abandon)
            process.__enter__()
            cases = self._prepare_all(here, share)
            after = None if self._gpu is None else self._gpu.used_bytes()
            self.present[contender.name] = here
            stack.pop_all()
        return {
            "description": contender.description,
            "precision": contender.precision,
            "versions": dict(process.versions),
            "details": dict(process.details),
            "ready_seconds": time.monotonic() - began,
            "device_memory_bytes": None if before is None or after is None else after - before,
            **cases,
        }

    def turns(self, share: Share) -> dict[str, Any]:
        """Let all who are there run their cases: in each round, for each case, one contestant after the other.

        Whoever fails leaves, and the others go on.
        """
        if not self.present:
            raise BackendUnavailableError("no contestant is there; the steps before say why")
        before = self._state()
        for here in self.present.values():
            here.process.patience = share.with_grace(_TURN_GRACE)
        rounds: list[int] = []
        left: dict[str, str] = {}
        complete = all(self._round(rounds, left, share) for _ in range(self._options.scale.rounds))
        return {
            "rounds": rounds,
            "complete": complete,
            "left": left,
            "restless": {
                name: here.process.restless for name, here in self.present.items() if here.process.restless
            },
            "gpu_before": before,
            "gpu_after": self._state(),
        }

    def drift(self, precision: Precision, share: Share) -> dict[str, Any]:
        """Compare an engine with PyTorch float32."""
        self._abilities.require_precision(precision)
        backend, source = self._abilities.engine_backend(), self._options.drift_source
        made: dict[str, Any] = {}
        if (source, False) == self._options.speed_source:
            checkpoint = self._subject.checkpoint
            if precision not in self._engines or (backend == TENSORRT and precision not in self._planned):
                raise BackendUnavailableError(_no_engine(precision))
            # Its name alone: a record tells nothing of the machine's folders.
            folder, source = self._engines[precision], self._subject.source.name
        else:
            folder, checkpoint = self._scratch / f"drift-{precision}", source
            made = self._export(checkpoint, False, precision, folder, share)
            if backend == TENSORRT:
                made |= self._build(folder, self._options.scale.drift_profiles, share)
        request = {
            "checkpoint": checkpoint,
            "folder": str(folder),
            "backend": backend,
            "device": self._options.device,
            "text": None if self._options.text is None else str(self._options.text.absolute()),
            "examples": self._options.scale.examples,
            "threads": self._options.threads,
        }
        return {"precision": precision, "source": source, **made, **self._job("drift", request, share)}

    def _prepare_all(self, here: Present, share: Share) -> dict[str, dict[str, str]]:
        """Prepare every case; return those that are ``left_out`` and those that ``failed``, each with the reason.

        Raises:
            MeasurementError: the process is of no use any more, or no case is left.
        """
        left_out: dict[str, str] = {}
        failed: dict[str, str] = {}
        name, took = here.contender.name, 0.0
        for index, case in enumerate(self._subject.cases):
            if case.lengths is not None and not here.contender.mixes:
                left_out[str(case)] = "compiled for fixed shapes; each block of a mix would be compiled anew"
                continue
            # A case takes about as long as the one before it.
            if share.left <= 0 or here.process.patience.seconds(0.0) < took:
                left_out[str(case)] = "the cases before it used up the time of the step"
                continue
            began = time.monotonic()
            try:
                self._prepare(here, index, case)
            except BertRTError as error:
                if not here.process.usable:
                    raise
                failed[str(case)] = str(error)
            took = time.monotonic() - began
        if not here.cases:
            reasons = [*failed.values(), *left_out.values()]
            raise MeasurementError(f"no case is left to {name}: {reasons[0] if reasons else 'there is none'}")
        return {"left_out": left_out, "failed": failed}

    def _prepare(self, here: Present, index: int, case: Case) -> None:
        contender = here.contender
        here.process.prepare(index, case, self._subject.questions[index])
        answer = here.process.answer(index, case, rows=rows_compared(case, self._subject.architecture))
        self.agreements[index, contender.name] = self._judge.check(
            contender.name, contender.precision, case, answer
        )
        here.cases.append(index)

    def _round(self, rounds: list[int], left: dict[str, str], share: Share) -> bool:
        """Run a round; false if the time did not suffice."""
        scale = self._options.scale
        if share.left <= 0:
            return False
        self._rounds += 1
        rounds.append(self._rounds)
        for index, case in enumerate(self._subject.cases):
            for name, here in order_of_round(list(self.present.items()), self._rounds):
                if index not in here.cases:
                    continue
                if share.left <= 0 or here.process.patience.seconds(0.0) < _LEAST_TURN + scale.turn_seconds:
                    return False
                try:
                    turn = here.process.time(
                        index, case, warmup=scale.warmup, runs=scale.turn_runs, seconds=scale.turn_seconds
                    )
                except BertRTError as error:
                    left[name] = str(error)
                    del self.present[name]
                    here.process.abandon()
                else:
                    self.times.setdefault((index, name), {})[self._rounds] = turn
        return True

    def _engine_of(self, contender: Contender) -> Path | str:
        precision = contender.precision
        if not contender.engine:
            return ""
        if precision not in self._engines or (
            contender.backend == TENSORRT and precision not in self._planned
        ):
            raise BackendUnavailableError(_no_engine(precision))
        return self._engines[precision]

    def _export(
        self, checkpoint: str, random: bool, precision: Precision, out: Path, share: Share
    ) -> dict[str, Any]:
        self._abilities.require(ONNX, ONNXRUNTIME)
        request = {"checkpoint": checkpoint, "random": random, "precision": precision, "out": str(out)}
        return self._job("export", request, share)

    def _build(self, folder: Path, profiles: tuple[str, ...], share: Share) -> dict[str, Any]:
        return self._job("build", {"folder": str(folder), "profiles": list(profiles)}, share)

    def _job(self, name: str, request: Mapping[str, Any], share: Share) -> dict[str, Any]:
        return run_job(name, request, folder=self._folder(), threads=self._options.threads, share=share)

    def _state(self) -> dict[str, Any] | None:
        return None if self._gpu is None else self._gpu.state().to_json()

    def _folder(self) -> Path:
        self._folders += 1
        folder = self._scratch / f"process-{self._folders}"
        folder.mkdir()
        return folder


def _no_engine(precision: Precision) -> str:
    return f"there is no engine in {precision} for it; the step 'engine {precision}' says why"
