"""How long a contestant is waited for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Patience(Protocol):
    """The time that requests may take."""

    def seconds(self, measured: float) -> float:
        """Seconds that a request may take from now.

        Args:
            measured: seconds that it is asked to measure for.
        """
        ...

    @property
    def advice(self) -> str:
        """What whoever finds them too few can do, for the end of a message."""
        ...


@dataclass(frozen=True, slots=True)
class StepTimeout:
    """So many seconds for each request, beyond those that it measures for."""

    timeout: float

    def seconds(self, measured: float) -> float:
        """See `Patience.seconds`."""
        return self.timeout + measured

    @property
    def advice(self) -> str:
        """See `Patience.advice`."""
        return "measure smaller shapes or raise --timeout"
