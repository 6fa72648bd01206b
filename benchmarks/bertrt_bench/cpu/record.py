"""What a run has found so far: a file for each measurement, and a summary that is written anew after each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from bertrt.errors import InputError
from bertrt.machine import Machine
from bertrt_bench.cpu.abilities import Abilities
from bertrt_bench.cpu.options import CpuOptions
from bertrt_bench.cpu.plan import Step

Outcome = Literal["done", "skipped", "failed"]
State = Literal["running", "interrupted", "done"]
SUMMARY: Final = "cpu.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What became of a step.

    Attributes:
        step: which.
        outcome: whether it was done.
        seconds: that it took.
        reason: why not.
        value: the record that it left.
    """

    step: Step
    outcome: Outcome
    seconds: float = 0.0
    reason: str = ""
    value: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Record:
    """What is known so far.

    Attributes:
        options: what was asked.
        machine: where it runs.
        abilities: of the machine.
        plan: all the steps of a run.
        steps: those that are taken.
        environment: variables that change how engines run.
        started: time of the start, UTC.
        state: ``running`` until the end.
        duration_seconds: so far.
        taken: so far.
    """

    options: CpuOptions
    machine: Machine
    abilities: Abilities
    plan: Sequence[Step]
    steps: Sequence[Step]
    environment: Mapping[str, str] = field(default_factory=dict)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    state: State = "running"
    duration_seconds: float = 0.0
    taken: list[Taken] = field(default_factory=list)

    @property
    def summary(self) -> Path:
        """The file for people."""
        return self.options.out / SUMMARY

    def path(self, step: Step) -> Path:
        """The file of a measurement."""
        return self.options.out / f"{step.name}.json"

    def done(self, name: str) -> Taken | None:
        """What a step of this name found, if it was done."""
        return next(
            (taken for taken in self.taken if taken.step.name == name and taken.outcome == "done"), None
        )

    def why_not(self, name: str) -> str:
        """Why a step of this name left no record."""
        for taken in self.taken:
            if taken.step.name == name:
                return f"{name} failed" if taken.outcome == "failed" else taken.reason
        if any(step.name == name for step in self.steps):
            return "the run ended before it"
        return "left out by --only"

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
        # Those of steps that are not taken too: a folder holds one run.
        for path in (self.summary, *map(self.path, self.plan)):
            if path.exists():
                raise InputError(
                    f"{str(path)!r} is there already, and is kept; name another folder with --out"
                )
