"""A question in parts: some of its sequences each, padded or not, and their answers put together again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bertrt.backends.base import Int64, TokenBatch
from bertrt.batching import offsets_of, pack, plan_batches
from bertrt.tokenization import WordPieceTokenizer
from bertrt_bench.cases import RANKED, TOP_K, Question, Task
from bertrt_bench.contestants.base import Answer, Run

_Array = npt.NDArray[Any]
# Tokens of a padded block, padding included, that are tried for a mix; and on how many tokens, how often.
TOKEN_BUDGETS: Final = (256, 512, 1_024, 2_048, 4_096)
_TRIAL_TOKENS: Final = 3_000
_TRIALS: Final = 3
# The model's output for a block: [batch, sequence, ...], or [batch, 2] of next-sentence. What it returns must
# still be there when other blocks have been run, but for the tasks in RANKED.
Forward = Callable[["Block"], _Array]
# Best tokens of each row of logits [rows, vocab].
Rank = Callable[[_Array], Answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some sequences of a question, packed.

    Attributes:
        tokens: their ids.
        sequences: which they are, ``[n] int64``.
        places: where their tokens lie in the question's, ``[tokens] int64``.
        masks: which of the question's masks are theirs, ``[m] int64``.
        positions: where those lie in ``tokens.input_ids``, ``[m] int64``.
    """

    tokens: TokenBatch
    sequences: Int64
    places: Int64
    masks: Int64
    positions: Int64

    def rows(self, task: Task) -> Int64:
        """Which rows of the question's answer are the part's."""
        if task in RANKED:
            return self.masks
        return self.sequences if task == "next-sentence" else self.places


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A part, padded to its longest sequence.

    Attributes:
        part: see above.
        real: ``[batch, sequence] bool``: what is no padding.
        input_ids: ``[batch, sequence] int64``; 0 in the padding.
        attention_mask: ``[batch, sequence] int64``: ``real`` in ones and zeros.
        token_type_ids: ``[batch, sequence] int64``.
        mask_rows: ``[m] int64``, the row of each mask.
        mask_columns: its column.
    """

    part: Part
    real: npt.NDArray[np.bool_]
    input_ids: Int64
    attention_mask: Int64
    token_type_ids: Int64
    mask_rows: Int64
    mask_columns: Int64

    @classmethod
    def of(cls, part: Part) -> Block:
        """Pad a part."""
        tokens = part.tokens
        real = np.arange(tokens.lengths.max())[None, :] < tokens.lengths[:, None]
        input_ids, token_type_ids = (np.zeros(real.shape, dtype=np.int64) for _ in range(2))
        input_ids[real] = tokens.input_ids
        token_type_ids[real] = tokens.token_type_ids
        rows = np.searchsorted(tokens.offsets, part.positions, side="right") - 1
        return cls(
            part=part,
            real=real,
            input_ids=input_ids,
            attention_mask=real.astype(np.int64),
            token_type_ids=token_type_ids,
            mask_rows=rows,
            mask_columns=part.positions - tokens.offsets[rows],
        )

    def feeds(self) -> dict[str, Int64]:
        """The model's inputs by the names that transformers gives them."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "token_type_ids": self.token_type_ids,
        }


class Assembled(Mapping[str, _Array]):
    """The answers of parts, which become one when they are read.

    Reading is not timed: who asks for a batch can use the answers as they came.

    Args:
        pieces: for each part the rows that are its, and its answer; an array with an axis more than its rows
            need is padded, and the third item says what of it is not.
        size: rows of the whole.
    """

    def __init__(
        self, pieces: Sequence[tuple[Int64, Answer, npt.NDArray[np.bool_] | None]], size: int
    ) -> None:
        self._pieces = pieces
        self._size = size

    def __getitem__(self, name: str) -> _Array:
        whole: _Array | None = None
        for rows, answer, real in self._pieces:
            values = answer[name] if real is None else answer[name][real]
            if whole is None:
                whole = np.empty((self._size, *values.shape[1:]), values.dtype)
            whole[rows] = values
        if whole is None:
            raise KeyError(name)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces[0][1])

    def __len__(self) -> int:
        return len(self._pieces[0][1])


def cut(question: Question, *, token_budget: int | None, pads: bool = True) -> list[Part]:
    """Cut a question into parts as the runtime would: sorted by length, no part over the budget.

    A question whose sequences all have one length is a single part, and so is any without a budget.
    """
    tokens = question.tokens
    if question.case.lengths is None or token_budget is None:
        return [
            Part(
                tokens=tokens,
                sequences=np.arange(tokens.num_sequences),
                places=np.arange(tokens.num_tokens),
                masks=np.arange(question.masks.shape[0]),
                positions=question.masks,
            )
        ]
    plan = plan_batches(
        tokens.lengths, token_budget=token_budget, pads=pads, max_sequences=tokens.num_sequences
    )
    return [_part(question, sequences) for sequences in plan]


