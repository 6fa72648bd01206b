"""From texts to the ids of their tokens, in bounded memory: the tokens that special tokens then surround."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from bertrt.errors import EmptyTextError, InputError, TextEncodingError
from bertrt.tokenization.windows import Int32

# A text of more characters than this is tokenized piece by piece. The library needs about 120 bytes a
# character while it works, so this bounds one call of it to some 30 MB.
LONG_TEXT = 1 << 18
_MOST_TEXTS = 1_024
_PIECE = 1 << 16
# A stretch that cannot be cut is tokenized whole up to this length; beyond it the text is refused.
_LONGEST_STRETCH = 1 << 20

# Up to this many texts and characters the calling thread tokenizes alone: waking the library's pool costs
# more than it saves, and the interpreter's lock, which the pool would release, is held for less than 0.3 ms.
_FEW_TEXTS = 4
_FEW_CHARACTERS = 1_000

# Where a text may be cut: at characters that the pre-tokenizer drops (white space) or makes words of their
# own (punctuation), and that canonical decomposition neither changes nor moves nor lets others move across
# (they are starters). The words on both sides are then the same with the cut and without it.
_CUTS = " \t\n\r.,;:!?\u3001\u3002\uff01\uff0c\uff1f"


class ContentReader:
    """Tokenizes texts without the special tokens around them. Any number of threads may use one.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``; it is never changed.
        added_tokens: the texts of its added tokens.
    """

    def __init__(self, tokenizer: Any, added_tokens: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        # Added tokens are found across words, so no cut may fall within one; decomposed, because some are
        # found in normalised text. White space counts as one: the normaliser makes all of it blanks.
        held = "".join(added_tokens)
        held += unicodedata.normalize("NFD", held)
        spaced = any(map(str.isspace, held))
        cuts = "".join(cut for cut in _CUTS if cut not in held and not (spaced and cut.isspace()))
        self._cut = re.compile(f"[{re.escape(cuts)}]") if cuts else None

    def read(self, texts: Sequence[str], name: str, *, enough: int | None = None) -> Iterator[Int32]:
        """Tokenize texts.

        Args:
            texts: each is read once.
            name: what an error calls a text, with ``{}`` for its index.
            enough: of a text with more than `LONG_TEXT` characters, a caller that has seen more tokens than
                this needs no further ones; ``None`` if it needs all.

        Yields:
            For each text ``[tokens] int32``.

        Raises:
            EmptyTextError: a text without a token.
            InputError: a text that is too long to be held in memory and cannot be cut.
            TextEncodingError: a text with a lone surrogate.
        """
        index = 0
        for chunk in _chunks(texts):
            first = name.format(index)
            if len(chunk[0]) > LONG_TEXT:
                _check_surrogates(chunk, index, name)
                contents = [np.concatenate(list(self._read_long(chunk[0], first, index, enough)))]
            else:
                try:
                    contents = self._read_chunk(chunk)
                except TypeError as error:
                    _check_surrogates(chunk, index, name)
                    raise InputError(f"{first} or a later one cannot be tokenized: {error}") from error
            for content in contents:
                if content.shape[0] == 0:
                    raise EmptyTextError(
                        f"{name.format(index)} has no token: it is empty, or only white space and control "
                        "characters; leave it out",
                        index=index,
                    )
                yield content
                index += 1

    def _read_chunk(self, texts: list[str]) -> list[Int32]:
        if len(texts) < _FEW_TEXTS and sum(map(len, texts)) <= _FEW_CHARACTERS:
            encode = self._tokenizer.encode
            return [np.array(encode(text, add_special_tokens=False).ids, np.int32) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def _read_long(self, text: str, name: str, index: int, enough: int | None) -> Iterator[Int32]:
        tokens = 0
        for piece in self._pieces(text):
            if len(piece) > _LONGEST_STRETCH:
                raise InputError(
                    f"{name} has more than {_LONGEST_STRETCH} characters in a row without white space or "
                    "punctuation; it cannot be tokenized in bounded memory, so break it up",
                    index=index,
                )
            [content] = self._read_chunk([piece])
            yield content
            tokens += content.shape[0]
            if enough is not None and tokens > enough:
                return

    def _pieces(self, text: str) -> Iterator[str]:
        """The text in pieces that end at a cut, as soon as ``_PIECE`` characters are in one."""
        start = 0
        while len(text) - start > _PIECE:
            found = self._cut.search(text, start + _PIECE - 1) if self._cut else None
            if found is None:
                break
            yield text[start : found.end()]
            start = found.end()
        yield text[start:]


def _chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    """Consecutive texts that are tokenized in one call; a long one is alone."""
    chunk: list[str] = []
    characters = 0
    for text in texts:
        if chunk and (len(chunk) == _MOST_TEXTS or characters + len(text) > LONG_TEXT):
            yield chunk
            chunk, characters = [], 0
        chunk.append(text)
        characters += len(text)
    if chunk:
        yield chunk


def _check_surrogates(texts: Sequence[str], first: int, name: str) -> None:
    for index, text in enumerate(texts, first):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TextEncodingError(
                f"{name.format(index)} has the lone surrogate U+{ord(text[error.start]):04X} at position "
                f"{error.start}, which UTF-8 cannot hold; decode the text with the encoding it was written in",
                index=index,
            ) from error
