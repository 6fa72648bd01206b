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
# Options as the engine's messages name them, in what it says of a text and at the start of what it says of
# an option: elsewhere they may be words of the user.
_IN_MESSAGES: Final = re.compile(r"\b(max_masks)\b|\boverflow='(\w+)'(?: or '(\w+)')?")
_AT_THE_START: Final = re.compile(r"(max_masks|stride|top_k)\b")


def in_order(
    lines: Lines, ask: Callable[[Sequence[Line]], Sequence[T]], *, size: int = CHUNK
) -> Iterator[tuple[Sequence[Line], Sequence[T]]]:
    """Ask for the answers chunk by chunk.

    When a text cannot be answered, all texts before it are answered first.

    Args:
        lines: the texts.
        ask: gives one answer for each line of a chunk.
        size: texts of a chunk, at most `CHUNK`; fewer where an answer is large.

    Raises:
        InputError: a text cannot be answered; the message names its line.
    """
    # A smaller chunk is lighter in proportion: of long texts, too, it holds fewer.
    factor = CHUNK // size
    for chunk in in_chunks(lines, size, weigh=lambda line: len(line.text) * factor):
        yield from _answer(chunk, ask)


def _answer(
    chunk: Sequence[Line], ask: Callable[[Sequence[Line]], Sequence[T]]
) -> Iterator[tuple[Sequence[Line], Sequence[T]]]:
    try:
        answers = ask(chunk)
    except InputError as error:
        failure = error
    else:
        yield chunk, answers
        return
    if failure.index is None:
        raise type(failure)(_of_option(str(failure))) from failure
    if failure.index:
        # One of these may be at fault too, in a way that is looked for later; then it is the first.
        yield from _answer(chunk[: failure.index], ask)
    raise type(failure)(_of_text(str(failure), failure.index, chunk[failure.index])) from failure


def _of_option(message: str) -> str:
    """The engine's message on an option, in the words of the command line."""
    found = _AT_THE_START.match(message)
    return _option(found[0]) + message[found.end() :] if found else message


def _of_text(message: str, index: int, line: Line) -> str:
    """The engine's message on a text of its call, in the words of the command line."""
    message = _IN_MESSAGES.sub(_option_with_values, message)
    # A function, because a place may hold what `re` would take for a reference.
    return re.sub(rf"\b(?:text|pair) {index}\b", lambda _: line.where, message, count=1)


def _option_with_values(found: re.Match[str]) -> str:
    name, *values = found.groups()
    return _option(name) if name else "--overflow " + " or ".join(value for value in values if value)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
