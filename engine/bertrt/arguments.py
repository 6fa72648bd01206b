"""Checks of arguments that the tokenizer and the tasks share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

import numpy as np

from bertrt.errors import InputError


def as_texts(texts: str | Iterable[str], *, name: str = "texts") -> tuple[list[str], bool]:
    """Return a list of texts, and whether a single ``str`` was given. An iterator is read to its end.

    Raises:
        InputError: bytes, an unordered collection, or an item that is not a ``str``.
    """
    if isinstance(texts, str):
        return [texts], True
    if isinstance(texts, bytes | bytearray | memoryview):
        raise InputError(f"{name} is {type(texts).__name__}, expected str: decode it first, as UTF-8")
    try:
        if isinstance(texts, Mapping | Set):  # whose order says nothing
            raise TypeError
        iterator = iter(texts)  # a NumPy array without dimensions has an __iter__ that refuses
    except TypeError:
        raise InputError(
            f"{name} must be a str or a sequence of str, got {type(texts).__name__}: pass a list"
        ) from None
    items = list(iterator)
    for index, item in enumerate(items):
        if not isinstance(item, str):
            raise InputError(f"{name}[{index}] is {type(item).__name__}, expected str: convert it first")
    return items, False


def check_integer(value: object, *, name: str, least: int = 1, most: int | None = None) -> int:
    """Return a whole number from ``least`` to ``most``.

    Raises:
        InputError: another number, or not a whole number; a bool is not one.
    """
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        number = int(value)
        if number >= least and (most is None or number <= most):
            return number
    limit = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise InputError(f"{name} must be a whole number {limit}, got {value!r}")


def check_choice(value: object, *, name: str, choices: tuple[str, ...]) -> None:
    """Check that an option is one of those there are.

    Raises:
        InputError: it is not.
    """
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
