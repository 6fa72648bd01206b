"""Any number of sequences becomes batches of bounded size, and encodings become packed batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bertrt.backends.base import Int64, TokenBatch
from bertrt.errors import InputError

if TYPE_CHECKING:
    from bertrt.tokenization import Encoded

# Tokens of one batch, padding included where a backend pads. A few thousand rows keep every core busy in the matrix
# products: on two cores, four times as many were no faster and took twice the memory. BERT-large's widest
# activation of it is 64 MiB.
DEFAULT_TOKEN_BUDGET = 4_096
MAX_SEQUENCES = 256
# Rows of logits in one batch: 1,024 rows over 30,522 WordPieces are 125 MB.
MAX_MASKED_POSITIONS = 1_024


def plan_batches(
    lengths: npt.ArrayLike,
    *,
    token_budget: int,
    pads: bool = True,
    max_sequences: int = MAX_SEQUENCES,
    positions: npt.ArrayLike | None = None,
    max_positions: int = MAX_MASKED_POSITIONS,
) -> list[Int64]:
    """Sort sequences by length and cut them into batches.

    The longest come first, so that the first batch needs the most memory and the later ones reuse it; equal
    lengths keep their order. Every sequence is in exactly one batch. One sequence that is over a limit by
    itself is a batch of its own.

    Args:
        lengths: ``[sequences]``, tokens of each sequence.
        token_budget: the most tokens of a batch.
        pads: whether each sequence counts with the tokens of the batch's longest, or with its own.
        max_sequences: the most sequences of a batch.
        positions: ``[sequences]``, positions of each sequence at which the masked-LM head will run; ``None``
            when it will not.
        max_positions: the most such positions of a batch.

    Returns:
        For each batch the indices of its sequences, ``[n] int64``.

    Raises:
        InputError: a limit below 1, or arrays of different shapes.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    rows = np.zeros_like(sizes) if positions is None else np.asarray(positions, dtype=np.int64)
    if sizes.ndim != 1 or rows.shape != sizes.shape:
        raise InputError(
            "[plan_batches] lengths and positions must be one-dimensional and of equal length, got shapes "
            f"{sizes.shape} and {rows.shape}"
        )
    for name, limit in (
        ("token_budget", token_budget),
        ("max_sequences", max_sequences),
        ("max_positions", max_positions),
    ):
        if limit < 1:
            raise InputError(f"[plan_batches] {name} must be at least 1, got {limit}")

    order = np.argsort(-sizes, kind="stable")
    sizes, ends = sizes[order], np.cumsum(rows[order])
    token_ends = np.cumsum(sizes)
    batches: list[Int64] = []
    begin = 0
    while begin < order.shape[0]:
        if pads:
            fits = begin + token_budget // max(int(sizes[begin]), 1)
        else:
            fits = _first_over(token_ends, begin, token_budget)
        end = max(begin + 1, min(begin + max_sequences, fits, _first_over(ends, begin, max_positions)))
        batches.append(order[begin:end])
        begin = end
    return batches


def _first_over(ends: Int64, begin: int, limit: int) -> int:
    """Where a running total, counted from ``begin``, is over a limit for the first time."""
    before = int(ends[begin - 1]) if begin else 0
    return int(np.searchsorted(ends, before + limit, side="right"))


def pack(encodings: Sequence[Encoded]) -> TokenBatch:
    """Lay encodings end to end.

    Raises:
        InputError: there are none.
    """
    if not encodings:
        raise InputError("[pack] a batch needs at least one sequence, got none")
    return TokenBatch(
        input_ids=np.concatenate([encoded.input_ids for encoded in encodings]),
        token_type_ids=np.concatenate([encoded.token_type_ids for encoded in encodings]),
        offsets=offsets_of([encoded.input_ids.shape[0] for encoded in encodings]),
    )


def offsets_of(lengths: npt.ArrayLike) -> Int64:
    """``[sequences + 1] int64``: where sequences of these lengths begin and end when laid end to end."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(lengths, dtype=np.int64))])
