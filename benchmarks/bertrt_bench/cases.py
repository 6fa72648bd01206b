"""What is measured: tasks, shapes, and the token ids that every contestant is given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from bertrt.backends.base import Int64, TokenBatch
from bertrt.batching import offsets_of
from bertrt.errors import InputError
from bertrt.tokenization import WordPieceTokenizer

Task = Literal["features", "fill-mask", "next-sentence", "mlm-all", "fill-mask-text"]
TASKS: Final[tuple[Task, ...]] = get_args(Task)
# One mask in each sequence, answered with its best tokens.
RANKED: Final[frozenset[Task]] = frozenset({"fill-mask", "fill-mask-text"})
# Those that the masked-LM head answers.
MASKED: Final[frozenset[Task]] = RANKED | {"mlm-all"}

# The best tokens that fill-mask returns for each mask, as the transformers pipeline does by default.
TOP_K: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One task at one shape, or over a mix of lengths.

    Attributes:
        task: ``features`` (the last hidden state of every token), ``fill-mask`` (the best tokens of one mask
            in each sequence), ``next-sentence`` (the logits of each pair), ``mlm-all`` (the masked-LM
            logits at every position) or ``fill-mask-text`` (fill-mask from the text on: tokenisation counts).
        batch: sequences of one run.
        sequence: tokens of each of them, special tokens included; of a mix, of the longest.
        lengths: tokens of each sequence of a mix; ``None`` where all have ``sequence``.
    """

    task: Task
    batch: int
    sequence: int
    lengths: tuple[int, ...] | None = None

    @classmethod
    def mix(cls, task: Task, lengths: Sequence[int]) -> Case:
        """The case of sequences of these lengths."""
        return cls(task=task, batch=len(lengths), sequence=max(lengths), lengths=tuple(lengths))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Case:
        """The case of `to_json`."""
        lengths = value["lengths"]
        return cls(**{**value, "lengths": None if lengths is None else tuple(lengths)})

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    @property
    def tokens(self) -> int:
        """Tokens of one run."""
        return self.batch * self.sequence if self.lengths is None else sum(self.lengths)

    @property
    def sizes(self) -> Int64:
        """``[batch] int64``: tokens of each sequence."""
        if self.lengths is None:
            return np.full(self.batch, self.sequence, dtype=np.int64)
        return np.asarray(self.lengths, dtype=np.int64)

    def __str__(self) -> str:
        if self.lengths is None:
            return f"{self.task} at {self.batch}x{self.sequence}"
        return f"{self.task} at {self.batch} lengths of {min(self.lengths)} to {self.sequence}"


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
    """The input of one case.

    Attributes:
        case: the task and the shape.
        tokens: the packed ids, ``[case.tokens]``.
        masks: ``[batch] int64``, the place of each sequence's mask in ``tokens.input_ids``; the masked-LM
            tasks only, empty for the others.
        texts: what the tokenizer makes the ids of; ``fill-mask-text`` only, empty for the others.
    """

    case: Case
    tokens: TokenBatch
    masks: Int64
    texts: tuple[str, ...] = ()

    def save(self, folder: Path) -> None:
        """Write the arrays as ``.npy`` files, and the texts, into a folder that is there."""
        np.save(folder / "input_ids.npy", self.tokens.input_ids, allow_pickle=False)
        np.save(folder / "token_type_ids.npy", self.tokens.token_type_ids, allow_pickle=False)
        np.save(folder / "masks.npy", self.masks, allow_pickle=False)
        (folder / "texts.json").write_text(json.dumps(self.texts), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, case: Case) -> Question:
        """Read what `save` wrote."""
        tokens = TokenBatch(
            input_ids=np.load(folder / "input_ids.npy", allow_pickle=False),
            token_type_ids=np.load(folder / "token_type_ids.npy", allow_pickle=False),
            offsets=offsets_of(case.sizes),
        )
        return cls(
            case=case,
            tokens=tokens,
            masks=np.load(folder / "masks.npy", allow_pickle=False),
            texts=tuple(json.loads((folder / "texts.json").read_text(encoding="utf-8"))),
        )


def shortest(task: Task) -> int:
    """The fewest tokens of a sequence: the special tokens and one of text between each two of them."""
    return 5 if task == "next-sentence" else 3


def make_question(
    case: Case, *, special: SpecialIds, vocab_size: int, type_vocab_size: int = 2, seed: int = 0
) -> Question:
    """Draw the token ids of a case; for ``fill-mask-text`` see `bertrt_bench.texts`.

    Ids are uniform over the vocabulary without the special tokens; ``[CLS]`` and ``[SEP]`` are in their
    places. Each sequence has two segments, parted anywhere, so that an answer that leaves the segments out, or is
    to another question, is told from the right one; in ``next-sentence`` there is a ``[SEP]`` between them. The
    masked-LM tasks have one mask in each sequence, and the same ids at the same shape and seed, so that their times
    can be compared.

    Args:
        case: the task and the shape.
        special: ids that are not drawn.
        vocab_size: the size of the vocabulary.
        type_vocab_size: the second segment is 1 only if the model knows more than one.
        seed: of the draw.

    Raises:
        InputError: a sequence is too short for its special tokens, or the vocabulary has no other ones.
    """
    lengths, offsets = case.sizes, offsets_of(case.sizes)
    if int(lengths.min()) < shortest(case.task):
        raise InputError(
            f"a sequence of {int(lengths.min())} tokens is too short for {case.task}: with its special tokens "
            f"it needs at least {shortest(case.task)}"
        )
    ordinary = special.ordinary(vocab_size)
    if ordinary.size == 0:
        raise InputError(f"the vocabulary of {vocab_size} tokens has none but special ones to draw from")
    random = np.random.default_rng([seed, case.batch, case.sequence])
    ids = random.choice(ordinary, size=case.tokens).astype(np.int32)
    places = random.integers(1, lengths - 1)
    starts = offsets[:-1]
    ids[starts] = special.cls
    ids[offsets[1:] - 1] = special.sep
    masks = np.zeros(0, dtype=np.int64)
    # The last token of the first segment; in a pair a token of text is left on both sides of it.
    margin = 2 if case.task == "next-sentence" else 1
    middles = starts + random.integers(margin, lengths - margin)
    segments = np.zeros_like(ids)
    segments[np.arange(case.tokens) > np.repeat(middles, lengths)] = min(1, type_vocab_size - 1)
    if case.task == "next-sentence":
        ids[middles] = special.sep
    elif case.task in MASKED:
        masks = starts + places
        ids[masks] = special.mask
    tokens = TokenBatch(input_ids=ids, token_type_ids=segments, offsets=offsets)
    return Question(case=case, tokens=tokens, masks=masks)
