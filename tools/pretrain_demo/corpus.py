"""The text to learn from: read from a file, cut into sentences, turned into WordPieces."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from bertrt.errors import InputError, TextEncodingError

# A document is its paragraphs.
Document = Sequence[str]

# What each special token is for, in the order in which a new vocabulary begins.
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

# A shorter document has no room for two spans and a choice of where they begin.
_LEAST_SENTENCES = 4
_LEAST_HELD_OUT = 8
_HELD_OUT_SHARE = 50
_SENTENCES_AT_ONCE = 10_000
# Rarer characters than the first thousand become [UNK].
_LARGEST_ALPHABET = 1000

# White space after . ! ? (and a closing quote), before a capital letter (and an opening quote).
_SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["']))\s+(?=["'(]?[A-Z])""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents as WordPiece ids, one after the other.

    Attributes:
        tokens: ``[tokens]`` int32, all ids without special tokens.
        sentences: ``[sentences + 1]`` int64, where each sentence begins in ``tokens``, and the end.
        documents: ``[documents + 1]`` int64, the first sentence of each document, and the end.
    """

    tokens: npt.NDArray[np.int32]
    sentences: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.documents) - 1

    @property
    def document_bounds(self) -> npt.NDArray[np.int64]:
        """``[documents + 1]``: where each document begins in ``tokens``, and the end."""
        return self.sentences[self.documents]

    def select(self, chosen: Iterable[int]) -> Corpus:
        """The corpus of the chosen documents, in that order."""
        documents = [
            self.sentences[self.documents[index] : self.documents[index + 1] + 1] for index in chosen
        ]
        return _join(
            [np.diff(bounds) for bounds in documents],
            [self.tokens[bounds[0] : bounds[-1]] for bounds in documents],
        )


def read_documents(path: Path) -> list[Document]:
    """Read a text file: one paragraph a line, a blank line (or several) between documents.

    Raises:
        InputError: the file is not there, cannot be read, or holds no text.
        TextEncodingError: the file is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read the corpus {str(path)!r}: {error.strerror}; "
            "expected a UTF-8 text file with one paragraph a line and a blank line between chapters"
        ) from error
    try:
        # Some editors begin a file with a byte order mark, which is no part of the text.
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TextEncodingError(
            f"the corpus {str(path)!r} is not UTF-8: line {line}, byte {error.start} of the file "
            f"({error.reason}); convert it to UTF-8"
        ) from error
    documents: list[list[str]] = [[]]
    for line_of_text in text.split("\n"):
        if paragraph := line_of_text.strip():
            documents[-1].append(paragraph)
        elif documents[-1]:
            documents.append([])
    found: list[Document] = [document for document in documents if document]
    if not found:
        raise InputError(f"the corpus {str(path)!r} is empty; give a file with text")
    return found


def sentences(document: Document) -> Iterator[str]:
    """The sentences of a document's paragraphs."""
    for paragraph in document:
        yield from filter(None, _SENTENCE_END.split(paragraph))


def train_vocabulary(documents: Sequence[Document], size: int) -> list[str]:
    """A cased WordPiece vocabulary: the special tokens, the characters, then the most useful pieces.

    Raises:
        InputError: the documents do not yield that many WordPieces.
    """
    tokenizer = _bare_tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106 - a token of text
    # The trainer numbers the continuing characters (##a, ...) in the order of a hash table that differs from
    # run to run, and breaks ties by these numbers. Named as special tokens, they are numbered by us.
    continuing = [f"##{character}" for character in _continuing_characters(tokenizer, documents)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=2,
        limit_alphabet=_LARGEST_ALPHABET,
        special_tokens=[*SPECIAL_TOKENS, *continuing],
        show_progress=False,
    )
    tokenizer.train_from_iterator(chain.from_iterable(documents), trainer)
    if (found := tokenizer.get_vocab_size()) != size:
        reason = "yields only" if found < size else "has so many characters that it needs"
        raise InputError(
            f"the corpus {reason} {found} WordPieces where {size} were asked for; "
            "give another corpus or another --vocabulary"
        )
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.__getitem__)


def tokenize(documents: Sequence[Document], vocabulary: Sequence[str]) -> Corpus:
    """Documents as ids; those with too few sentences to draw examples from are left out.

    Raises:
        InputError: there are too few documents to learn from some and hold others out.
    """
    ids = {token: number for number, token in enumerate(vocabulary)}
    # Without added tokens: a "[MASK]" that an author wrote is text.
    tokenizer = _bare_tokenizer(models.WordPiece(ids, unk_token="[UNK]"))  # noqa: S106 - a token of text
    lengths: list[npt.NDArray[np.int64]] = []
    tokens: list[npt.NDArray[np.int32]] = []
    for document in documents:
        encoded = list(_encode(tokenizer, sentences(document)))
        if len(encoded) >= _LEAST_SENTENCES:
            lengths.append(np.array([len(sentence) for sentence in encoded], np.int64))
            tokens.append(np.concatenate(encoded))
    if len(lengths) < 2 * _LEAST_HELD_OUT:
        raise InputError(
            f"the corpus has {len(lengths)} documents of at least {_LEAST_SENTENCES} sentences, "
            f"at least {2 * _LEAST_HELD_OUT} are needed; give more text, with a blank line between chapters"
        )
    return _join(lengths, tokens)


def hold_out(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """Split a corpus by documents: to learn from, and held out (a fiftieth, at least eight)."""
    # No seed to choose: a run that continues another must hold out the same documents.
    order = np.random.default_rng(0).permutation(len(corpus))
    count = max(_LEAST_HELD_OUT, len(corpus) // _HELD_OUT_SHARE)
    return corpus.select(order[count:]), corpus.select(order[:count])


def _bare_tokenizer(model: models.WordPiece) -> Tokenizer:
    """BERT's cased normalisation and word splitting around a model, without special tokens."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _continuing_characters(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[str]:
    """The most frequent characters that can stand inside a word, sorted."""
    counts: Counter[str] = Counter()
    for paragraph in chain.from_iterable(documents):
        counts.update(paragraph)

    def stays_in_word(character: str) -> bool:
        normal = tokenizer.normalizer.normalize_str(f"a{character}")
        return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)] == [f"a{character}"]

    common = sorted(counts, key=lambda character: (-counts[character], character))[:_LARGEST_ALPHABET]
    return sorted(filter(stays_in_word, common))


def _encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[npt.NDArray[np.int32]]:
    """The ids of each text that has any."""
    remaining = iter(texts)
    while some := list(islice(remaining, _SENTENCES_AT_ONCE)):
        for encoding in tokenizer.encode_batch(some):
            if encoding.ids:
                yield np.array(encoding.ids, np.int32)


def _join(lengths: Sequence[npt.NDArray[np.int64]], tokens: Sequence[npt.NDArray[np.int32]]) -> Corpus:
    """A corpus from the sentence lengths and the ids of each document."""
    counts = [len(document) for document in lengths]
    return Corpus(
        tokens=np.concatenate(tokens),
        sentences=np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64),
        documents=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )
