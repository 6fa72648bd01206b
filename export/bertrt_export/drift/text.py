"""The text of a drift measurement: read from a file, cut into documents and sentences of token ids."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from bertrt.backends.base import Int32
from bertrt.errors import EmptyTextError, InputError, TextEncodingError
from bertrt.tokenization import Encoded, WordPieceTokenizer

# Everything is held in memory as token ids, so that any span can follow any other. Some three million words
# are far more than a measurement needs.
LARGEST_TEXT = 16 << 20
# Fewer sentences than this say nothing about a model, and leave no choice for a span that does not follow.
FEWEST_SENTENCES = 8

# A sentence ends at white space behind . ! ? or an ellipsis (and a closing quote or bracket), or behind a
# full stop of Chinese or Japanese, which no space follows. That "Mr. Bennet" is cut does no harm: a "sentence"
# of the procedure is a span, of one or of several of these.
_STOPS = r"[.!?\N{HORIZONTAL ELLIPSIS}]"
_CLOSING = (
    r"[\"'\N{RIGHT DOUBLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}"
    r"\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK})\]]"
)
_WIDE_STOPS = r"[\N{IDEOGRAPHIC FULL STOP}\N{FULLWIDTH EXCLAMATION MARK}\N{FULLWIDTH QUESTION MARK}]"
_SENTENCE_END = re.compile(rf"(?<={_STOPS})\s+|(?<={_STOPS}{_CLOSING})\s+|(?<={_WIDE_STOPS})")
# A longer sentence is cut, as text without punctuation would otherwise be a single one.
_LONGEST_SENTENCE = 128
_SENTENCES_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text in tokens.

    Attributes:
        name: the file's name without its folder, so that a report tells nothing about the machine.
        sha256: of the text in UTF-8, in hexadecimal.
        documents: sentences of each document, none of them empty; each ``[tokens] int32``, without the special
            tokens that open and end an input.
    """

    name: str
    sha256: str
    documents: tuple[tuple[Int32, ...], ...]

    @property
    def sentences(self) -> int:
        """Sentences of all documents."""
        return sum(map(len, self.documents))

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(sentence.shape[0] for document in self.documents for sentence in document)


def read_text(path: Path) -> str:
    """Read a file of UTF-8.

    Raises:
        InputError: no such file, or one that is larger than `LARGEST_TEXT` bytes.
        TextEncodingError: not UTF-8; names the offset of the first byte that is not.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_TEXT + 1)
    except OSError as error:
        raise InputError(f"cannot read the text {str(path)!r}: {error.strerror}; pass a file") from error
    if len(data) > LARGEST_TEXT:
        raise InputError(
            f"the text {str(path)!r} is larger than {LARGEST_TEXT >> 20} MiB; a part of it is enough: pass one"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextEncodingError(
            f"{str(path)!r} is not UTF-8 at byte {error.start} ({error.reason}); convert it to UTF-8"
        ) from error


def read_corpus(text: str, tokenizer: WordPieceTokenizer, *, name: str, max_length: int) -> Corpus:
    """Cut a text into documents and sentences, and those into tokens.

    Args:
        text: paragraphs one a line; a blank line ends a document.
        tokenizer: of the model.
        name: what the report calls the text.
        max_length: positions of the model.

    Raises:
        InputError: fewer than `FEWEST_SENTENCES` sentences, or no two that follow each other.
        TextEncodingError: the tokenizer cannot encode the text.
    """
    longest = min(max_length, _LONGEST_SENTENCE + 2)
    documents: list[list[Int32]] = []
    pending = _sentences(text)
    while chunk := list(islice(pending, _SENTENCES_AT_ONCE)):
        for (document, _), windows in zip(chunk, _encode(chunk, tokenizer, longest), strict=True):
            documents.extend([] for _ in range(document + 1 - len(documents)))
            documents[document].extend(window.input_ids[1:-1] for window in windows)
    corpus = Corpus(
        name,
        hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        tuple(tuple(document) for document in documents if document),
    )
    if corpus.sentences < FEWEST_SENTENCES or all(len(document) < 2 for document in corpus.documents):
        raise InputError(
            f"the text {name!r} is too short for a drift measurement: it has {corpus.sentences} sentences in "
            f"{len(corpus.documents)} documents; it needs {FEWEST_SENTENCES}, and two that follow each other "
            "(paragraphs one a line, a blank line between documents)"
        )
    return corpus


def _sentences(text: str) -> Iterator[tuple[int, str]]:
    """Each sentence with the number of its document."""
    document = 0
    for line in text.splitlines():
        if not line.strip():
            document += 1
        for sentence in _SENTENCE_END.split(line):
            if sentence.strip():
                yield document, sentence


def _encode(
    chunk: list[tuple[int, str]], tokenizer: WordPieceTokenizer, max_length: int
) -> Iterator[list[Encoded]]:
    """The windows of each sentence; none for a sentence of which the tokenizer keeps nothing."""
    sentences = [sentence for _, sentence in chunk]
    try:
        yield from tokenizer.encode(sentences, max_length=max_length, overflow="window")
    except EmptyTextError:
        for sentence in sentences:
            try:
                yield from tokenizer.encode([sentence], max_length=max_length, overflow="window")
            except EmptyTextError:
                yield []
