"""Training examples: two spans, whether the second follows the first, and masked tokens.

The procedure is that of the model card, as in ``bertrt_export.drift.examples``, whose shares are used here.
That module covers a short text evenly; here documents of any number are drawn by their length, each step
has a sequence length of its own, and a span that does not follow comes from another document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bertrt_export.drift.examples import FOLLOWS, MASKED, REPLACED_BY_MASK, REPLACED_BY_RANDOM, SHORTENED

from .corpus import SPECIAL_TOKENS, Corpus

# [CLS] A [SEP] B [SEP]
_SPECIAL_COUNT = 3
_SHORTEST = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One sequence.

    Attributes:
        input_ids: ``[tokens]`` int64, masks in place.
        token_type_ids: ``[tokens]`` int64, 1 from the first token of the second span.
        positions: ``[masked]`` int64, rising: which tokens are to be predicted.
        labels: ``[masked]`` int64: the tokens that stood there.
        follows: whether the second span follows the first in its document.
    """

    input_ids: npt.NDArray[np.int64]
    token_type_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    follows: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Examples padded to the longest of them.

    Attributes:
        input_ids: ``[sequences, tokens]`` int64.
        token_type_ids: ``[sequences, tokens]`` int64.
        attention_mask: ``[sequences, tokens]`` int64, 0 at padding.
        positions: ``[masked]`` int64, rows of the states flattened to ``[sequences * tokens, hidden]``.
        labels: ``[masked]`` int64.
        next_labels: ``[sequences]`` int64, 0 where the second span follows, as transformers has it.
    """

    input_ids: torch.Tensor
    token_type_ids: torch.Tensor
    attention_mask: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    next_labels: torch.Tensor

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.attention_mask.sum())


class ExampleSource:
    """Draws examples from a corpus of at least two documents.

    Args:
        corpus: the documents.
        vocabulary: the token of each id.
    """

    def __init__(self, corpus: Corpus, vocabulary: Sequence[str]) -> None:
        self._corpus = corpus
        self._bounds = corpus.document_bounds
        self._pad, _, self._cls, self._sep, self._mask = map(vocabulary.index, SPECIAL_TOKENS)
        special = [vocabulary.index(token) for token in SPECIAL_TOKENS]
        # Rising ids of the tokens that may stand in for another.
        self._ordinary = np.setdiff1d(np.arange(len(vocabulary)), special)

    def batch(self, rng: np.random.Generator, *, sequences: int, length: int) -> Batch:
        """Draw ``sequences`` examples of at most ``length`` tokens each, 19 or more."""
        examples = [self.example(rng, length) for _ in range(sequences)]
        longest = max(len(example.input_ids) for example in examples)
        input_ids = np.full((sequences, longest), self._pad, np.int64)
        token_type_ids = np.zeros_like(input_ids)
        attention_mask = np.zeros_like(input_ids)
        for row, example in enumerate(examples):
            count = len(example.input_ids)
            input_ids[row, :count] = example.input_ids
            token_type_ids[row, :count] = example.token_type_ids
            attention_mask[row, :count] = 1
        positions = [row * longest + example.positions for row, example in enumerate(examples)]
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            token_type_ids=torch.from_numpy(token_type_ids),
            attention_mask=torch.from_numpy(attention_mask),
            positions=torch.from_numpy(np.concatenate(positions)),
            labels=torch.from_numpy(np.concatenate([example.labels for example in examples])),
            next_labels=torch.tensor([0 if example.follows else 1 for example in examples]),
        )

    def example(self, rng: np.random.Generator, length: int) -> Example:
        """Draw one example of at most ``length`` tokens; one in ten is made for a shorter length."""
        room = length - _SPECIAL_COUNT
        if rng.random() < SHORTENED:
            room = int(rng.integers(_SHORTEST, room + 1))
        first, second, follows = self.spans(rng, room)
        ids = np.concatenate([[self._cls], first, [self._sep], second, [self._sep]]).astype(np.int64)
        types = np.zeros_like(ids)
        types[len(first) + 2 :] = 1
        positions, labels = self._hide(rng, ids, len(first))
        return Example(
            input_ids=ids, token_type_ids=types, positions=positions, labels=labels, follows=follows
        )

    def spans(
        self, rng: np.random.Generator, room: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], bool]:
        """Draw two spans of at most ``room`` tokens together, and whether the second follows the first.

        Both begin and end with whole sentences, but for the first's beginning and the second's end where
        they were too long: what is cut off lies never between them.
        """
        corpus = self._corpus
        document = self._document_at(int(rng.integers(self._bounds[-1])))
        begin, end = corpus.documents[document], corpus.documents[document + 1]
        start = int(rng.integers(begin, end - 2))
        wanted = int(rng.integers(room // 4, 3 * room // 4))
        # The first sentence boundary that gives the first span its tokens, and leaves a sentence to follow.
        stop = int(np.searchsorted(corpus.sentences, corpus.sentences[start] + wanted))
        stop = min(max(stop, start + 1), int(end) - 1)
        first = corpus.tokens[corpus.sentences[start] : corpus.sentences[stop]]
        first = first[-(room - room // 5) :]
        follows = bool(rng.random() < FOLLOWS)
        if not follows:
            document = self._another_document(rng, document)
            stop = int(rng.integers(corpus.documents[document], corpus.documents[document + 1]))
        position = corpus.sentences[stop]
        limit = min(position + room - len(first), self._bounds[document + 1])
        return first, corpus.tokens[position:limit], follows

    def _document_at(self, token: int) -> int:
        """The document that a token lies in: a random token draws a document by its length."""
        return int(np.searchsorted(self._bounds, token, side="right")) - 1

    def _another_document(self, rng: np.random.Generator, document: int) -> int:
        """A document drawn by its length among all but one."""
        begin, end = int(self._bounds[document]), int(self._bounds[document + 1])
        token = int(rng.integers(int(self._bounds[-1]) - (end - begin)))
        return self._document_at(token if token < begin else token + end - begin)

    def _hide(
        self, rng: np.random.Generator, ids: npt.NDArray[np.int64], first: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Mask in place; give the positions, rising, and what stood there."""
        # All tokens but [CLS] and the two [SEP].
        candidates = np.delete(np.arange(1, len(ids) - 1), first)
        count = max(1, round(MASKED * len(candidates)))
        positions = np.sort(rng.choice(candidates, count, replace=False))
        labels = ids[positions]
        draw = rng.random(count)
        ids[positions[draw < REPLACED_BY_MASK]] = self._mask
        replaced = (draw >= REPLACED_BY_MASK) & (draw < REPLACED_BY_MASK + REPLACED_BY_RANDOM)
        # One fewer to choose from, and the ids from the token's own upwards moved by one: never the same.
        chosen = rng.integers(len(self._ordinary) - 1, size=int(replaced.sum()))
        chosen += chosen >= np.searchsorted(self._ordinary, labels[replaced])
        ids[positions[replaced]] = self._ordinary[chosen]
        return positions, labels
