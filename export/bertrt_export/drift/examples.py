"""Masked-LM and next-sentence examples from text, by the procedure of the model card.

The card (and Devlin et al. 2019, section 3.1 and appendix A.2, https://arxiv.org/abs/1810.04805) says:

- an input is ``[CLS] A [SEP] B [SEP]`` with a combined length of less than 512 tokens, limited to 128 tokens
  for 90 % of the steps;
- A and B are spans of one or more sentences; with probability 0.5 B follows A in the text, otherwise B is a
  random span;
- 15 % of the tokens are masked: of these 80 % become ``[MASK]``, 10 % a random other token, and 10 % stay.

From the authors' own code comes what the card leaves open: one example in ten is shorter than its limit, by a
length drawn at random; and special tokens are never masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bertrt.backends.base import Int32, Int64
from bertrt.errors import InputError
from bertrt.tokenization import WordPieceTokenizer
from bertrt_export.drift.text import Corpus

MASKED = 0.15
REPLACED_BY_MASK = 0.8
REPLACED_BY_RANDOM = 0.1
FOLLOWS = 0.5
SHORT_LIMIT = 128
LONG_LIMIT = 511
LONG = 0.1
SHORTENED = 0.1
# [CLS], A, [SEP], B, [SEP] with one token each.
_SHORTEST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One input and what is right about it.

    Attributes:
        input_ids: ``[tokens] int32``, special tokens and masks in place.
        token_type_ids: ``[tokens] int32``, 0 up to the first ``[SEP]``, then 1.
        positions: ``[masked] int64``, rising: the tokens to be predicted, those left as they are included.
        labels: ``[masked] int64``: what stood there.
        follows: whether B follows A in the text.
    """

    input_ids: Int32
    token_type_ids: Int32
    positions: Int64
    labels: Int64
    follows: bool


def build_examples(
    corpus: Corpus,
    tokenizer: WordPieceTokenizer,
    *,
    count: int,
    seed: int,
    max_length: int,
    segments: int = 2,
) -> Iterator[Example]:
    """Yield examples; the same arguments give the same ones.

    The spans A begin at sentences drawn without repetition until all have had their turn, so that the text
    is covered evenly.

    Args:
        corpus: the text.
        tokenizer: of the model.
        count: examples.
        seed: of the random choices.
        max_length: positions of the model.
        segments: of the model; with one, every token is in segment 0.

    Raises:
        InputError: the model has too few positions for a pair.
    """
    if max_length < _SHORTEST:
        raise InputError(f"the model has {max_length} positions; a pair of spans needs {_SHORTEST}")
    rng = np.random.default_rng(seed)
    spans = _Spans(corpus)
    masking = _Masking(tokenizer)
    order = spans.starts[:0]
    for _ in range(count):
        if not order.shape[0]:
            order = rng.permutation(spans.starts)
        start, order = order[0], order[1:]
        limit = min(max_length, LONG_LIMIT if rng.random() < LONG else SHORT_LIMIT)
        room = limit - 3
        if rng.random() < SHORTENED and room > 2:
            room = int(rng.integers(2, room))
        first, second, follows = spans.pair(rng, int(start), room)
        ids = np.concatenate(
            [[tokenizer.cls_id], first, [tokenizer.sep_id], second, [tokenizer.sep_id]], dtype=np.int32
        )
        types = np.zeros_like(ids)
        types[first.shape[0] + 2 :] = min(1, segments - 1)
        positions, labels = masking.apply(rng, ids)
        yield Example(
            input_ids=ids, token_type_ids=types, positions=positions, labels=labels, follows=follows
        )


