"""The contract between the runtime and whatever computes: a packed batch goes in, arrays come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from bertrt.architecture import BertArchitecture
from bertrt.errors import InputError, MissingHeadError, SequenceTooLongError
from bertrt.manifest import Heads

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Sequences laid end to end, without padding.

    Attributes:
        input_ids: ``[tokens] int32``, WordPiece ids with the special tokens in place.
        token_type_ids: ``[tokens] int32``, segment ids.
        offsets: ``[sequences + 1] int64``, non-decreasing; sequence ``i`` is ``offsets[i]:offsets[i + 1]``.
    """

    input_ids: Int32
    token_type_ids: Int32
    offsets: Int64

    def __post_init__(self) -> None:
        tokens = self.input_ids.shape[0] if self.input_ids.ndim == 1 else -1
        if tokens < 0 or self.token_type_ids.shape != self.input_ids.shape:
            raise InputError(
                "[TokenBatch] input_ids and token_type_ids must be one-dimensional and of equal length, got "
                f"shapes {self.input_ids.shape} and {self.token_type_ids.shape}"
            )
        if self.input_ids.dtype != np.int32 or self.token_type_ids.dtype != np.int32:
            raise InputError(
                "[TokenBatch] input_ids and token_type_ids must be int32, got "
                f"{self.input_ids.dtype} and {self.token_type_ids.dtype}"
            )
        offsets = self.offsets
        if offsets.ndim != 1 or offsets.dtype != np.int64 or offsets.shape[0] < 2:
            raise InputError(
                "[TokenBatch] offsets must be int64 of shape [sequences + 1] with at least one sequence, got "
                f"{offsets.dtype} of shape {offsets.shape}"
            )
        if offsets[0] != 0 or offsets[-1] != tokens or bool(np.any(np.diff(offsets) < 1)):
            raise InputError(
                f"[TokenBatch] offsets must rise from 0 to the number of tokens ({tokens}) with no empty "
                f"sequence, got {offsets.tolist() if offsets.shape[0] <= 9 else '...'}"
            )

    @property
    def num_sequences(self) -> int:
        """Sequences in the batch."""
        return int(self.offsets.shape[0]) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in the batch, special tokens included."""
        return int(self.input_ids.shape[0])

    @property
    def lengths(self) -> Int64:
        """``[sequences] int64``: tokens of each sequence."""
        return np.diff(self.offsets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a run shall compute; whatever is not asked for costs nothing.

    Attributes:
        mlm_positions: ``[n] int64`` indices into ``TokenBatch.input_ids`` at which the masked-LM head runs,
            in any order; ``None`` leaves the head out.
        mlm_logits: return all the logits at those positions.
        mlm_top_k: return the ``k`` best tokens of each position; 0 for none.
        mlm_candidates: ``[n, c] int64`` token ids whose log-probabilities are returned for each position.
        hidden_states: return the last hidden state of every token.
        pooled: return the pooler's output of every sequence.
        nsp: return the next-sentence logits of every sequence.
    """

    mlm_positions: Int64 | None = None
    mlm_logits: bool = False
    mlm_top_k: int = 0
    mlm_candidates: Int64 | None = None
    hidden_states: bool = False
    pooled: bool = False
    nsp: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOutput:
    """What a run computed; a field that was not asked for is ``None``.

    Log-probabilities are natural logarithms of the softmax over the whole vocabulary.

    Attributes:
        mlm_logits: ``[n, vocab] float32``.
        mlm_top_ids: ``[n, k] int64``, best first; equal log-probabilities by rising token id.
        mlm_top_log_probs: ``[n, k] float32``.
        mlm_candidate_log_probs: ``[n, c] float32``.
        hidden_states: ``[tokens, hidden] float32``, packed as the batch is.
        pooled: ``[sequences, hidden] float32``.
        nsp_logits: ``[sequences, 2] float32``; column 0 says "B follows A", column 1 "B is random".
    """

    mlm_logits: Float32 | None = None
    mlm_top_ids: Int64 | None = None
    mlm_top_log_probs: Float32 | None = None
    mlm_candidate_log_probs: Float32 | None = None
    hidden_states: Float32 | None = None
    pooled: Float32 | None = None
    nsp_logits: Float32 | None = None


@runtime_checkable
class Backend(Protocol):
    """Runs a model on packed batches. ``run`` may be called by many threads at once."""

    @property
    def name(self) -> str:
        """The backend's name, such as ``"onnxruntime"``."""
        ...

    @property
    def threads(self) -> int:
        """Threads that one run uses."""
        ...

    @property
    def pads(self) -> bool:
        """Whether sequences of unequal length are padded, so that a batch of them costs more than its tokens."""
        ...

    def run(self, batch: TokenBatch, wanted: Wanted) -> BatchOutput:
        """Compute what is wanted.

        Raises:
            BackendRunError: the engine beneath failed.
            EngineClosedError: after ``close``.
        """
        ...

    def close(self) -> None:
        """Release the model; calling it again does nothing."""
        ...


def check_request(batch: TokenBatch, wanted: Wanted, architecture: BertArchitecture, heads: Heads) -> None:
    """Check a request against a model, so that backends need not trust their callers.

    Raises:
        SequenceTooLongError: a sequence has more tokens than the model has positions.
        MissingHeadError: a head is wanted that the model lacks.
        InputError: an id, a position or ``mlm_top_k`` is out of range, or an array has the wrong type.
    """
    longest = int(batch.lengths.max())
    if longest > architecture.max_position_embeddings:
        raise SequenceTooLongError(
            f"a sequence has {longest} tokens, the model has {architecture.max_position_embeddings} positions; "
            "cut it before it becomes a batch"
        )
    _check_range("input_ids", batch.input_ids, architecture.vocab_size)
    _check_range("token_type_ids", batch.token_type_ids, architecture.type_vocab_size)
    for head, asked, present in (
        ("masked-LM", wanted.mlm_positions is not None, heads.mlm),
        ("pooler", wanted.pooled, heads.pooler),
        ("next-sentence", wanted.nsp, heads.nsp),
    ):
        if asked and not present:
            raise MissingHeadError(f"this engine's checkpoint has no {head} head")
    positions, candidates = wanted.mlm_positions, wanted.mlm_candidates
    if positions is None:
        if wanted.mlm_logits or wanted.mlm_top_k or candidates is not None:
            raise InputError("[Wanted] mlm_logits, mlm_top_k and mlm_candidates need mlm_positions")
        return
    if positions.ndim != 1 or positions.dtype != np.int64:
        raise InputError(
            f"[Wanted] mlm_positions must be int64 of shape [n], got {positions.dtype} of shape {positions.shape}"
        )
    _check_range("mlm_positions", positions, batch.num_tokens)
    if not 0 <= wanted.mlm_top_k <= architecture.vocab_size:
        raise InputError(
            f"[Wanted] mlm_top_k must be from 0 to the vocabulary's {architecture.vocab_size}, "
            f"got {wanted.mlm_top_k}"
        )
    if candidates is not None:
        if candidates.ndim != 2 or candidates.dtype != np.int64 or len(candidates) != len(positions):
            raise InputError(
                f"[Wanted] mlm_candidates must be int64 of shape [{len(positions)}, c], "
                f"got {candidates.dtype} of shape {candidates.shape}"
            )
        _check_range("mlm_candidates", candidates, architecture.vocab_size)


def _check_range(name: str, values: Int32 | Int64, limit: int) -> None:
    if values.size and not (int(values.min()) >= 0 and int(values.max()) < limit):
        raise InputError(
            f"{name} must be from 0 to {limit - 1}, got {int(values.min())} to {int(values.max())}"
        )
