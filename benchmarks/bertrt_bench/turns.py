"""Who comes after whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

_Contestant = TypeVar("_Contestant")


def order_of_round(contestants: Sequence[_Contestant], number: int) -> list[_Contestant]:
    """The order of a round.

    What a contestant leaves behind (caches, clocks, heat) meets the next one: if that were always the same one, its
    times would tell of it. A rotation alone would not help, as all but the first would follow whom they always follow.
    So the orders are those of a Williams design: in as many rounds as there are contestants, twice as many where their
    number is odd, everybody directly follows everybody else equally often, and comes at each place equally often.

    Args:
        contestants: as they were named.
        number: of the round.
    """
    count = len(contestants)
    # 0, 1, n - 1, 2, n - 2, ...: the steps from each to the next are all different.
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]
    backwards, shift = (number % 2, number // 2) if count % 2 else (0, number)
    order = [contestants[(place + shift) % count] for place in zigzag]
    return order[::-1] if backwards else order
