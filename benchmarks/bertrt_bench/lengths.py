"""Real lengths: how many tokens the paragraphs of a text have."""

from __future__ import annotations

import hashlib
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from bertrt.errors import EmptyTextError, InputError, TextEncodingError
from bertrt.tokenization import WordPieceTokenizer

# A text whose lines are no longer than this was wrapped; otherwise a line is a paragraph.
_LONGEST_WRAPPED_LINE: Final = 120
_LARGEST_FILE: Final = 256 << 20
_BLANK_LINES: Final = re.compile(r"\n[^\S\n]*\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """A mix of lengths, and where it is from.

    Attributes:
        name: the file's name without its folder, so that a report tells nothing about the machine.
        sha256: of the file, in hexadecimal.
        tokens: of each paragraph, special tokens included, in the text's order.
        cut: how many paragraphs had more tokens than the model has positions, and count with as many.
    """

    name: str
    sha256: str
    tokens: tuple[int, ...]
    cut: int

    def to_json(self) -> dict[str, Any]:
        """What a record says of it."""
        tokens = sorted(self.tokens)
        return {
            "name": self.name,
            "sha256": self.sha256,
            "paragraphs": len(tokens),
            "cut": self.cut,
            "tokens": sum(tokens),
            "least": tokens[0],
            "median": statistics.median(tokens),
            "most": tokens[-1],
        }


def read_lengths(path: Path, tokenizer: WordPieceTokenizer, *, most: int, max_length: int) -> Lengths:
    """Tokenize the first paragraphs of a text.

    Args:
        path: a file of UTF-8; see `paragraphs`.
        tokenizer: the engine's.
        most: paragraphs that are taken.
        max_length: positions of the model.

    Raises:
        InputError: the file cannot be read, or has no paragraph with a token.
        TextEncodingError: it is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise InputError(f"cannot read the text {str(path)!r}: {error.strerror}; pass a file") from error
    if len(data) > _LARGEST_FILE:
        raise InputError(
            f"the text {str(path)!r} is larger than {_LARGEST_FILE >> 20} MiB; only its first paragraphs count: "
            "pass a part of it"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextEncodingError(
            f"the text {str(path)!r} is not UTF-8: byte {error.start} is not; convert it"
        ) from error
    found = list(islice(_lengths(text, tokenizer, max_length), most))
    if not found:
        raise InputError(f"the text {str(path)!r} has no paragraph with a token in it; pass another")
    return Lengths(
        name=path.name,
        sha256=hashlib.sha256(data).hexdigest(),
        tokens=tuple(min(length, max_length) for length in found),
        cut=sum(length > max_length for length in found),
    )


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, none of them blank.

    Blank lines part them in a text that is wrapped (it has blank lines, and no line of more than 120
    characters); in any other each line is one.
    """
    lines = text.splitlines()
    wrapped = max(map(len, lines), default=0) <= _LONGEST_WRAPPED_LINE
    parts = _BLANK_LINES.split("\n".join(lines).strip()) if wrapped else lines
    if len(parts) == 1:
        parts = lines
    return [part.strip() for part in parts if part.strip()]


def _lengths(text: str, tokenizer: WordPieceTokenizer, max_length: int) -> Iterator[int]:
    for paragraph in paragraphs(text):
        try:
            ((encoded, *rest),) = tokenizer.encode([paragraph], max_length=max_length, overflow="window")
        except EmptyTextError:  # nothing that the tokenizer keeps
            continue
        yield max_length + 1 if rest else encoded.input_ids.shape[0]
