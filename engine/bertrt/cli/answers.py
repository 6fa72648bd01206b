"""A stream of texts becomes a stream of answers; a text that cannot be answered is named by its line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

from bertrt.cli.texts import Line, Lines, in_chunks
from bertrt.errors import InputError

T = TypeVar("T")

# Texts of one call: enough to sort by length and to fill batches, few enough to see answers soon.
CHUNK: Final = 256
# How the engine's messages name a text of a call; a message without it is about an option.
_TEXT: Final = re.compile(r"\b(?:text|pair) \d+\b")


def in_order(
    lines: Lines, ask: Callable[[Sequence[Line]], Sequence[T]]
) -> Iterator[tuple[Sequence[Line], Sequence[T]]]:
    """Ask for the answers chunk by chunk.

    When a text cannot be answered, all texts before it are answered first.

    Args:
        lines: the texts.
        ask: gives one answer for each line of a chunk.

    Raises:
        InputError: a text cannot be answered; the message names its line.
    """
    for chunk in in_chunks(lines, CHUNK, weigh=lambda line: len(line.text)):
        yield from _answer(chunk, ask)


def _answer(
    chunk: Sequence[Line], ask: Callable[[Sequence[Line]], Sequence[T]]
) -> Iterator[tuple[Sequence[Line], Sequence[T]]]:
    try:
        answers = ask(chunk)
    except InputError as error:
        if len(chunk) == 1 or not _TEXT.search(str(error)):
            raise type(error)(_located(str(error), chunk[0])) from error
    else:
        yield chunk, answers
        return
    # One of them is at fault: halving finds it, and what stands before it is answered on the way.
    middle = len(chunk) // 2
    yield from _answer(chunk[:middle], ask)
    yield from _answer(chunk[middle:], ask)


def _located(message: str, line: Line) -> str:
    """The engine's message on a text, or on an option, in the words of the command line."""
    message = re.sub(r"\boverflow='(\w+)'(?: or '(\w+)')?", _overflow_option, message)
    message = re.sub(r"\b(?:max_masks|top_k)\b", lambda found: "--" + found[0].replace("_", "-"), message)
    # A function, because a place may hold what `re` would take for a reference.
    return _TEXT.sub(lambda _: line.where, message, count=1)


def _overflow_option(found: re.Match[str]) -> str:
    return "--overflow " + " or ".join(name for name in found.groups() if name)
