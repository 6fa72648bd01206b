"""The time that a run may take, and what is left of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from bertrt_bench.gpu.options import DEFAULT_MINUTES

# With less than this (in seconds) no step begins: a process alone takes some seconds to start.
LEAST: Final = 5.0


@dataclass(slots=True, kw_only=True)
class Clock:
    """Counts down from the start.

    Attributes:
        seconds: that the whole run may take.
        now: seconds since whenever.
    """

    seconds: float
    now: Callable[[], float] = time.monotonic
    _start: float = field(init=False)

    def __post_init__(self) -> None:
        self._start = self.now()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return self.now() - self._start

    @property
    def left(self) -> float:
        """Seconds until the end; negative after it."""
        return self.seconds - self.spent

    def share(self, most: float, *, kept: float = 0.0) -> Share | None:
        """Time for one step, or ``None`` if too little is left to begin it.

        Args:
            most: seconds that the step may take.
            kept: seconds that must be left after it.
        """
        left = self.left - kept
        granted = min(most, left)
        if granted < LEAST:
            return None
        return Share(clock=self, end=self.spent + granted, limit=self.seconds - kept, own=most < left)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The time of one step. It ends when it is used up, whatever is left of the run.

    Attributes:
        clock: of the run.
        end: in seconds since the run's start.
        limit: where no grace goes beyond.
        own: whether it is the step's own limit that ends it, and not the run's end.
    """

    clock: Clock
    end: float
    limit: float
    own: bool = False

    @property
    def left(self) -> float:
        """Seconds until its end; negative after it."""
        return self.end - self.clock.spent

    def seconds(self, measured: float) -> float:  # noqa: ARG002 - what is measured is within the share
        """How long a request may take from now; see `bertrt_bench.patience.Patience`."""
        return max(0.0, self.left)

    @property
    def advice(self) -> str:
        """What to do when it is used up."""
        if self.own:
            return (
                "its step may take no longer; give --minutes more than before, and more than "
                f"{DEFAULT_MINUTES:g}, with which that grows"
            )
        return "the time of the run is used up; raise --minutes, or name fewer steps with --only"

    def with_grace(self, seconds: float) -> Share:
        """The same, with some seconds more to finish what was begun in time."""
        return replace(self, end=min(self.end + seconds, self.limit))
