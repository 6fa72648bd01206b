"""What every task needs of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy.typing as npt

from bertrt.architecture import BertArchitecture
from bertrt.arguments import as_texts, check_integer
from bertrt.backends.base import Backend, Int64
from bertrt.batching import plan_batches
from bertrt.errors import BackendRunError, MissingHeadError
from bertrt.manifest import Heads
from bertrt.tokenization import WordPieceTokenizer

__all__ = ["TaskContext", "as_texts", "check_integer", "computed"]

Head = Literal["mlm", "nsp", "pooler"]
ArrayT = TypeVar("ArrayT", bound=npt.NDArray[Any])

_HEAD_NAMES: Mapping[Head, str] = {
    "mlm": "masked-LM head",
    "nsp": "next-sentence head",
    "pooler": "pooler",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskContext:
    """The parts of an engine that answer questions. Nothing in it changes, so threads may share it.

    Attributes:
        backend: computes.
        tokenizer: the engine's own.
        architecture: the model's dimensions.
        heads: which heads the checkpoint has.
        token_budget: the most tokens of one batch, padding included where the backend pads.
        name: the engine's name, for messages.
    """

    backend: Backend
    tokenizer: WordPieceTokenizer
    architecture: BertArchitecture
    heads: Heads
    token_budget: int
    name: str

    @property
    def max_length(self) -> int:
        """The longest sequence in tokens, special tokens included."""
        return self.architecture.max_position_embeddings

    def plan(self, lengths: npt.ArrayLike, *, positions: npt.ArrayLike | None = None) -> list[Int64]:
        """Batches that suit the backend; see `bertrt.batching.plan_batches`."""
        return plan_batches(
            lengths, token_budget=self.token_budget, pads=self.backend.pads, positions=positions
        )

    def stride(self, stride: int | None, default: int) -> int:
        """The overlap of windows that was asked for, or the default, in content tokens.

        Raises:
            InputError: not a whole number from 0 to one less than the content of a window.
        """
        if stride is None:
            return default
        return check_integer(stride, name="stride", least=0, most=self.max_length - 3)

    def require(self, head: Head, asked: str) -> None:
        """Check that the checkpoint has a head.

        Raises:
            MissingHeadError: it does not; says what the engine can do instead.
        """
        if getattr(self.heads, head):
            return
        able = [
            *(["fill_mask", "score"] if self.heads.mlm else []),
            *(["next_sentence"] if self.heads.nsp else []),
            "features with pooling 'none', 'cls', 'mean'" + (" or 'pooler'" if self.heads.pooler else ""),
        ]
        raise MissingHeadError(
            f"{asked} needs the {_HEAD_NAMES[head]}, which the checkpoint of engine {self.name!r} does not "
            f"have; this engine can do {', '.join(able)}: export a checkpoint that has the head"
        )


def computed(value: ArrayT | None) -> ArrayT:
    """Return what a backend was asked for.

    Raises:
        BackendRunError: it left it out.
    """
    if value is None:
        raise BackendRunError("the backend did not return what was asked of it; report this as its defect")
    return value
