"""Batches hold every sequence once, stay within their limits, and are as few as those allow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertrt.batching import offsets_of, pack, plan_batches
from bertrt.errors import InputError
from bertrt.tokenization import Encoded


def cost(indices: Any, lengths: list[int], pads: bool) -> int:
    """Tokens of a batch."""
    sizes = [lengths[index] for index in indices]
    return max(sizes) * len(sizes) if pads else sum(sizes)


@given(
    sequences=st.lists(st.tuples(st.integers(1, 512), st.integers(0, 77)), max_size=80),
    token_budget=st.integers(1, 4096),
    pads=st.booleans(),
    max_sequences=st.integers(1, 40),
    max_positions=st.integers(1, 200),
)
def test_the_plan(
    sequences: list[tuple[int, int]], token_budget: int, pads: bool, max_sequences: int, max_positions: int
) -> None:
    lengths = [length for length, _ in sequences]
    positions = [count for _, count in sequences]
    plan = plan_batches(
        lengths,
        token_budget=token_budget,
        pads=pads,
        max_sequences=max_sequences,
        positions=positions,
        max_positions=max_positions,
    )
    flat = [int(index) for batch in plan for index in batch]
    assert flat == sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))

    def allowed(indices: list[int]) -> bool:
        return (
            cost(indices, lengths, pads) <= token_budget
            and len(indices) <= max_sequences
            and sum(positions[index] for index in indices) <= max_positions
        )

    for number, batch in enumerate(plan):
        indices = batch.tolist()
        assert batch.dtype == np.int64
        assert len(indices) == 1 or allowed(indices)
        # Full: the next sequence would not have fitted.
        if number + 1 < len(plan):
            assert not allowed([*indices, int(plan[number + 1][0])])


def test_without_positions_they_do_not_count() -> None:
    assert [len(batch) for batch in plan_batches([1] * 5000, token_budget=10_000)] == [256] * 19 + [136]


def test_one_more_token_than_the_budget() -> None:
    assert [batch.tolist() for batch in plan_batches([8, 8], token_budget=16)] == [[0, 1]]
    assert [batch.tolist() for batch in plan_batches([8, 9], token_budget=16)] == [[1], [0]]
    assert [batch.tolist() for batch in plan_batches([17, 16], token_budget=16)] == [[0], [1]]


def test_where_nothing_is_padded_only_tokens_count() -> None:
    lengths = [100, 1, 50, 1]
    assert [batch.tolist() for batch in plan_batches(lengths, token_budget=152, pads=False)] == [[0, 2, 1, 3]]
    assert [batch.tolist() for batch in plan_batches(lengths, token_budget=152)] == [[0], [2, 1, 3]]


def test_nothing_gives_no_batch() -> None:
    assert plan_batches([], token_budget=1) == []


@pytest.mark.parametrize(
    "options",
    [{"token_budget": 0}, {"token_budget": 1, "max_sequences": 0}, {"token_budget": 1, "max_positions": 0}],
)
def test_limits_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"must be at least 1, got 0"):
        plan_batches([1], **options)


def test_shapes_are_checked() -> None:
    with pytest.raises(InputError, match="equal length"):
        plan_batches([1, 2], token_budget=1, positions=[1])
    with pytest.raises(InputError, match="one-dimensional"):
        plan_batches([[1, 2]], token_budget=1)


def test_packing_lays_sequences_end_to_end() -> None:
    sequences = [
        Encoded(np.array([2, 7, 3], np.int32), np.array([0, 0, 1], np.int32), 0, 1),
        Encoded(np.array([2, 3], np.int32), np.array([0, 1], np.int32), 0, 0),
    ]
    batch = pack(sequences)
    assert batch.input_ids.tolist() == [2, 7, 3, 2, 3]
    assert batch.token_type_ids.tolist() == [0, 0, 1, 0, 1]
    assert batch.offsets.tolist() == [0, 3, 5]
    with pytest.raises(InputError, match="at least one sequence"):
        pack([])


def test_offsets() -> None:
    assert offsets_of([3, 2]).tolist() == [0, 3, 5]
    assert offsets_of([]).tolist() == [0]
    assert offsets_of([1]).dtype == np.int64
