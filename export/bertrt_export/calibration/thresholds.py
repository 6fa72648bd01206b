"""Where to cut off an activation: the magnitude that becomes a narrow type's largest value.

Each function takes a histogram of magnitudes, ``counts`` (``[bins]``, at least one of them positive) and the ``width``
of a bin, and gives a threshold in ``(0, bins * width]``. Cutting off the few largest values makes the steps for all
others smaller. See Wu et al. 2020, section 3.2 (https://arxiv.org/abs/2004.09602).
"""

from __future__ import annotations

from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from bertrt_export.quantize import WEIGHT_TYPES, WeightType

Method = Literal["max", "percentile", "entropy", "mse"]
METHODS: Final[tuple[Method, ...]] = get_args(Method)
DEFAULT_PERCENTILE: Final = 99.99

Counts = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

# Thresholds that are tried, evenly from the lowest share of the range to all of it. An int8 value has 127 magnitudes:
# below twice as many bins a level would have one or two, and say nothing about what rounding does within it.
_TRIED: Final = 128
_FEWEST_BINS: Final = 256


def percentile_threshold(counts: Counts, width: float, percentile: float = DEFAULT_PERCENTILE) -> float:
    """Below it lie ``percentile`` per cent of the values, which are taken to be spread evenly in their bin."""
    total = np.cumsum(counts)
    wanted = total[-1] * (percentile / 100)
    index = int(np.searchsorted(total, wanted))
    before = total[index - 1] if index else 0
    return float(width * (index + (wanted - before) / counts[index]))


def mse_threshold(counts: Counts, width: float, kind: WeightType) -> float:
    """With the least mean square error of rounding to the type, values at the middle of their bin."""
    values = _middles(counts, width)

    def error(threshold: float) -> float:
        difference = values - quantize_dequantize(values, threshold, kind)
        return float(np.dot(counts, difference * difference))

    return min((bins * width for bins in _candidates(counts)), key=error)


def entropy_threshold(counts: Counts, width: float, kind: WeightType) -> float:
    """With the least Kullback-Leibler divergence of the rounded from the clipped distribution.

    As TensorRT's calibrator has it (Migacz, "8-bit inference with TensorRT", GTC 2017), with the levels of the type
    itself in place of 128 equal ones: what is cut off is added to the last bin kept; the rounded distribution has the
    values of a level spread evenly over those of its bins that hold any.
    """
    # Zero is exact in every type. Spread over a level, a peak of zeros would outweigh everything else.
    counts = counts.copy()
    if counts[1:].any():
        counts[0] = min(counts[0], counts[1])

    def divergence(bins: int) -> float:
        kept = counts[:bins].astype(np.float64)
        clipped = kept.copy()
        clipped[-1] += counts[bins:].sum()
        levels = _levels(bins, kind)
        filled = kept > 0
        in_level = np.bincount(levels, weights=kept)
        bins_of_level = np.bincount(levels, weights=filled)
        spread = np.where(filled, in_level[levels] / np.maximum(bins_of_level[levels], 1), 0)
        return _divergence(clipped, spread)

    return min(_candidates(counts), key=divergence) * width


def quantize_dequantize(values: Float64, threshold: float, kind: WeightType) -> Float64:
    """What becomes of values in the type, ``threshold`` being its largest."""
    scale = threshold / WEIGHT_TYPES[kind].largest
    result: Float64 = _nearest(values / scale, kind).astype(np.float64) * scale
    return result


def _nearest(values: Float64, kind: WeightType) -> npt.NDArray[Any]:
    """The nearest value of the type; what is beyond its largest becomes that."""
    narrow = WEIGHT_TYPES[kind]
    clipped = np.clip(values, -narrow.largest, narrow.largest)
    # From float32, as the graph has it.
    rounded = np.rint(clipped) if kind == "int8" else clipped.astype(np.float32)
    return rounded.astype(narrow.dtype)


def _levels(bins: int, kind: WeightType) -> npt.NDArray[np.intp]:
    """For each of so many bins, the number of the type's value that its middle becomes."""
    middles = (np.arange(bins) + 0.5) / bins * WEIGHT_TYPES[kind].largest
    _, numbers = np.unique(_nearest(middles, kind).astype(np.float64), return_inverse=True)
    return numbers.astype(np.intp)


def _middles(counts: Counts, width: float) -> Float64:
    middles = (np.arange(counts.shape[0], dtype=np.float64) + 0.5) * width
    # Most activations are nearest to zero, and many are zero itself: no type rounds that.
    middles[0] = 0
    return middles


def _candidates(counts: Counts) -> list[int]:
    """Thresholds in bins, rising; the last keeps everything."""
    used = int(np.flatnonzero(counts)[-1]) + 1
    return sorted({int(bins) for bins in np.linspace(min(_FEWEST_BINS, used), used, _TRIED)})


def _divergence(reference: Float64, other: Float64) -> float:
    """In nats, each made a distribution first; where ``other`` is zero it is taken to be next to zero."""
    total = other.sum()
    if total == 0:
        return float("inf")
    p, q = reference / reference.sum(), other / total
    held = p > 0
    return float((p[held] * np.log(p[held] / np.maximum(q[held], np.finfo(np.float64).tiny))).sum())