class _Spans:
    """The sentences of all documents in a row, from which spans are cut."""

    def __init__(self, corpus: Corpus) -> None:
        self._sentences = [sentence for document in corpus.documents for sentence in document]
        lengths = [len(document) for document in corpus.documents]
        # For each sentence the beginning and the end of its document, as indices into the row.
        self._ends = np.repeat(np.cumsum(lengths), lengths)
        self._begins = self._ends - np.repeat(lengths, lengths)
        indices = np.arange(len(self._sentences))
        # Where A may begin: wherever a sentence is left in the document to follow it.
        self.starts: Int64 = indices[indices + 1 < self._ends]

    def pair(self, rng: np.random.Generator, start: int, room: int) -> tuple[Int32, Int32, bool]:
        """Spans A and B of together at most ``room`` tokens, and whether B follows A."""
        share = max(1, int(rng.integers(room // 4, max(room // 4 + 1, 3 * room // 4))))
        # A leaves a sentence of its document to follow, and one of the text that does not follow.
        last = min(int(self._ends[start]) - 1, start + len(self._sentences) - 2)
        first, end = self._take(start, last, share)
        follows = bool(rng.random() < FOLLOWS)
        # The end of A is kept, as that is what B follows.
        first = first[-(room - max(1, room // 5)) :]
        begin, stop = (end, int(self._ends[end])) if follows else self._elsewhere(rng, start, end)
        second, _ = self._take(begin, stop, room - first.shape[0])
        return first, second[: room - first.shape[0]], follows

    def _elsewhere(self, rng: np.random.Generator, start: int, end: int) -> tuple[int, int]:
        """A random sentence of another document, and where that ends.

        In a text of a single document, any sentence outside A but the one that follows it; and A ends it.
        """
        left, right = int(self._begins[start]), int(self._ends[start])
        if right - left == len(self._sentences):
            left, right = start, end + 1
        begin = int(rng.integers(len(self._sentences) - (right - left)))
        if begin >= left:
            begin += right - left
        stop = int(self._ends[begin])
        return begin, min(stop, left) if begin < left else stop

    def _take(self, start: int, stop: int, tokens: int) -> tuple[Int32, int]:
        """Whole sentences from ``start``, before ``stop``, until there are enough tokens; and the next."""
        taken = [self._sentences[start]]
        count, index = taken[0].shape[0], start + 1
        while count < tokens and index < stop:
            taken.append(self._sentences[index])
            count += taken[-1].shape[0]
            index += 1
        return np.concatenate(taken), index


class _Masking:
    """Replaces tokens by the 80/10/10 rule."""

    def __init__(self, tokenizer: WordPieceTokenizer) -> None:
        special = {
            tokenizer.cls_id,
            tokenizer.sep_id,
            tokenizer.pad_id,
            tokenizer.mask_id,
            tokenizer.unk_id,
        }
        # Rising ids of the tokens that may be masked, and that may stand in for another.
        self._ordinary: Int64 = np.setdiff1d(np.arange(tokenizer.vocab_size), sorted(special))
        self._mask_id = tokenizer.mask_id

    def apply(self, rng: np.random.Generator, ids: Int32) -> tuple[Int64, Int64]:
        """Mask ``ids`` in place; return the positions, rising, and what stood there."""
        candidates = np.flatnonzero(np.isin(ids, self._ordinary))
        if not candidates.shape[0]:
            return candidates.astype(np.int64), candidates.astype(np.int64)
        count = max(1, round(MASKED * candidates.shape[0]))
        positions = np.sort(rng.choice(candidates, count, replace=False)).astype(np.int64)
        labels = ids[positions].astype(np.int64)
        draw = rng.random(count)
        ids[positions[draw < REPLACED_BY_MASK]] = self._mask_id
        replaced = (draw >= REPLACED_BY_MASK) & (draw < REPLACED_BY_MASK + REPLACED_BY_RANDOM)
        ids[positions[replaced]] = self._others(rng, labels[replaced])
        return positions, labels

    def _others(self, rng: np.random.Generator, labels: Int64) -> Int64:
        """A random ordinary token for each, never the one that it replaces."""
        if self._ordinary.shape[0] < 2:
            return labels
        drawn: Int64 = rng.integers(self._ordinary.shape[0] - 1, size=labels.shape[0])
        drawn += drawn >= np.searchsorted(self._ordinary, labels)
        return self._ordinary[drawn]
