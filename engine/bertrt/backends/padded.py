"""Backends that pad: a packed batch is cut into blocks ``[batch, sequence]``, and something runs those."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import numpy as np

from bertrt.architecture import BertArchitecture
from bertrt.backends.base import BatchOutput, Int32, Int64, TokenBatch, Wanted, check_request
from bertrt.errors import EngineClosedError
from bertrt.manifest import Heads
from bertrt.plans import Shape

# A block may hold this many padded tokens for each real one; beyond, sequences go to a block of their own.
_PADDING_LIMIT: Final = 1.15
_NO_ROWS = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLimits:
    """How large the blocks of a runner are.

    Attributes:
        small: below this many tokens a block costs about the same however small it is, so that small blocks are not
            split further.
        sequences: the most sequences of a block; ``None``: any number.
        tokens: the most tokens of a block, padding included; ``None``: any number.
        workers: blocks that can run at once.
    """

    small: int
    sequences: int | None = None
    tokens: int | None = None
    workers: int = 1


class BlockRunner(Protocol):
    """Runs one padded block at a time; may be called by many threads at once."""

    @property
    def limits(self) -> BlockLimits:
        """How large its blocks are."""
        ...

    def shape(self, sequences: int, longest: int) -> Shape:
        """The shape in which a block of so many sequences of at most ``longest`` tokens is run."""
        ...

    def run(self, block: PaddedBlock, wanted: Wanted, names: Sequence[str]) -> dict[str, Any]:
        """The named fields of `BatchOutput` for one block.

        ``hidden_states`` are ``[batch, sequence, hidden]``, ``pooled`` and ``nsp_logits`` begin with the block's
        sequences, what belongs to the masked-LM head has a row for each of ``block.positions``.

        Raises:
            BackendRunError: what is beneath failed.
        """
        ...

    def close(self) -> None:
        """Release the model; runs under way still have it."""
        ...


class PaddedBackend:
    """The contract of `Backend` on a `BlockRunner`."""

    def __init__(
        self, name: str, runner: BlockRunner, *, architecture: BertArchitecture, heads: Heads, threads: int
    ) -> None:
        self._name = name
        self._runner: BlockRunner | None = runner
        self._architecture = architecture
        self._heads = heads
        self._threads = threads

    @property
    def name(self) -> str:
        """The backend's name."""
        return self._name

    @property
    def threads(self) -> int:
        """Threads of one run."""
        return self._threads

    @property
    def pads(self) -> bool:
        """Each block is padded to its longest sequence at least."""
        return True

    def run(self, batch: TokenBatch, wanted: Wanted) -> BatchOutput:
        """See `bertrt.backends.base.Backend.run`."""
        check_request(batch, wanted, self._architecture, self._heads)
        runner = self._runner
        if runner is None:
            raise EngineClosedError("the engine is closed; load it again")
        names = output_names(wanted)
        if not names:
            return BatchOutput()
        arrays = _allocate(batch, wanted, self._architecture.hidden_size, self._architecture.vocab_size)

        def run_block(sequences: Int64) -> None:
            longest = int(batch.lengths[sequences].max())
            block = PaddedBlock(batch, sequences, wanted, runner.shape(len(sequences), longest))
            # Each block writes rows of its own.
            block.scatter(runner.run(block, wanted, names), arrays)

        blocks = split_by_length(batch.lengths, _share(runner.limits, batch))
        if runner.limits.workers == 1 or len(blocks) == 1:
            for sequences in blocks:
                run_block(sequences)
        else:
            with ThreadPoolExecutor(runner.limits.workers) as pool:
                # list() raises what a block raised.
                list(pool.map(run_block, blocks))
        return BatchOutput(**arrays)

    def close(self) -> None:
        """Let go of the model; runs under way still have it, and end as if nothing had happened."""
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()


