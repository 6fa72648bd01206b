"""What the user asks of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from bertrt.errors import InputError
from bertrt_bench.options import BenchOptions

Model = Literal["bert-base-cased", "demo"]
# The one that the bars are made for, and the one that is small enough to try the run with.
BASE: Final[Model] = "bert-base-cased"
DEMO: Final[Model] = "demo"
DEFAULT_SECONDS: Final = BenchOptions(engine=DEMO).seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuOptions:
    """One run.

    Attributes:
        out: the folder for the records; made if it is not there.
        model: whose speed is measured; drift is always that of the demo checkpoint, as random weights have no
            answers to lose.
        threads: of everyone; ``None`` for all the CPUs that this process may use.
        seconds: timed seconds of each contestant in each case, where no number of runs is fixed.
        only: words of the names of steps that are taken; none: all.
        lengths_from: a text whose paragraphs' lengths are the mix; ``None``: the built-in one.

    Raises:
        InputError: a value out of range.
    """

    out: Path
    model: Model = BASE
    threads: int | None = None
    seconds: float = DEFAULT_SECONDS
    only: Sequence[str] = ()
    lengths_from: Path | None = None

    def __post_init__(self) -> None:
        if self.model not in get_args(Model):
            raise InputError(f"model must be one of {', '.join(get_args(Model))}, got {self.model!r}")
        # What `bertrt bench` would refuse is refused before minutes have gone by.
        BenchOptions(engine=self.model, threads=self.threads, seconds=self.seconds)
        if not all(self.only):
            raise InputError("--only has an empty word, which every step's name holds; leave it out")
        if self.lengths_from is not None and not self.lengths_from.is_file():
            raise InputError(f"--lengths-from {str(self.lengths_from)!r} is no file; name a text in UTF-8")

    @property
    def thread_count(self) -> int:
        """Threads of everyone."""
        return BenchOptions(engine=self.model, threads=self.threads).thread_count

    @property
    def command(self) -> str:
        """The command of the run, without the folders of the machine that it ran on."""
        parts = ["python -m bertrt_bench.cpu --out DIR"]
        if self.model != BASE:
            parts.append(f"--model {self.model}")
        if self.threads is not None:
            parts.append(f"--threads {self.threads}")
        if self.seconds != DEFAULT_SECONDS:
            parts.append(f"--seconds {self.seconds:g}")
        if self.only:
            parts.append(f"--only {','.join(self.only)}")
        if self.lengths_from is not None:
            parts.append(f"--lengths-from {self.lengths_from.name}")
        return " ".join(parts)
