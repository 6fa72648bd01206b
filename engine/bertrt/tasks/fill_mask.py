"""Fill-mask: the most probable tokens at each mask, with the answers that the transformers pipeline gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from bertrt.arguments import as_texts, check_choice, check_integer
from bertrt.backends.base import Float32, Int32, Int64, Wanted
from bertrt.batching import pack
from bertrt.errors import InputError, MaskNotFoundError, TextEncodingError, TooManyMasksError
from bertrt.tasks.context import TaskContext, computed
from bertrt.tokenization import Encoded, Overflow

DEFAULT_TOP_K = 5
# 15 % of 512 positions: the most masks that BERT met in a sequence of its pretraining.
DEFAULT_MAX_MASKS = 77


class MaskPrediction(TypedDict):
    """One proposal for one mask.

    Attributes:
        score: probability of the token at the mask, from the softmax over the whole vocabulary.
        token: its id.
        token_str: its text.
        sequence: the text with the token in place of the mask.
    """

    score: float
    token: int
    token_str: str
    sequence: str


# One mask in the text: its predictions. Several: the predictions of each mask.
TextPredictions = list[MaskPrediction] | list[list[MaskPrediction]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A sequence to run: the masks that it answers, by their number in the text and their position in it."""

    text: int
    encoded: Encoded
    masks: tuple[int, ...]
    positions: Int64


