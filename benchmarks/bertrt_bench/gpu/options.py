"""What the user asks of a run, and how much of everything a run has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from bertrt.errors import InputError
from bertrt.machine import usable_cpus
from bertrt_bench.cases import Task

Device = Literal["cuda", "cpu"]
DEFAULT_MINUTES: Final = 9.5
# A lease of a machine for hours is no reason to measure for hours.
_MOST_MINUTES: Final = 24 * 60
RANDOM_MODEL: Final = "bert-base-cased"
DEMO: Final = "demo"

# The whole last hidden state comes back to the host, or a few bytes a sequence: the difference is the way back.
TASKS: Final[tuple[Task, ...]] = ("features", "next-sentence")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is measured.

    Attributes:
        shapes: sequences and tokens of each.
        rounds: of one step of turns.
        turn_seconds: timed seconds of a turn at least.
        turn_runs: timed runs of a turn at least.
        warmup: runs before them; a turn begins with a GPU that was another's.
        examples: of the drift check.
        paragraphs: of the mix of lengths at most.
        profiles: of plans, ``()`` for those that ``bertrt build`` chooses.
        drift_profiles: of plans that are built for the drift check alone.
    """

    shapes: tuple[tuple[int, int], ...]
    rounds: int
    turn_seconds: float
    turn_runs: int
    warmup: int
    examples: int
    paragraphs: int
    profiles: tuple[str, ...] = ()
    drift_profiles: tuple[str, ...] = ("1x1..8x128..32x512",)


FULL: Final = Scale(
    shapes=((1, 128), (8, 128), (32, 128), (1, 384), (32, 384)),
    rounds=2,
    turn_seconds=0.1,
    turn_runs=5,
    warmup=5,
    examples=400,
    paragraphs=512,
)
REHEARSAL: Final = Scale(
    shapes=((1, 16), (2, 32)),
    rounds=1,
    turn_seconds=0.02,
    turn_runs=2,
    warmup=1,
    examples=12,
    paragraphs=8,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuOptions:
    """One run.

    Attributes:
        out: the folder for the record; made if it is not there.
        device: ``cuda``, or ``cpu`` for a rehearsal.
        minutes: that the run may take.
        checkpoint: whose speed and drift is measured; ``None``: for the speed random weights in bert-base-cased's
            shape, for the drift the demo checkpoint, as random weights have no answers to lose; in a rehearsal the demo
            checkpoint for both.
        text: for the drift check; ``None``: the built-in one.
        lengths_from: a text whose paragraphs' lengths are the mix; ``None``: the built-in one.
        only: words of the names of steps that are taken; none: all.
        seed: of the token ids.

    Raises:
        InputError: a value out of range.
    """

    out: Path
    device: Device = "cuda"
    minutes: float = DEFAULT_MINUTES
    checkpoint: str | None = None
    text: Path | None = None
    lengths_from: Path | None = None
    only: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.device not in get_args(Device):
            raise InputError(f"device must be one of {', '.join(get_args(Device))}, got {self.device!r}")
        if not math.isfinite(self.minutes) or not 0 < self.minutes <= _MOST_MINUTES:
            raise InputError(
                f"minutes must be a number above 0 and at most {_MOST_MINUTES}, got {self.minutes}"
            )
        if type(self.seed) is not int or self.seed < 0:
            raise InputError(f"seed must be a whole number of at least 0, got {self.seed!r}")
        if not all(self.only):
            raise InputError("--only has an empty word, which every step's name holds; leave it out")
        for name, path in (("text", self.text), ("lengths-from", self.lengths_from)):
            if path is not None and not path.is_file():
                raise InputError(f"--{name} {str(path)!r} is no file; name a text in UTF-8")

    @property
    def rehearsal(self) -> bool:
        """Whether no GPU takes part."""
        return self.device == "cpu"

    @property
    def scale(self) -> Scale:
        """How much is measured."""
        return REHEARSAL if self.rehearsal else FULL

    @property
    def threads(self) -> int:
        """Of every process."""
        return usable_cpus()

    @property
    def speed_source(self) -> tuple[str, bool]:
        """The checkpoint whose speed is measured, and whether its weights are random."""
        if self.checkpoint is not None:
            return self.checkpoint, False
        return (DEMO, False) if self.rehearsal else (RANDOM_MODEL, True)

    @property
    def drift_source(self) -> str:
        """The checkpoint whose drift is measured."""
        return self.checkpoint if self.checkpoint is not None else DEMO
