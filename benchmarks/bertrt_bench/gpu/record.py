"""The record of a run: what was asked, what was found, step by step; written anew after each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

import bertrt
from bertrt.cli.console import write_atomically
from bertrt.errors import InputError
from bertrt.machine import Machine
from bertrt_bench.environment import recorded_environment
from bertrt_bench.gpu.bench import Bench
from bertrt_bench.gpu.device import GpuFacts
from bertrt_bench.gpu.lineup import GPU_BASELINE, REHEARSAL_BASELINE, Step
from bertrt_bench.gpu.options import GpuOptions
from bertrt_bench.gpu.subject import Subject
from bertrt_bench.gpu.tables import render
from bertrt_bench.timings import speedup, summarise
from bertrt_bench.work import encoder_operations

FORMAT: Final = "bertrt-gpu-bench"
FORMAT_VERSION: Final = 1

Outcome = Literal["done", "skipped", "failed"]
State = Literal["running", "interrupted", "done"]

# What a time is the time of; for the reader of a record who has not read this package.
INCLUDED: Final = (
    "from token ids in NumPy arrays to the whole answer in float32 in host memory, copies both ways included. "
    "features: the last hidden state of every token comes back; next-sentence: encoder, pooler and head are computed, "
    "and two logits a sequence come back"
)
MEMORY: Final = (
    "what the driver (NVML) says is in use on the whole GPU after every case was answered, less what was before the "
    "contestant's process started: its CUDA context, kernels, weights, activations and caches"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What became of a step.

    Attributes:
        step: which.
        outcome: whether it was done.
        seconds: that it took.
        reason: why not.
        found: what it found.
    """

    step: Step
    outcome: Outcome
    seconds: float
    reason: str | None = None
    found: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "name": self.step.name,
            "kind": self.step.kind,
            "precision": self.step.contender.precision if self.step.contender else self.step.precision,
            "outcome": self.outcome,
            "reason": self.reason,
            "seconds": self.seconds,
            "found": dict(self.found),
        }