def fill_mask(
    context: TaskContext,
    texts: Sequence[str],
    *,
    top_k: int = DEFAULT_TOP_K,
    targets: str | Iterable[str] | None = None,
    overflow: Overflow = "error",
    stride: int | None = None,
    max_masks: int = DEFAULT_MAX_MASKS,
) -> list[TextPredictions]:
    """Answer `Engine.fill_mask` for a list of texts."""
    context.require("mlm", "fill_mask")
    top_k = check_integer(top_k, name="top_k", most=context.architecture.vocab_size)
    max_masks = check_integer(max_masks, name="max_masks")
    check_choice(overflow, name="overflow", choices=("error", "truncate", "window"))
    # Half a window: a mask then has a quarter of a window on either side, save at the ends of the text; and
    # as only windows that answer a mask are run, more overlap costs nothing.
    stride = context.stride(stride, default=(context.max_length - 2) // 2)
    candidates = None if targets is None else _target_ids(context, targets)
    if not texts:
        return []
    encodings = context.tokenizer.encode(
        texts, max_length=context.max_length, overflow=overflow, stride=stride, keep_masks=True
    )

    answers: list[list[list[MaskPrediction]]] = []
    jobs: list[_Job] = []
    for text, windows in enumerate(encodings):
        found = _jobs_of(context, text, windows, max_masks)
        jobs.extend(found)
        answers.append([[] for job in found for _ in job.masks])

    plan = context.plan(
        [job.encoded.input_ids.shape[0] for job in jobs], positions=[len(job.masks) for job in jobs]
    )
    for indices in plan:
        batch_jobs = [jobs[index] for index in indices]
        rows = iter(zip(*_predict(context, batch_jobs, top_k, candidates), strict=True))
        for job in batch_jobs:
            several = len(answers[job.text]) > 1
            for mask, position in zip(job.masks, job.positions, strict=True):
                ids, scores = next(rows)
                answers[job.text][mask] = [
                    _prediction(
                        context, job.encoded.input_ids, int(position), int(id_), float(score), several
                    )
                    for id_, score in zip(ids, scores, strict=True)
                ]
    return [masks if len(masks) > 1 else masks[0] for masks in answers]


def _target_ids(context: TaskContext, targets: str | Iterable[str]) -> Int64:
    """Ids of the targets, ``[c] int64``, rising, each once."""
    names, _ = as_texts(targets, name="targets")
    if not names:
        raise InputError("targets is empty; name at least one token, or leave it out to rank the vocabulary")
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise TextEncodingError(
                f"target {name!r} has a lone surrogate at position {error.start}, which UTF-8 cannot hold; "
                "decode it with the encoding it was written in"
            ) from error
    ids = {name: context.tokenizer.token_to_id(name) for name in names}
    unknown = [name for name, id_ in ids.items() if id_ is None]
    if unknown:
        shown = ", ".join(map(repr, unknown[:8])) + (", ..." if len(unknown) > 8 else "")
        raise InputError(
            f"targets not in the vocabulary: {shown}; a target is one token, written as the vocabulary has "
            "it (lower case in an uncased one, '##' before a piece that continues a word)"
        )
    return np.unique(np.array(list(ids.values()), dtype=np.int64))


def _jobs_of(context: TaskContext, text: int, windows: Sequence[Encoded], max_masks: int) -> list[_Job]:
    """Choose the window that answers each mask of a text: the one with most context on its shorter side."""
    mask_id, token = context.tokenizer.mask_id, context.tokenizer.mask_token
    found = [np.flatnonzero(window.input_ids == mask_id) for window in windows]
    # A mask in the overlap of windows is met more than once; it is known by its place in the text.
    places = [window.start + positions for window, positions in zip(windows, found, strict=True)]
    masks = np.unique(np.concatenate(places))
    if masks.shape[0] == 0:
        raise MaskNotFoundError(
            f"text {text} has no mask; write {token} where a token is to be predicted", index=text
        )
    if masks.shape[0] > max_masks:
        raise TooManyMasksError(
            f"text {text} has {masks.shape[0]} masks, the call allows {max_masks}; "
            "mask fewer tokens or raise max_masks",
            index=text,
        )
    best: dict[int, tuple[int, int]] = {}
    chosen: dict[int, int] = {}
    for number, (window, positions, where) in enumerate(zip(windows, found, places, strict=True)):
        length = window.input_ids.shape[0]
        for position, place in zip(positions.tolist(), where.tolist(), strict=True):
            context_size = (min(position, length - 1 - position), length)
            if place not in best or context_size > best[place]:
                best[place], chosen[place] = context_size, number
    jobs = []
    for number in sorted(set(chosen.values())):
        own = [mask for mask, place in enumerate(masks.tolist()) if chosen[place] == number]
        positions = masks[own] - windows[number].start
        jobs.append(_Job(text=text, encoded=windows[number], masks=tuple(own), positions=positions))
    return jobs


def _predict(
    context: TaskContext, jobs: Sequence[_Job], top_k: int, candidates: Int64 | None
) -> tuple[Int64, Float32]:
    """Run one batch: ids ``[masks, k] int64`` and probabilities ``[masks, k] float32``, best first."""
    batch = pack([job.encoded for job in jobs])
    positions = np.concatenate(
        [offset + job.positions for offset, job in zip(batch.offsets[:-1], jobs, strict=True)]
    )
    if candidates is None:
        output = context.backend.run(batch, Wanted(mlm_positions=positions, mlm_top_k=top_k))
        return computed(output.mlm_top_ids), np.exp(computed(output.mlm_top_log_probs))
    tiled = np.tile(candidates, (positions.shape[0], 1))
    output = context.backend.run(batch, Wanted(mlm_positions=positions, mlm_candidates=tiled))
    log_probs = computed(output.mlm_candidate_log_probs)
    # Stable, and the candidates rise: equal probabilities come by rising token id, as without targets.
    order = np.argsort(-log_probs, axis=1, kind="stable")[:, :top_k]
    return candidates[order], np.exp(np.take_along_axis(log_probs, order, axis=1))


def _prediction(
    context: TaskContext, input_ids: Int32, position: int, token: int, score: float, several: bool
) -> MaskPrediction:
    filled = input_ids.copy()
    filled[position] = token
    # As the pipeline does: special tokens are shown only when other masks must stay visible, [PAD] never.
    filled = filled[filled != context.tokenizer.pad_id]
    return MaskPrediction(
        score=score,
        token=token,
        token_str=context.tokenizer.decode([token], skip_special_tokens=False),
        sequence=context.tokenizer.decode(filled.tolist(), skip_special_tokens=not several),
    )
