"""Quantisation of weights: symmetric int8 with one scale for each output channel."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class QuantizedWeight(NamedTuple):
    """``values * scale`` is the weight, as near as int8 gets.

    Attributes:
        values: ``[channels, inputs] int8`` in -127..127.
        scale: ``[channels] float32``, positive.
    """

    values: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]


def quantize_per_channel(weight: npt.NDArray[np.float32]) -> QuantizedWeight:
    """Round each row of ``[channels, inputs] float32`` to int8 with the row's largest magnitude at 127.

    -128 is not used, so that the range is symmetric and a product with an unsigned byte cannot exceed what the
    kernels assume. A row of zeros gets scale 1. The error of a value is at most half its row's scale.
    """
    largest = np.abs(weight).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    # A subnormal maximum can divide to a zero scale.
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    values = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
    return QuantizedWeight(values, scale[:, 0])
