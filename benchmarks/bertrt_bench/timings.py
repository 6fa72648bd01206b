"""From the times of single runs to the figures of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bertrt.errors import MeasurementError
from bertrt_bench.cases import Case

_NANOSECONDS_PER_MS = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """The figures of one contestant in one case. Times are in milliseconds for one run of the whole batch.

    Attributes:
        runs: timed runs, all rounds together.
        p50_ms: median; the percentiles are interpolated linearly, as NumPy's are.
        p90_ms: 90th percentile; ``None`` of fewer than 10 runs, which do not tell it from the slowest.
        p99_ms: 99th percentile; ``None`` of fewer than 100 runs.
        mean_ms: mean.
        std_ms: sample standard deviation (``runs - 1``); ``None`` of a single run.
        min_ms: fastest run.
        max_ms: slowest run.
        round_p50_ms: the median of each round: what differs between them is the machine, not the contestant.
        sequences_per_second: sequences of all timed runs over their time.
        tokens_per_second: tokens (special ones included) of all timed runs over their time.
    """

    runs: int
    p50_ms: float
    p90_ms: float | None
    p99_ms: float | None
    mean_ms: float
    std_ms: float | None
    min_ms: float
    max_ms: float
    round_p50_ms: tuple[float, ...]
    sequences_per_second: float
    tokens_per_second: float


def summarise(rounds: Sequence[Sequence[int]], case: Case) -> Timings:
    """Compute the figures.

    Args:
        rounds: nanoseconds of every timed run, by round.
        case: what one run computed.

    Raises:
        MeasurementError: a round without a run, or a time that is not positive.
    """
    if not rounds or not all(rounds):
        raise MeasurementError(f"{case}: a round has no timed run; raise --repeats or --seconds")
    times = np.concatenate([np.asarray(times, dtype=np.float64) for times in rounds]) / _NANOSECONDS_PER_MS
    if not bool(np.all(times > 0)):
        raise MeasurementError(f"{case}: the clock did not advance during a run; use larger shapes")
    runs_per_second = 1000.0 * times.size / float(times.sum())
    return Timings(
        runs=int(times.size),
        p50_ms=float(np.median(times)),
        p90_ms=_percentile(times, 90),
        p99_ms=_percentile(times, 99),
        mean_ms=float(times.mean()),
        std_ms=float(times.std(ddof=1)) if times.size > 1 else None,
        min_ms=float(times.min()),
        max_ms=float(times.max()),
        round_p50_ms=tuple(float(np.median(times)) / _NANOSECONDS_PER_MS for times in rounds),
        sequences_per_second=case.batch * runs_per_second,
        tokens_per_second=case.tokens * runs_per_second,
    )


def _percentile(times: npt.NDArray[np.float64], percent: int) -> float | None:
    # One run at least must lie beyond it.
    return float(np.percentile(times, percent)) if times.size * (100 - percent) >= 100 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedup:
    """How many times faster the engine was than a rival.

    Attributes:
        median: the rival's median time over the engine's, all rounds together.
        low: the smallest ratio of the two medians within one round.
        high: the largest of them.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


def speedup(ours: Timings, theirs: Timings) -> Speedup:
    """Compare two contestants that took turns in the same rounds."""
    pairs = zip(ours.round_p50_ms, theirs.round_p50_ms, strict=True)
    ratios = [rival / engine for engine, rival in pairs]
    return Speedup(median=theirs.p50_ms / ours.p50_ms, low=min(ratios), high=max(ratios))
