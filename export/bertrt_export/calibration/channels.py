"""The channels of an activation: their ranges, and how they are moved and divided before one scale is used for all.

With ``y = (x - shift) / smoothing``, a product ``x @ w.T`` is ``y @ (w * smoothing).T + shift @ w.T``. The smoothing is
SmoothQuant's (Xiao et al. 2023, equation 4, https://arxiv.org/abs/2211.10438), ``range**alpha / weight**(1 - alpha)``
for each channel. The shift is the middle of the channel's range (Outlier Suppression+, Wei et al. 2023,
https://arxiv.org/abs/2304.09145), rounded so that zero is on the grid: most values of an activation function's output
lie beside zero, and would all be rounded the same wrong way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from bertrt.backends.base import Float32
from bertrt.errors import CalibrationError
from bertrt_export.graph.typed import ActivationScale
from bertrt_export.quantize import WEIGHT_TYPES, WeightType, float16_scales

Float64 = npt.NDArray[np.float64]

# A channel whose range, or whose weights, are less than this part of the largest counts as one with that part. It
# may have been idle by chance, and a ratio without bound would leave the range of float16.
_LEAST_SHARE: Final = 2.0**-10
# How much the shift, by being rounded to the grid, may add to a range: half a step.
_ROUNDED: Final = 0.5


class ChannelRanges:
    """The lowest and the highest value of each channel of a product's input, gathered batch by batch."""

    def __init__(self, product: str, channels: int) -> None:
        self._product = product
        self.lowest: Float32 = np.full(channels, np.inf, np.float32)
        self.highest: Float32 = np.full(channels, -np.inf, np.float32)

    def add(self, rows: Float32) -> None:
        """Take in ``[tokens, channels] float32``, at least one token.

        Raises:
            CalibrationError: NaN or infinity.
        """
        low, high = rows.min(axis=0), rows.max(axis=0)
        # A minimum and a maximum are NaN where any value is.
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise CalibrationError(
                f"the input of {self._product!r} is NaN or infinite in float32; there is no scale for it: look for "
                "overflow in the checkpoint's weights"
            )
        np.minimum(self.lowest, low, out=self.lowest)
        np.maximum(self.highest, high, out=self.highest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """How a product's input is moved and divided, before its scale is known for certain.

    Attributes:
        middle: ``[channels] float64``, of the ranges; ``None`` where the channels are not moved.
        smoothing: ``[channels] float32``, positive, with a geometric mean of 1; ``None`` for one.
        largest: at which ``abs(x - shift) / smoothing`` is cut off nowhere.
    """

    middle: Float64 | None
    smoothing: Float32 | None
    largest: float

    def scale(self, kind: WeightType, threshold: float) -> ActivationScale:
        """Quantise so that ``threshold`` becomes the type's largest value.

        The scale is a float16 number; positive; and small enough for a dequantised value to fit float16.
        """
        # Rounded once here, so that the shift is a multiple of what the graph will hold.
        scale = float(float16_scales(threshold / WEIGHT_TYPES[kind].largest, kind))
        shift = None
        if self.middle is not None:
            step = scale if self.smoothing is None else scale * self.smoothing.astype(np.float64)
            shift = (np.rint(self.middle / step) * step).astype(np.float32)
        return ActivationScale(scale=scale, shift=shift, smoothing=self.smoothing)


def balance(
    ranges: ChannelRanges, weights: Float32, kind: WeightType, *, alpha: float | None, shift: bool
) -> Channels:
    """Find how the channels are moved and divided.

    Args:
        ranges: of the product's input.
        weights: ``[channels] float32``, the largest magnitude of the weights that each channel meets.
        kind: of the quantised values.
        alpha: how much of the difference between channels goes to the weights, from 0 to 1; ``None`` leaves the
            channels as they are.
        shift: whether each channel is moved to the middle of its range.
    """
    low, high = ranges.lowest.astype(np.float64), ranges.highest.astype(np.float64)
    reach = (high - low) / 2 if shift else np.maximum(np.abs(low), np.abs(high))
    # A tensor that is the same everywhere has no range, but a scale all the same.
    top = float(reach.max()) or float(np.abs(high).max()) or 1.0
    reach = np.maximum(reach, top * _LEAST_SHARE)
    smoothing: Float32 | None = None
    if alpha is not None:
        heaviest = float(weights.max()) or 1.0
        against = np.maximum(weights.astype(np.float64), heaviest * _LEAST_SHARE)
        logarithm = alpha * np.log(reach) - (1 - alpha) * np.log(against)
        smoothing = np.exp(logarithm - logarithm.mean()).astype(np.float32)
    divided = float((reach if smoothing is None else reach / smoothing).max())
    if not shift:
        return Channels(middle=None, smoothing=smoothing, largest=divided)
    most = WEIGHT_TYPES[kind].largest
    return Channels(middle=(low + high) / 2, smoothing=smoothing, largest=divided * most / (most - _ROUNDED))