def fastest_budget(question: Question, forward: Forward) -> int:
    """The tokens of a block with which a question is answered fastest; nothing is run where there is no choice."""
    budgets = _budgets(question)
    if len(budgets) == 1:
        return budgets[0]
    return max(measure_budgets(question, forward).items(), key=lambda pair: pair[1])[0]


def measure_budgets(question: Question, forward: Forward) -> dict[int, float]:
    """How many tokens a second are answered with each number of tokens in a block.

    Small blocks have less padding, large ones keep the processor busier. Of the blocks that each budget makes,
    some are run, spread evenly over the lengths: once to warm up, and as often again as `_TRIALS` says. Where
    all sequences have one length there is one block, whatever the budget.
    """
    chosen: dict[int, list[Block]] = {}
    for budget in _budgets(question):
        parts = cut(question, token_budget=budget)
        count = max(2, -(-_TRIAL_TOKENS * len(parts) // question.case.tokens))
        some = np.unique(np.linspace(0, len(parts) - 1, min(count, len(parts))).astype(int))
        chosen[budget] = [Block.of(parts[index]) for index in some]
    seconds = dict.fromkeys(chosen, float("inf"))
    # In turns, so that what changes on the machine meanwhile meets all.
    for trial in range(1 + _TRIALS):
        for budget, blocks in chosen.items():
            start = time.perf_counter()
            for block in blocks:
                forward(block)
            if trial:
                seconds[budget] = min(seconds[budget], time.perf_counter() - start)
    return {
        budget: sum(block.part.tokens.num_tokens for block in blocks) / seconds[budget]
        for budget, blocks in chosen.items()
    }


def told_of(question: Question, token_budget: int) -> dict[str, str]:
    """What a report's details say of that choice."""
    if question.case.lengths is None:
        return {}
    return {f"{question.case.task} of the mix": f"blocks of {token_budget:,} tokens"}


def padded_run(
    question: Question, forward: Forward, *, token_budget: int, rank: Rank, tokenizer: WordPieceTokenizer
) -> Run:
    """What is timed of a contestant that computes padded blocks.

    Args:
        question: what is asked.
        forward: the model of the task.
        token_budget: the most tokens of a block, padding included.
        rank: best tokens of logits.
        tokenizer: for the task that starts with a text.
    """
    task = question.case.task

    def blocks_of(question: Question) -> list[Block]:
        return [Block.of(part) for part in cut(question, token_budget=token_budget)]

    def answer(blocks: Sequence[Block]) -> Answer:
        pieces: list[tuple[Int64, Answer, npt.NDArray[np.bool_] | None]] = []
        for block in blocks:
            output, rows = forward(block), block.part.rows(task)
            if task in RANKED:
                pieces.append((rows, rank(output[block.mask_rows, block.mask_columns]), None))
            elif task == "next-sentence":
                pieces.append((rows, {"logits": output}, None))
            else:
                name = "hidden_states" if task == "features" else "logits"
                pieces.append((rows, {name: output}, block.real))
        return Assembled(pieces, _size(question))

    if task != "fill-mask-text":
        blocks = blocks_of(question)
        return lambda: answer(blocks)

    def from_text() -> Answer:
        encodings = tokenizer.encode(question.texts, max_length=question.case.sequence)
        tokens = pack([windows[0] for windows in encodings])
        masks = np.flatnonzero(tokens.input_ids == tokenizer.mask_id)
        return answer(
            blocks_of(Question(case=question.case, tokens=tokens, masks=masks, texts=question.texts))
        )

    return from_text


def best_tokens(logits: _Array) -> Answer:
    """Log-probabilities of ``[rows, vocab] float32`` logits, and the best of each row."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    best = np.argpartition(log_probs, -TOP_K, axis=1)[:, -TOP_K:]
    order = np.argsort(-np.take_along_axis(log_probs, best, axis=1), axis=1)
    ids = np.take_along_axis(best, order, axis=1)
    return {
        "ids": ids,
        "log_probs": np.take_along_axis(log_probs, ids, axis=1),
        "all_log_probs": log_probs,
    }


def _budgets(question: Question) -> tuple[int, ...]:
    return TOKEN_BUDGETS if question.case.lengths is not None else TOKEN_BUDGETS[:1]


def _size(question: Question) -> int:
    case = question.case
    return case.batch if case.task in RANKED or case.task == "next-sentence" else case.tokens


def _part(question: Question, sequences: Int64) -> Part:
    tokens, masks = question.tokens, question.masks
    lengths = tokens.lengths[sequences]
    offsets = offsets_of(lengths)
    # Each token's place: where its sequence starts in the question, and how far into it the token is.
    places = np.repeat(tokens.offsets[:-1][sequences] - offsets[:-1], lengths) + np.arange(offsets[-1])
    inside = np.full(tokens.num_tokens, -1, dtype=np.int64)
    inside[places] = np.arange(offsets[-1])
    own = np.flatnonzero(inside[masks] >= 0)
    return Part(
        tokens=TokenBatch(
            input_ids=tokens.input_ids[places],
            token_type_ids=tokens.token_type_ids[places],
            offsets=offsets,
        ),
        sequences=sequences,
        places=places,
        masks=own,
        positions=inside[masks[own]],
    )
