"""Ranges, histograms and thresholds against brute force over the values themselves."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bertrt.errors import CalibrationError
from bertrt_export.calibration.channels import ChannelRanges, balance
from bertrt_export.calibration.histogram import BINS, Histogram
from bertrt_export.calibration.thresholds import (
    entropy_threshold,
    mse_threshold,
    percentile_threshold,
    quantize_dequantize,
)

LARGEST = {"int8": 127.0, "fp8": 448.0}
Array = npt.NDArray[Any]


def e4m3_values() -> Array:
    """Every finite magnitude of the type, from its definition: 4 bits of exponent, bias 7; 3 of mantissa; one NaN."""
    values = [mantissa * 2.0**-9 for mantissa in range(8)]
    values += [
        (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        for exponent, mantissa in itertools.product(range(1, 16), range(8))
    ]
    return np.array(values[:-1])


def rounded(magnitudes: Array, threshold: float, kind: str) -> Array:
    """Magnitudes after quantising and dequantising: the nearest of the type's values, found by looking at all."""
    values = np.arange(128.0) if kind == "int8" else e4m3_values()
    assert values.max() == LARGEST[kind]
    scale = threshold / LARGEST[kind]
    borders = (values[1:] + values[:-1]) / 2
    return values[np.searchsorted(borders, magnitudes / scale)] * scale


def histogram_of(values: Array) -> Histogram:
    histogram = Histogram()
    histogram.add(np.abs(values).astype(np.float32))
    return histogram


def laplace(count: int = 50_000) -> Array:
    return np.abs(np.random.default_rng(0).laplace(size=count))


def test_a_histogram_counts_every_value_where_it_lies() -> None:
    values = laplace().astype(np.float32)
    histogram = histogram_of(values)
    assert histogram.largest == values.max()
    expected, _ = np.histogram(values, bins=BINS, range=(0, histogram.width * BINS))
    np.testing.assert_array_equal(histogram.counts, expected)
    # The range is less than twice what it must be.
    assert values.max() < histogram.width * BINS <= 2 * values.max()


@pytest.mark.parametrize("order", ["rising", "falling", "zeros first", "mixed"])
def test_batches_in_any_order_give_the_same_histogram(order: str) -> None:
    generator = np.random.default_rng(1)
    # From subnormals' neighbourhood to thousands: the range doubles some thirty times on the way.
    batches = [(generator.random(1000) * 8.0**power).astype(np.float32) for power in range(-6, 5)]
    batches.append(np.zeros(1000, np.float32))
    if order == "falling":
        batches.reverse()
    elif order == "zeros first":
        batches.insert(0, batches.pop())
    elif order == "mixed":
        batches = [batches[index] for index in generator.permutation(len(batches))]
    streamed = Histogram()
    for batch in batches:
        streamed.add(batch.reshape(10, 100))
    whole = histogram_of(np.concatenate(batches))
    np.testing.assert_array_equal(streamed.counts, whole.counts)
    assert (streamed.width, streamed.largest) == (whole.width, whole.largest)
    assert whole.counts.sum() == sum(batch.size for batch in batches)


@pytest.mark.parametrize("value", [1.0, 2.0**-130, 2.0**-149, 3e38, 4095.99])
def test_the_edges_of_float32_have_a_bin(value: float) -> None:
    histogram = histogram_of(np.array([value], np.float32))
    [index] = np.flatnonzero(histogram.counts)
    assert index * histogram.width <= np.float32(value) < (index + 1) * histogram.width