class PaddedBlock:
    """Some sequences of a batch, padded to a shape.

    Attributes:
        sequences: their indices in the batch.
        real: ``[batch, sequence] bool``, which tokens are no padding; rows beyond the sequences have none.
        ids, segments: ``[batch, sequence] int32``.
        tokens: where each real token lies in the packed batch, in the block's row order.
        chosen: which of ``wanted.mlm_positions`` lie in the block.
        positions: and where, as rows of ``[batch * sequence]``, ``int64``.
    """

    def __init__(
        self, batch: TokenBatch, sequences: Int64, wanted: Wanted, shape: Shape | None = None
    ) -> None:
        lengths = batch.lengths[sequences]
        rows, columns = shape or (len(sequences), int(lengths.max()))
        self.sequences = sequences
        self.real = np.zeros((rows, columns), np.bool_)
        inside = np.arange(columns)[None, :] < lengths[:, None]
        self.real[: len(sequences)] = inside
        self.tokens = (batch.offsets[sequences][:, None] + np.arange(columns)[None, :])[inside]
        self.ids: Int32 = np.zeros(self.real.shape, np.int32)
        self.ids[self.real] = batch.input_ids[self.tokens]
        self.segments: Int32 = np.zeros(self.real.shape, np.int32)
        self.segments[self.real] = batch.token_type_ids[self.tokens]
        self.chosen = _NO_ROWS
        self.positions = _NO_ROWS
        if wanted.mlm_positions is not None:
            owner = np.searchsorted(batch.offsets, wanted.mlm_positions, side="right") - 1
            row = np.full(batch.num_sequences, -1, np.int64)
            row[sequences] = np.arange(len(sequences))
            self.chosen = np.flatnonzero(row[owner] >= 0)
            place = wanted.mlm_positions[self.chosen] - batch.offsets[owner[self.chosen]]
            self.positions = row[owner[self.chosen]] * columns + place

    @property
    def shape(self) -> Shape:
        """Sequences and tokens of each, padding included."""
        return self.real.shape[0], self.real.shape[1]

    def encoder_feeds(self) -> dict[str, Int32]:
        """What the encoder reads, each ``[batch, sequence] int32``."""
        return {
            "input_ids": self.ids,
            "attention_mask": self.real.astype(np.int32),
            "token_type_ids": self.segments,
        }

    def scatter(self, results: dict[str, Any], arrays: dict[str, Any]) -> None:
        """Put the block's results into the places of the whole batch."""
        for name, values in results.items():
            if name == "hidden_states":
                arrays[name][self.tokens] = values[self.real]
            elif name in {"pooled", "nsp_logits"}:
                arrays[name][self.sequences] = values[: len(self.sequences)]
            else:
                arrays[name][self.chosen] = values


def _share(limits: BlockLimits, batch: TokenBatch) -> BlockLimits:
    """Limits by which a batch gives every worker a block."""
    if limits.workers == 1:
        return limits
    share = max(limits.small, -(-batch.num_tokens // limits.workers))
    return replace(limits, tokens=min(share, limits.tokens or share))


def split_by_length(lengths: Int64, limits: BlockLimits) -> list[Int64]:
    """Group sequences so that little of each padded block is padding.

    Args:
        lengths: ``[sequences] int64``, tokens of each.
        limits: of the blocks. A sequence with more tokens than a block may have is a block of its own.

    Returns:
        For each block the indices of its sequences, longest first; every sequence is in one block.
    """
    order = np.argsort(-lengths, kind="stable")
    most = limits.sequences or len(order)
    blocks: list[Int64] = []
    start, real, longest = 0, 0, 0
    for index, length in enumerate(lengths[order].tolist()):
        longest = longest or length
        real += length
        padded = longest * (index - start + 1)
        wasteful = padded > limits.small and padded > _PADDING_LIMIT * real
        full = index - start == most or (limits.tokens is not None and padded > limits.tokens)
        if (wasteful or full) and index > start:
            blocks.append(order[start:index])
            start, real, longest = index, length, length
    blocks.append(order[start:])
    return blocks


def output_names(wanted: Wanted) -> list[str]:
    """The fields of `BatchOutput` that are wanted."""
    names = []
    if wanted.mlm_positions is not None:
        names += ["mlm_logits"] if wanted.mlm_logits else []
        names += ["mlm_top_ids", "mlm_top_log_probs"] if wanted.mlm_top_k else []
        names += ["mlm_candidate_log_probs"] if wanted.mlm_candidates is not None else []
    names += ["hidden_states"] if wanted.hidden_states else []
    names += ["pooled"] if wanted.pooled else []
    names += ["nsp_logits"] if wanted.nsp else []
    return names


def _allocate(batch: TokenBatch, wanted: Wanted, hidden: int, vocab: int) -> dict[str, Any]:
    rows = 0 if wanted.mlm_positions is None else len(wanted.mlm_positions)
    candidates = 0 if wanted.mlm_candidates is None else wanted.mlm_candidates.shape[1]
    shapes: dict[str, tuple[int, int]] = {
        "mlm_logits": (rows, vocab),
        "mlm_top_ids": (rows, wanted.mlm_top_k),
        "mlm_top_log_probs": (rows, wanted.mlm_top_k),
        "mlm_candidate_log_probs": (rows, candidates),
        "hidden_states": (batch.num_tokens, hidden),
        "pooled": (batch.num_sequences, hidden),
        "nsp_logits": (batch.num_sequences, 2),
    }
    types: dict[str, type[np.generic]] = {"mlm_top_ids": np.int64}
    return {name: np.empty(shapes[name], types.get(name, np.float32)) for name in output_names(wanted)}
