"""The figures against NumPy and against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertrt.errors import MeasurementError
from bertrt_bench.cases import Case
from bertrt_bench.timings import speedup, summarise

CASE = Case(task="features", batch=4, sequence=32)


@given(
    st.lists(
        st.lists(st.integers(min_value=1, max_value=10**12), min_size=1, max_size=20), min_size=1, max_size=6
    )
)
def test_figures_are_those_of_numpy(rounds: list[list[int]]) -> None:
    figures = summarise(rounds, CASE)
    times = np.concatenate([np.array(times) for times in rounds]) / 1e6
    assert figures.runs == len(times)
    for name, percentile in (("p50_ms", 50), ("p90_ms", 90), ("p99_ms", 99)):
        # A percentile lies below one run at least.
        if len(times) * (100 - percentile) >= 100 or percentile == 50:
            assert getattr(figures, name) == pytest.approx(np.percentile(times, percentile))
        else:
            assert getattr(figures, name) is None
    assert figures.mean_ms == pytest.approx(np.mean(times))
    assert figures.min_ms == times.min()
    assert figures.max_ms == times.max()
    if len(times) > 1:
        # The squares of nearly equal times cancel, in NumPy's sum as in any other.
        assert figures.std_ms == pytest.approx(np.std(times, ddof=1), abs=1e-9 * times.max())
    assert figures.round_p50_ms == pytest.approx([np.median(times) / 1e6 for times in rounds])
    assert figures.sequences_per_second == pytest.approx(1000 * 4 * len(times) / times.sum())
    assert figures.tokens_per_second == pytest.approx(32 * figures.sequences_per_second)


def test_percentiles_are_interpolated() -> None:
    # 1 to 100 ms: ranks 0 to 99, p90 at rank 89.1, p99 at rank 98.01.
    figures = summarise([[ms * 1_000_000 for ms in range(100, 0, -1)]], CASE)
    assert figures.p50_ms == pytest.approx(50.5)
    assert figures.p90_ms == pytest.approx(90.1)
    assert figures.p99_ms == pytest.approx(99.01)


def test_rounds_are_one_sample_with_medians_of_their_own() -> None:
    figures = summarise([[3_000_000, 1_000_000], [5_000_000, 2_000_000, 4_000_000]], CASE)
    assert figures.p50_ms == pytest.approx(3.0)
    assert figures.std_ms == pytest.approx(np.sqrt(2.5))
    assert figures.round_p50_ms == (2.0, 4.0)


@pytest.mark.parametrize(
    ("runs", "told"), [(9, (False, False)), (10, (True, False)), (99, (True, False)), (100, (True, True))]
)
def test_percentiles_that_too_few_runs_do_not_tell(runs: int, told: tuple[bool, bool]) -> None:
    figures = summarise([[1_000_000] * runs], CASE)
    assert (figures.p90_ms is not None, figures.p99_ms is not None) == told


def test_throughput_counts_whole_batches() -> None:
    figures = summarise([[2_000_000, 2_000_000]], CASE)
    assert figures.sequences_per_second == pytest.approx(2000)
    assert figures.tokens_per_second == pytest.approx(64_000)


def test_one_run_has_no_deviation() -> None:
    figures = summarise([[7_000_000]], CASE)
    assert (figures.runs, figures.p50_ms, figures.std_ms, figures.p99_ms) == (1, 7.0, None, None)


@pytest.mark.parametrize("rounds", [[], [[]], [[1], []], [[1, 0]], [[-1]]])
def test_times_that_are_none_are_refused(rounds: list[list[int]]) -> None:
    with pytest.raises(MeasurementError, match="round has no timed run|clock did not advance"):
        summarise(rounds, CASE)


def test_speedup_is_the_ratio_of_medians() -> None:
    ours = summarise([[1_000_000, 1_000_000, 9_000_000], [2_000_000]], CASE)
    theirs = summarise([[3_000_000], [3_000_000, 3_000_000, 5_000_000]], CASE)
    found = speedup(ours, theirs)
    assert found.median == pytest.approx(3.0 / 1.5)
    assert (found.low, found.high) == pytest.approx((1.5, 3.0))


def test_contestants_with_other_rounds_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        speedup(summarise([[1], [1]], CASE), summarise([[1]], CASE))