@dataclass(slots=True, kw_only=True)
class Record:
    """What is known so far.

    Attributes:
        options: what was asked.
        machine: where it runs.
        gpu: ``None`` in a rehearsal.
        started: time of the start, UTC.
        state: ``running`` until the end.
        duration_seconds: so far.
        subject: what is measured, once it is known.
        probed: the libraries that were found, once it is known.
        bench: where times and agreements are, once there are some.
        steps: so far.
        environment: the variables that change figures, see `bertrt_bench.environment.recorded_environment`.
    """

    options: GpuOptions
    machine: Machine
    gpu: GpuFacts | None
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    state: State = "running"
    duration_seconds: float = 0.0
    subject: Subject | None = None
    probed: Mapping[str, Any] = field(default_factory=dict)
    bench: Bench | None = None
    steps: list[StepRecord] = field(default_factory=list)
    environment: Mapping[str, str] = field(default_factory=recorded_environment)

    @property
    def failed(self) -> list[str]:
        """What failed, a line each: steps, cases of contestants, contestants that left, drift over its budgets."""
        lines = []
        for taken in self.steps:
            name, found = taken.step.name, taken.found
            if taken.outcome == "failed":
                lines.append(f"{name}: {taken.reason}")
            lines += [f"{name}, {case}: {reason}" for case, reason in found.get("failed", {}).items()]
            lines += [
                f"{name}: {contestant} left: {reason}" for contestant, reason in found.get("left", {}).items()
            ]
            lines += [f"{name}: {violation}" for violation in found.get("violations", [])]
        return lines

    def paths(self) -> tuple[Path, Path]:
        """The JSON and the Markdown file; a rehearsal's are never taken for a measurement's."""
        stem = "rehearsal" if self.options.rehearsal else "gpu"
        return self.options.out / f"{stem}.json", self.options.out / f"{stem}.md"

    def reserve(self) -> None:
        """Make the folder, and check that no record lies there.

        Raises:
            InputError: one does, or the folder cannot be made.
        """
        try:
            self.options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot make the folder {str(self.options.out)!r}: {error.strerror}; name another with --out"
            ) from error
        for path in self.paths():
            if path.exists():
                raise InputError(
                    f"{str(path)!r} is there already, and is kept; name another folder with --out"
                )

    def save(self) -> None:
        """Write both files, each whole or not at all.

        Raises:
            OSError: the disk is full or read-only.
        """
        value = self.to_json()
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        for path, content in zip(self.paths(), (text, render(value)), strict=True):
            write_atomically(path, content)

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON value; times in milliseconds, unless a name says otherwise."""
        options, scale = self.options, self.options.scale
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "measurement": "rehearsal on a CPU: nothing here was measured on a GPU"
            if options.rehearsal
            else "measured on a GPU",
            "rehearsal": options.rehearsal,
            "state": self.state,
            "started": self.started.isoformat(timespec="seconds"),
            "duration_seconds": self.duration_seconds,
            "bertrt": bertrt.__version__,
            "command": command_of(options),
            "machine": self.machine.to_json(),
            "gpu": None if self.gpu is None else self.gpu.to_json(),
            "libraries": dict(self.probed),
            "settings": {
                "minutes": options.minutes,
                "threads": options.threads,
                "seed": options.seed,
                **asdict(scale),
                "included": INCLUDED,
                "device_memory": MEMORY,
                "environment": dict(self.environment),
            },
            "subject": None if self.subject is None else self.subject.to_json(),
            "steps": [step.to_json() for step in self.steps],
            "baseline": self._baseline,
            "cases": self._cases(),
            "failed": self.failed,
        }

    @property
    def _baseline(self) -> str:
        return REHEARSAL_BASELINE if self.options.rehearsal else GPU_BASELINE

    def _cases(self) -> list[dict[str, Any]]:
        if self.bench is None or self.subject is None:
            return []
        return [self._case(index, self.subject, self.bench) for index in range(len(self.subject.cases))]

    def _case(self, index: int, subject: Subject, bench: Bench) -> dict[str, Any]:
        case = subject.cases[index]
        operations = encoder_operations(case, subject.architecture)
        baseline = bench.times.get((index, self._baseline), {})
        contestants: dict[str, dict[str, Any]] = {}
        for (number, name), agreement in bench.agreements.items():
            rounds = bench.times.get((number, name), {})
            if number != index:
                continue
            contestants[name] = {
                "agreement": agreement,
                "rounds": sorted(rounds),
                "timings": None,
                "faster": None,
            }
            if not rounds:
                continue
            timings = summarise([rounds[key] for key in sorted(rounds)], case)
            contestants[name] |= {
                "timings": {**asdict(timings), "round_p50_ms": list(timings.round_p50_ms)},
                "operations_per_second": operations / (timings.p50_ms / 1000),
            }
            # Only of rounds in which both took their turn.
            if shared := sorted(set(rounds) & set(baseline)):
                ours, theirs = (
                    summarise([times[key] for key in shared], case) for times in (rounds, baseline)
                )
                contestants[name]["faster"] = asdict(speedup(ours, theirs))
        return {
            "task": case.task,
            "batch": case.batch,
            "sequence": case.sequence,
            "mix": case.lengths is not None,
            "tokens": case.tokens,
            "contestants": contestants,
        }


def command_of(options: GpuOptions) -> str:
    """The command of a run, without the folders of the machine that it ran on."""
    parts = ["python -m bertrt_bench.gpu --out DIR"]
    if options.rehearsal:
        parts.append("--device cpu")
    parts.append(f"--minutes {options.minutes:g}")
    if options.checkpoint is not None:
        given = Path(options.checkpoint)
        parts.append(f"--checkpoint {given.name if given.exists() else options.checkpoint}")
    if options.text is not None:
        parts.append(f"--text {options.text.name}")
    if options.lengths_from is not None:
        parts.append(f"--lengths-from {options.lengths_from.name}")
    if options.only:
        parts.append(f"--only {','.join(options.only)}")
    if options.seed:
        parts.append(f"--seed {options.seed}")
    return " ".join(parts)
