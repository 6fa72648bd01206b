"""What is measured: tasks, shapes, and the token ids that every contestant is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from bertrt.backends.base import Int64, TokenBatch
from bertrt.errors import InputError
from bertrt.tokenization import WordPieceTokenizer

Task = Literal["features", "fill-mask", "next-sentence", "mlm-all"]
TASKS: Final[tuple[Task, ...]] = get_args(Task)

# The best tokens that fill-mask returns for each mask, as the transformers pipeline does by default.
TOP_K: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One task at one shape.

    Attributes:
        task: ``features`` (the last hidden state of every token), ``fill-mask`` (the best tokens of one mask
            in each sequence), ``next-sentence`` (the logits of each pair) or ``mlm-all`` (the masked-LM
            logits at every position).
        batch: sequences of one run.
        sequence: tokens of each of them, special tokens included.
    """

    task: Task
    batch: int
    sequence: int

    @property
    def tokens(self) -> int:
        """Tokens of one run."""
        return self.batch * self.sequence

    def __str__(self) -> str:
        return f"{self.task} at {self.batch}x{self.sequence}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialIds:
    """Ids of the tokens that are not text."""

    cls: int
    sep: int
    pad: int
    mask: int
    unk: int

    @classmethod
    def of(cls, tokenizer: WordPieceTokenizer) -> SpecialIds:
        """The special ids of a tokenizer."""
        return cls(
            cls=tokenizer.cls_id,
            sep=tokenizer.sep_id,
            pad=tokenizer.pad_id,
            mask=tokenizer.mask_id,
            unk=tokenizer.unk_id,
        )

    def ordinary(self, vocab_size: int) -> npt.NDArray[np.int32]:
        """``[n] int32``: every id below ``vocab_size`` that is not special."""
        special = [self.cls, self.sep, self.pad, self.mask, self.unk]
        return np.setdiff1d(np.arange(vocab_size, dtype=np.int32), np.asarray(special, dtype=np.int32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The input of one case; every sequence has the same length, so that no contestant pads.

    Attributes:
        case: the task and the shape.
        tokens: the packed ids, ``[batch * sequence]``.
        masks: ``[batch] int64``, the place of each sequence's mask in ``tokens.input_ids``; the masked-LM
            tasks only, empty for the others.
    """

    case: Case
    tokens: TokenBatch
    masks: Int64

    def save(self, folder: Path) -> None:
        """Write the arrays as ``.npy`` files into a folder that is there."""
        np.save(folder / "input_ids.npy", self.tokens.input_ids, allow_pickle=False)
        np.save(folder / "token_type_ids.npy", self.tokens.token_type_ids, allow_pickle=False)
        np.save(folder / "masks.npy", self.masks, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path, case: Case) -> Question:
        """Read what `save` wrote."""
        tokens = TokenBatch(
            input_ids=np.load(folder / "input_ids.npy", allow_pickle=False),
            token_type_ids=np.load(folder / "token_type_ids.npy", allow_pickle=False),
            offsets=_offsets(case),
        )
        return cls(case=case, tokens=tokens, masks=np.load(folder / "masks.npy", allow_pickle=False))


def shortest(task: Task) -> int:
    """The fewest tokens of a sequence: the special tokens and one of text between each two of them."""
    return 5 if task == "next-sentence" else 3


def make_question(
    case: Case, *, special: SpecialIds, vocab_size: int, type_vocab_size: int = 2, seed: int = 0
) -> Question:
    """Draw the token ids of a case.

    Ids are uniform over the vocabulary without the special tokens; ``[CLS]`` and ``[SEP]`` are in their
    places. ``next-sentence`` is a pair of about equal halves. The masked-LM tasks have one mask in each
    sequence, and the same ids at the same shape and seed, so that their times can be compared.

    Args:
        case: the task and the shape.
        special: ids that are not drawn.
        vocab_size: the size of the vocabulary.
        type_vocab_size: the second half of a pair has segment 1 only if the model knows more than one.
        seed: of the draw.

    Raises:
        InputError: the sequence is too short for its special tokens, or the vocabulary has no other ones.
    """
    batch, length = case.batch, case.sequence
    if length < shortest(case.task):
        raise InputError(
            f"a sequence of {length} tokens is too short for {case.task}: with its special tokens it needs "
            f"at least {shortest(case.task)}"
        )
    ordinary = special.ordinary(vocab_size)
    if ordinary.size == 0:
        raise InputError(f"the vocabulary of {vocab_size} tokens has none but special ones to draw from")
    random = np.random.default_rng([seed, batch, length])
    ids = random.choice(ordinary, size=(batch, length)).astype(np.int32)
    places = random.integers(1, length - 1, size=batch)
    ids[:, 0] = special.cls
    ids[:, -1] = special.sep
    segments = np.zeros_like(ids)
    masks = np.zeros(0, dtype=np.int64)
    if case.task == "next-sentence":
        middle = length // 2
        ids[:, middle] = special.sep
        segments[:, middle + 1 :] = min(1, type_vocab_size - 1)
    elif case.task in ("fill-mask", "mlm-all"):
        masks = np.arange(batch, dtype=np.int64) * length + places
        ids.reshape(-1)[masks] = special.mask
    tokens = TokenBatch(
        input_ids=ids.reshape(-1), token_type_ids=segments.reshape(-1), offsets=_offsets(case)
    )
    return Question(case=case, tokens=tokens, masks=masks)


def _offsets(case: Case) -> Int64:
    return np.arange(case.batch + 1, dtype=np.int64) * case.sequence