def test_nothing_but_zeros_has_no_width() -> None:
    histogram = histogram_of(np.zeros(5))
    assert (histogram.width, histogram.largest, histogram.counts[0]) == (0.0, 0.0, 5)


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 99.99, 100.0])
def test_percentiles_are_numpys(percentile: float) -> None:
    values = laplace()
    histogram = histogram_of(values)
    found = percentile_threshold(histogram.counts, histogram.width, percentile)
    # Between two values of the tail any threshold will do; in a bin their places are not known.
    below, above = (np.percentile(values, percentile, method=method) for method in ("lower", "higher"))
    assert below - histogram.width <= found <= above + histogram.width


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rounding_is_to_the_nearest_value_of_the_type(kind: Any) -> None:
    # No sum of powers of two, so that none lies halfway between two.
    values = laplace(10_000) * 0.7310585
    found = quantize_dequantize(values, 3.3, kind)
    np.testing.assert_allclose(found, rounded(values, 3.3, kind), rtol=1e-6)
    np.testing.assert_array_equal(quantize_dequantize(-values, 3.3, kind), -found)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("outlier", [0.0, 60.0])
def test_mse_is_the_minimum_over_the_values_themselves(kind: Any, outlier: float) -> None:
    values = np.append(laplace(), outlier)

    def error(threshold: float) -> float:
        return float(((values - rounded(values, threshold, kind)) ** 2).mean())

    histogram = histogram_of(values)
    threshold = mse_threshold(histogram.counts, histogram.width, kind)
    least = min(error(share * values.max()) for share in np.linspace(0.05, 1, 150))
    # The thresholds that are tried lie 1/128 of the range apart, and near the minimum the error is flat; a value
    # stands at the middle of its bin, an eighth of a step away at most.
    assert error(threshold) < 1.03 * least
    if kind == "int8":
        # There is something to gain: far less than without cutting off.
        assert threshold < 0.85 * values.max()
        assert least < 0.9 * error(float(values.max()))


def test_entropy_cuts_off_an_outlier_and_keeps_a_full_range() -> None:
    generator = np.random.default_rng(2)
    normal = np.abs(generator.standard_normal(200_000))
    with_outlier = histogram_of(np.append(normal, 40.0))
    # Beyond 3 lie 0.3 % of the values, beyond 5.1 none but the outlier. (The levels of fp8 below 5 are as fine with it
    # as without, so that there is nothing to gain.)
    assert 3 < entropy_threshold(with_outlier.counts, with_outlier.width, "int8") < 6
    for kind in ("int8", "fp8"):
        uniform = histogram_of(generator.random(200_000))
        assert entropy_threshold(uniform.counts, uniform.width, kind) > 0.97
        # Half of what leaves a ReLU is zero, which every type has exactly.
        relu = histogram_of(np.where(generator.random(normal.shape) < 0.5, normal, 0))
        assert entropy_threshold(relu.counts, relu.width, kind) > 3


@pytest.mark.parametrize("find", [mse_threshold, entropy_threshold])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_one_value_alone_is_kept(find: Any, kind: str) -> None:
    histogram = histogram_of(np.full(100, 3.0))
    # Its bin's upper border.
    assert find(histogram.counts, histogram.width, kind) == pytest.approx(3, abs=1.1 * histogram.width)


def ranges_of(rows: Array) -> ChannelRanges:
    ranges = ChannelRanges("some.product", rows.shape[1])
    for part in np.array_split(rows.astype(np.float32), 3):
        ranges.add(part)
    return ranges


@pytest.fixture(scope="module")
def rows() -> Array:
    """300 tokens of 8 channels: some wide, some one-sided, one all zero, one constant."""
    generator = np.random.default_rng(3)
    values = generator.standard_normal((300, 8)) * np.array([1, 30, 0.01, 2, 1, 1, 0, 0])
    values[:, 3] = np.maximum(values[:, 3], -0.17)
    values[:, 4] += 50
    values[:, 7] = 0.25
    return values.astype(np.float32).astype(np.float64)


@pytest.fixture(scope="module")
def weight() -> Array:
    weight = np.random.default_rng(4).standard_normal((5, 8)).astype(np.float32)
    weight[:, 5] = 0
    return weight.astype(np.float64)


