"""Layouts against the formulas of kernels/FORMAT.md, element by element."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from bertrt_export.native.layout import (
    BFLOAT16_LARGEST,
    from_bfloat16,
    pack_panels,
    pack_rows,
    panels_bytes,
    rows_bytes,
    to_bfloat16,
    unpack_panels,
)

GROUPS = {"float32": 1, "bfloat16": 2, "int8": 4}
TYPES = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}
# One less, exactly and one more than a panel; less, as much and more than a piece of 64 bytes in each type.
SHAPES = [(1, 1), (31, 15), (32, 16), (33, 17), (2, 32), (40, 64), (65, 65), (97, 130)]


def values_of(shape: tuple[int, int], dtype: str) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(shape[0] * 1000 + shape[1])
    if dtype == "float32":
        return generator.standard_normal(shape).astype(np.float32)
    limits = np.iinfo(TYPES[dtype])
    return generator.integers(limits.min, limits.max, shape, dtype=TYPES[dtype], endpoint=True)


@pytest.mark.parametrize("dtype", GROUPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_element_is_where_the_format_says(shape: tuple[int, int], dtype: str) -> None:
    outputs, inputs = shape
    values, g = values_of(shape, dtype), GROUPS[dtype]
    expected = np.zeros((-(-outputs // 32), -(-inputs // (16 * g)), 2, 16, 16, g), values.dtype)
    for n in range(outputs):
        for k in range(inputs):
            at = n // 32, k // (16 * g), n % 32 // 16, k % (16 * g) // g, n % 16, k % g
            expected[at] = values[n, k]
    packed = pack_panels(values)
    assert packed.tobytes() == expected.tobytes()
    assert packed.nbytes == panels_bytes(outputs, inputs, dtype)
    np.testing.assert_array_equal(unpack_panels(packed, outputs, inputs, dtype), values)


@pytest.mark.parametrize("columns", [1, 63, 64, 65])
def test_rows_are_padded_with_zeros(columns: int) -> None:
    values = values_of((3, columns), "float32")
    packed = pack_rows(values)
    assert packed.shape == (3, 64 if columns <= 64 else 128)
    assert packed.nbytes == rows_bytes(3, columns, "float32")
    np.testing.assert_array_equal(packed[:, :columns], values)
    assert not packed[:, columns:].any()
    np.testing.assert_array_equal(pack_rows(values[0]), packed[:1])


def test_bfloat16_rounds_as_another_implementation_does() -> None:
    # Every exponent and sign, and of each the significands around a tie.
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = (upper[:, None] | lower).ravel().view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).bfloat16()
    np.testing.assert_array_equal(to_bfloat16(values), expected.view(torch.uint16).numpy())
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(values)), expected.float().numpy())


def test_a_tie_goes_to_the_even_neighbour() -> None:
    # Between 1 and 2 there are 128 steps.
    step = Fraction(1, 128)
    ties = [1 + step / 2, 1 + 3 * step / 2, -(1 + step / 2), -(1 + 3 * step / 2)]
    rounded = from_bfloat16(to_bfloat16(np.array([float(tie) for tie in ties], np.float32)))
    assert rounded.tolist() == [1.0, float(1 + 2 * step), -1.0, -float(1 + 2 * step)]


def test_the_largest_bfloat16_stays_and_beyond_it_is_infinity() -> None:
    beyond = np.nextafter(np.float32(BFLOAT16_LARGEST), np.float32(np.inf))
    largest, near, far = from_bfloat16(
        to_bfloat16(np.array([BFLOAT16_LARGEST, beyond, np.finfo(np.float32).max], np.float32))
    )
    assert largest == near == np.float32(BFLOAT16_LARGEST)
    assert far == np.inf
