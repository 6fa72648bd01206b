"""Quantisation: symmetric int8 or float8, of weights with one scale for each output channel."""

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
FLOAT16_LARGEST: Final = 65504.0


class QuantizedWeight(NamedTuple):
    """``values * scale`` is the weight, as near as the narrow type gets.

    Attributes:
        values: ``[channels, inputs]`` of the narrow type.
        scale: ``[channels] float32``, positive.
    """

    values: npt.NDArray[Any]
    scale: npt.NDArray[np.float32]


def float16_scales(scales: npt.ArrayLike, kind: WeightType) -> npt.NDArray[np.float32]:
    """The nearest scales that float16 holds exactly, as float32.

    None is zero, however small it was, and none so large that the type's largest value times it leaves float16. Below
    2^-14, where float16's numbers lie far apart, the next one up is taken: the nearest might cut off many steps.
    """
    largest = WEIGHT_TYPES[kind].largest
    most = np.float16(FLOAT16_LARGEST / largest)
    if float(most) * largest > FLOAT16_LARGEST:
        most = np.nextafter(most, np.float16(0))
    limits = np.finfo(np.float16)
    wanted = np.clip(np.asarray(scales, np.float64), float(limits.smallest_subnormal), float(most))
    rounded = wanted.astype(np.float16)
    up = (rounded < wanted) & (wanted < float(limits.smallest_normal))
    return np.where(up, np.nextafter(rounded, np.float16(np.inf)), rounded).astype(np.float32)


def quantize_per_channel(
    weight: npt.NDArray[np.float32], kind: WeightType = "int8", *, float16: bool = False
) -> QuantizedWeight:
    """Round each row of ``[channels, inputs] float32`` with the row's largest magnitude at that of the type.

    A row of zeros gets scale 1. The error of an int8 value is at most half its row's scale; that of a float8 value
    1/16 of the value or 2^-10 scales, whichever is larger.

    Args:
        weight: none of it beyond float16, if the scales shall be float16's.
        kind: of the values.
        float16: take the scales of `float16_scales`.
    """
    narrow = WEIGHT_TYPES[kind]
    largest = np.abs(weight).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(narrow.largest), np.float32(1)).astype(np.float32)
    # A subnormal maximum can divide to a zero scale.
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    if float16:
        scale = float16_scales(scale, kind)
    values = np.clip(weight / scale, -narrow.largest, narrow.largest)
    values = (np.rint(values) if kind == "int8" else values).astype(narrow.dtype)
    return QuantizedWeight(values, scale[:, 0])
