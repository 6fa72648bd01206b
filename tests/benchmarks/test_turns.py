"""Orders of turns: nobody always follows the same one."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from bertrt_bench.turns import order_of_round


@pytest.mark.parametrize("count", range(1, 8))
def test_everybody_follows_everybody_equally_often(count: int) -> None:
    names = [f"contestant {number}" for number in range(count)]
    orders = [order_of_round(names, number) for number in range(count * (1 + count % 2))]
    assert orders[0][0] == names[0]
    assert all(sorted(order) == names for order in orders)
    follows = Counter(pair for order in orders for pair in pairwise(order))
    assert len(follows) == count * (count - 1)
    assert len(set(follows.values())) <= 1
    places = Counter(place for order in orders for place in enumerate(order))
    assert len(places) == count**2
    assert len(set(places.values())) == 1


def test_the_first_rounds_differ() -> None:
    assert [order_of_round("ab", number) for number in range(3)] == [["a", "b"], ["b", "a"], ["a", "b"]]
    assert order_of_round([], 3) == []
