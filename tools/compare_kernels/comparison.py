"""Builds in turn, in one process, so that what happens on the machine meanwhile meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from .library import Library

# Runs of one build before the next one's turn, after one that is not timed: it finds caches as its own runs leave them.
_RUNS_IN_A_TURN: Final = 3
# Turns of each at least, however long they take.
_FEWEST_TURNS: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One build's runs of one shape.

    Attributes:
        median_ms: of the runs.
        tenth_ms: a tenth of the runs were faster.
        ratio: median of each turn's time relative to the first build's in the same turn; below 1 is faster.
        difference: the largest of a hidden state from the first build's; 0: the same bits.
        runs: timed.
    """

    median_ms: float
    tenth_ms: float
    ratio: float
    difference: float
    runs: int


def compare(libraries: Sequence[Library], batch: int, sequence: int, *, seconds: float) -> list[Figure]:
    """Time the encoder on ``batch`` sequences of ``sequence`` tokens with each build, for some seconds in all."""
    first = libraries[0]
    rng = np.random.default_rng(0)
    ids = rng.integers(0, first.vocab_size, size=(batch, sequence)).astype(np.int32)
    prepared = [library.prepare(ids) for library in libraries]
    for run, _ in prepared:
        run()
    times: list[list[list[float]]] = [[] for _ in libraries]
    start, turns = time.perf_counter(), 0
    while turns < _FEWEST_TURNS or time.perf_counter() - start < seconds:
        # To and fro, so that nobody always follows the same one.
        for which in range(len(libraries))[:: -1 if turns % 2 else 1]:
            run = prepared[which][0]
            run()
            times[which].append([_timed(run) for _ in range(_RUNS_IN_A_TURN)])
        turns += 1
    reference = prepared[0][1]
    figures = []
    for turns_of_one, (_, states) in zip(times, prepared, strict=True):
        each = sorted(1e3 * run for turn in turns_of_one for run in turn)
        ratios = [min(own) / min(base) for own, base in zip(turns_of_one, times[0], strict=True)]
        figure = Figure(
            median_ms=statistics.median(each),
            tenth_ms=each[len(each) // 10],
            ratio=statistics.median(ratios),
            difference=float(np.abs(states - reference).max()),
            runs=len(each),
        )
        figures.append(figure)
    return figures


def _timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
