"""Latency of the demo engine and of PyTorch, by pytest-benchmark: ``pytest benchmarks/ --benchmark-only``.

pytest-benchmark times a function in its own process, and would put all contestants into it, with their
thread pools that spin beside one another. So here the contestants run as they do under ``bertrt bench``:
each in a process of its own, with as many threads, in turns, after their answers were checked, each timed by
the clock of its own process. What is "benchmarked" replays the times that came back, run by run, on a clock
that those times drive: pytest-benchmark keeps the books, compares and saves them, and no time of the pipes
between the processes is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bertrt import machine
from bertrt_bench.cases import TASKS, Case, Task
from bertrt_bench.timings import summarise


class ReplayClock:
    """A clock that stands still but for the times that are put on it."""

    __name__ = "ReplayClock"

    def __init__(self) -> None:
        self._nanoseconds = 0

    def __call__(self) -> float:
        """Seconds since the start."""
        return self._nanoseconds / 1e9

    def replay(self, times: Iterator[int]) -> None:
        """Let the next time pass."""
        self._nanoseconds += next(times)


CLOCK = ReplayClock()


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("contestant", ["engine", "torch"])
@pytest.mark.parametrize("sequence", [16, 128])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_latency(
    benchmark: Any,
    suite: Callable[[str], Any],
    precision: str,
    task: Task,
    batch: int,
    sequence: int,
    contestant: str,
) -> None:
    """One run of one contestant; PyTorch is always float32, beside the engine of the precision named."""
    case = Case(task=task, batch=batch, sequence=sequence)
    measured = suite(precision).measure(case)
    rounds = measured.times[contestant]
    times = [time for times in rounds for time in times]
    timings = summarise(rounds, case)
    benchmark.group = f"{case}, {precision}"
    benchmark.extra_info.update(
        p90_ms=timings.p90_ms,
        p99_ms=timings.p99_ms,
        sequences_per_second=timings.sequences_per_second,
        tokens_per_second=timings.tokens_per_second,
        threads=measured.contestants[contestant].threads,
        versions=dict(measured.contestants[contestant].versions),
        relative_error=measured.agreement.error,
        machine=machine.describe().to_json(),
    )
    replayed = iter(times)
    benchmark.pedantic(CLOCK.replay, args=(replayed,), rounds=len(times))
    assert measured.agreement.error <= measured.agreement.tolerance
