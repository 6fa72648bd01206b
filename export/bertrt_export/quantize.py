"""Quantisation of weights: symmetric int8 or float8 with one scale for each output channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

WeightType = Literal["int8", "fp8"]


class NarrowType(NamedTuple):
    """A type to quantise to: its NumPy type and the largest magnitude that is used of it."""

    dtype: np.dtype[Any]
    largest: float


WEIGHT_TYPES: Final[Mapping[WeightType, NarrowType]] = {
    # -128 is not used, so that the range is symmetric and a product with an unsigned byte cannot exceed what the
    # kernels assume.
    "int8": NarrowType(np.dtype(np.int8), 127.0),
    # E4M3 without infinities (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433).
    "fp8": NarrowType(np.dtype(ml_dtypes.float8_e4m3fn), 448.0),
}


class QuantizedWeight(NamedTuple):
    """``values * scale`` is the weight, as near as the narrow type gets.

    Attributes:
        values: ``[channels, inputs]`` of the narrow type.
        scale: ``[channels] float32``, positive.
    """

    values: npt.NDArray[Any]
    scale: npt.NDArray[np.float32]


def quantize_per_channel(weight: npt.NDArray[np.float32], kind: WeightType = "int8") -> QuantizedWeight:
    """Round each row of ``[channels, inputs] float32`` with the row's largest magnitude at that of the type.

    A row of zeros gets scale 1. The error of an int8 value is at most half its row's scale; that of a float8 value
    1/16 of the value or 2^-10 scales, whichever is larger.
    """
    narrow = WEIGHT_TYPES[kind]
    largest = np.abs(weight).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(narrow.largest), np.float32(1)).astype(np.float32)
    # A subnormal maximum can divide to a zero scale.
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    values = np.clip(weight / scale, -narrow.largest, narrow.largest)
    values = (np.rint(values) if kind == "int8" else values).astype(narrow.dtype)
    return QuantizedWeight(values, scale[:, 0])