def test_ranges_are_those_of_all_rows(rows: Array) -> None:
    ranges = ranges_of(rows)
    np.testing.assert_array_equal(ranges.lowest, rows.min(axis=0))
    np.testing.assert_array_equal(ranges.highest, rows.max(axis=0))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_names_the_product(rows: Array, value: float) -> None:
    spoilt = rows.copy()
    spoilt[200, 3] = value
    with pytest.raises(CalibrationError, match=r"the input of 'some\.product' is NaN or infinite"):
        ranges_of(spoilt)


@pytest.mark.parametrize("alpha", [None, 0.0, 0.5, 0.85, 1.0])
@pytest.mark.parametrize(("kind", "shift"), [("int8", False), ("int8", True), ("fp8", False)])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_moved_and_divided_channels_are_the_same_product(
    rows: Array, weight: Array, alpha: float | None, kind: Any, shift: bool, share: float
) -> None:
    channels = balance(
        ranges_of(rows), np.abs(weight).max(axis=0).astype(np.float32), kind, alpha=alpha, shift=shift
    )
    found = channels.scale(kind, share * channels.largest)
    offset = 0.0 if found.shift is None else found.shift.astype(np.float64)
    divisor = 1.0 if found.smoothing is None else found.smoothing.astype(np.float64)
    assert (found.shift is None, found.smoothing is None) == (not shift, alpha is None)
    moved = (rows - offset) / divisor
    folded = moved @ (weight * divisor).T + offset @ weight.T if shift else moved @ (weight * divisor).T
    # float64 throughout: sums of 8 terms that cancel, of values up to 100.
    np.testing.assert_allclose(folded, rows @ weight.T, atol=1e-11)
    steps = moved / found.scale
    if share == 1:
        # Nothing is cut off, and the range is used: but for half a step, the scale's rounding to float16, and float32
        # rounding of shift and divisor.
        rounding = 2**-11 + 1e-5
        assert LARGEST[kind] * (1 - rounding) - 1 < np.abs(steps).max() < LARGEST[kind] * (1 + rounding)
    if shift:
        zero = -offset / divisor / found.scale
        np.testing.assert_allclose(zero, np.rint(zero), atol=1e-4)


def test_smoothing_is_the_published_formula(rows: Array, weight: Array) -> None:
    weights = np.abs(weight).max(axis=0).astype(np.float32)
    found = balance(ranges_of(rows), weights, "int8", alpha=0.5, shift=False).smoothing
    assert found is not None
    plain = [0, 1, 3, 4]
    expected = np.sqrt(np.abs(rows).max(axis=0)[plain] / weights.astype(np.float64)[plain])
    # Up to a common factor, which cancels.
    np.testing.assert_allclose(found[plain] / found[0], expected / expected[0], rtol=1e-5)
    assert np.log(found.astype(np.float64)).mean() == pytest.approx(0, abs=1e-6)
    assert np.isfinite(found).all()
    # A channel without a range, or without weights, counts as 2^-10 of the largest: no ratio is beyond 2^10.
    assert found.max() / found.min() <= 2**10 * (1 + 1e-5)


@pytest.mark.parametrize(("kind", "shift"), [("int8", True), ("int8", False), ("fp8", False)])
@pytest.mark.parametrize("value", [0.0, 1e-42, -3.0, 1e38])
def test_degenerate_tensors_have_a_usable_scale(kind: Any, shift: bool, value: float) -> None:
    ranges = ranges_of(np.full((10, 4), value))
    found = balance(ranges, np.zeros(4, np.float32), kind, alpha=0.85, shift=shift)
    scale = found.scale(kind, found.largest)
    assert np.float16(scale.scale) == scale.scale > 0
    # A dequantised value fits float16.
    assert scale.scale * LARGEST[kind] <= 65504 * (1 + 1e-6)
    for values in (scale.shift, scale.smoothing):
        assert values is None or np.isfinite(values).all()
