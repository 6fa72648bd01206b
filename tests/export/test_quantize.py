"""Scales that float16 holds, and weights that are rounded by them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bertrt_export.quantize import WEIGHT_TYPES, float16_scales, quantize_per_channel

KINDS = ("int8", "fp8")
SMALLEST = 2.0**-24


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_float16_numbers_near_what_was_given(kind: Any) -> None:
    given = np.geomspace(2**-14, 100, 10_000)
    found = float16_scales(given, kind)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, found.astype(np.float16))
    # Half a unit in the last of 11 bits.
    assert (np.abs(found - given) <= given * 2**-11).all()


@pytest.mark.parametrize("kind", KINDS)
def test_small_scales_are_rounded_up_and_never_zero(kind: Any) -> None:
    given = np.array([0.0, 1e-300, 1e-40, SMALLEST, 1.4 * SMALLEST, 3.01 * SMALLEST, 2**-15])
    found = float16_scales(given, kind)
    np.testing.assert_array_equal(found / SMALLEST, [1, 1, 1, 1, 2, 4, 512])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [1e3, 1e30, np.inf])
def test_no_scale_takes_the_type_s_largest_value_out_of_float16(kind: Any, given: float) -> None:
    found = float16_scales(given, kind)
    largest = WEIGHT_TYPES[kind].largest
    assert np.isfinite(np.float16(float(found) * largest))
    # The next float16 would.
    assert float(np.nextafter(np.float16(found), np.float16(np.inf))) * largest > 65504


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_rounded_by_the_scales_that_are_kept(kind: Any) -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((40, 64)).astype(np.float32)
    weight *= np.geomspace(1e-12, 1e4, 40, dtype=np.float32)[:, None]
    weight[3] = 0
    values, scale = quantize_per_channel(weight, kind, float16=True)
    np.testing.assert_array_equal(scale, scale.astype(np.float16))
    assert (scale > 0).all()
    error = np.abs(values.astype(np.float64) * scale[:, None] - weight)
    steps = 0.5 if kind == "int8" else np.maximum(np.abs(weight) / scale[:, None] / 16, 2.0**-10)
    # Cut off at the largest value: less than its 2^-11 of it.
    slack = WEIGHT_TYPES[kind].largest * 2.0**-11
    assert (error <= scale[:, None] * (steps + slack)).all()
    inner = np.abs(weight) < np.abs(weight).max(axis=1, keepdims=True)
    assert (error[inner] <= (scale[:, None] * steps * (1 + 1e-4) * np.ones_like(weight))[inner]).all()
