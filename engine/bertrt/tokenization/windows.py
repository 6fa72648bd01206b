"""Fitting token ids into a model's positions: windows, truncation, special tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]

# What happens to a text with more tokens than fit: an error, the first ones only, or several sequences.
Overflow = Literal["error", "truncate", "window"]

# Special tokens around the content: [CLS] A [SEP], and [CLS] A [SEP] B [SEP].
SPECIALS_OF_ONE = 2
SPECIALS_OF_PAIR = 3


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One sequence for the model.

    Attributes:
        input_ids: ``[n] int32``, with the special tokens in place.
        token_type_ids: ``[n] int32``: 0 up to and including the first ``[SEP]``, 1 after it.
        start: index of the sequence's first content token among the content tokens of its text; 0 unless it
            is a later window.
        content_length: content tokens in this sequence, that is ``n`` without the special tokens around them.
    """

    input_ids: Int32
    token_type_ids: Int32
    start: int
    content_length: int


def spans(length: int, size: int, stride: int) -> list[tuple[int, int]]:
    """Cut ``length`` tokens into windows of ``size`` that overlap by ``stride``, the last one shorter.

    The same windows as those of transformers' ``return_overflowing_tokens``: none begins after one that
    reached the end. Requires ``0 <= stride < size``.
    """
    step = size - stride
    later = -(-max(length - size, 0) // step)
    return [(start, min(start + size, length)) for start in range(0, (later + 1) * step, step)]


def longest_first(a: int, b: int, room: int) -> tuple[int, int]:
    """How many tokens of each segment stay when the longer one loses the next token until ``room`` suffices.

    The same as transformers' ``longest_first``: of an odd room, the longer segment keeps the odd token, and
    the second one if they are equally long.
    """
    if a + b <= room:
        return a, b
    half = room // 2
    if a <= half:
        return a, room - a
    if b <= half:
        return room - b, b
    return (room - half, half) if a > b else (half, room - half)


def single(content: Int32, start: int, cls_id: int, sep_id: int) -> Encoded:
    """``[CLS] content [SEP]``."""
    length = content.shape[0]
    ids = np.empty(length + SPECIALS_OF_ONE, np.int32)
    ids[0] = cls_id
    ids[1:-1] = content
    ids[-1] = sep_id
    return Encoded(ids, np.zeros(ids.shape[0], np.int32), start, length)


def pair(a: Int32, b: Int32, cls_id: int, sep_id: int) -> Encoded:
    """``[CLS] a [SEP] b [SEP]``."""
    first = a.shape[0] + SPECIALS_OF_ONE
    ids = np.empty(first + b.shape[0] + 1, np.int32)
    ids[0] = cls_id
    ids[1 : first - 1] = a
    ids[first - 1] = sep_id
    ids[first:-1] = b
    ids[-1] = sep_id
    types = np.zeros(ids.shape[0], np.int32)
    types[first:] = 1
    return Encoded(ids, types, 0, a.shape[0] + b.shape[0])
