"""Pseudo-log-likelihood of texts (Salazar et al. 2020, https://arxiv.org/abs/1910.14659)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bertrt.arguments import check_choice
from bertrt.backends.base import Int64, TokenBatch, Wanted
from bertrt.batching import offsets_of
from bertrt.errors import InputError
from bertrt.tasks.context import TaskContext, computed
from bertrt.tokenization import Encoded

ScoreOverflow = Literal["error", "truncate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PseudoLikelihood:
    """How probable a masked language model finds a text.

    Attributes:
        log_likelihood: sum over the scored tokens of ``ln P(token | all other tokens of the text)``, in nats.
        tokens: how many tokens were scored.
        pseudo_perplexity: ``exp(-log_likelihood / tokens)``.
    """

    log_likelihood: float
    tokens: int
    pseudo_perplexity: float


def score(
    context: TaskContext, texts: Sequence[str], *, overflow: ScoreOverflow = "error"
) -> list[PseudoLikelihood]:
    """Answer `Engine.score` for a list of texts."""
    context.require("mlm", "score")
    check_choice(overflow, name="overflow", choices=("error", "truncate"))
    if not texts:
        return []
    encodings = [
        windows[0]
        for windows in context.tokenizer.encode(texts, max_length=context.max_length, overflow=overflow)
    ]
    positions = [_scored_positions(context, index, encoded) for index, encoded in enumerate(encodings)]

    # One job for each scored token. Only these indices are held; the masked copies are made batch by batch.
    counts = np.array([places.shape[0] for places in positions], dtype=np.int64)
    job_text = np.repeat(np.arange(len(encodings)), counts)
    job_position = np.concatenate(positions)
    lengths = np.array([encoded.input_ids.shape[0] for encoded in encodings], dtype=np.int64)
    log_probs = np.empty(job_text.shape[0], np.float64)
    for indices in context.plan(lengths[job_text], positions=np.ones_like(job_text)):
        batch, places, tokens = _masked_copies(
            context, [encodings[text] for text in job_text[indices]], job_position[indices]
        )
        output = context.backend.run(
            batch, Wanted(mlm_positions=places, mlm_candidates=tokens[:, np.newaxis])
        )
        log_probs[indices] = computed(output.mlm_candidate_log_probs)[:, 0]

    # Summed per text at the end, in the order of its tokens: the sum does not depend on the batches.
    return [_likelihood(part) for part in np.split(log_probs, np.cumsum(counts)[:-1])]


def _scored_positions(context: TaskContext, index: int, encoded: Encoded) -> Int64:
    """``[scored] int64``: positions in the sequence of all tokens but the special ones."""
    tokenizer = context.tokenizer
    special = [tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.mask_id]
    positions = np.flatnonzero(~np.isin(encoded.input_ids, special))
    if positions.shape[0] == 0:
        raise InputError(
            f"text {index} has special tokens only; score needs at least one other token", index=index
        )
    return positions.astype(np.int64)


def _masked_copies(
    context: TaskContext, encodings: Sequence[Encoded], positions: Int64
) -> tuple[TokenBatch, Int64, Int64]:
    """One copy of each sequence with one token masked: the batch, the masks' places in it, their tokens."""
    offsets = offsets_of([encoded.input_ids.shape[0] for encoded in encodings])
    input_ids = np.concatenate([encoded.input_ids for encoded in encodings])
    places = offsets[:-1] + positions
    tokens = input_ids[places].astype(np.int64)
    input_ids[places] = context.tokenizer.mask_id
    segments = np.concatenate([encoded.token_type_ids for encoded in encodings])
    return TokenBatch(input_ids=input_ids, token_type_ids=segments, offsets=offsets), places, tokens


def _likelihood(log_probs: np.ndarray[tuple[int], np.dtype[np.float64]]) -> PseudoLikelihood:
    total, tokens = float(log_probs.sum()), int(log_probs.shape[0])
    with np.errstate(over="ignore"):  # a token of probability 0 makes it infinite, which is the answer
        perplexity = float(np.exp(-total / tokens))
    return PseudoLikelihood(log_likelihood=total, tokens=tokens, pseudo_perplexity=perplexity)
