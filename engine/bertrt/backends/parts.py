"""Engines in parts: the encoder and each head are graphs of their own, chained through the last hidden state.

A GPU computes every output of a graph that it runs. In parts, a head that is not asked for is not run, the shapes of
the heads do not multiply those of the encoder, and the hidden state stays on the device between them.

========  ==========================================================  ==============================================
part      inputs                                                      outputs
========  ==========================================================  ==============================================
encoder   input_ids, attention_mask, token_type_ids                   hidden_states [batch, sequence, hidden] float32
          [batch, sequence] int32
mlm       hidden_states [tokens, hidden] float32,                     mlm_logits [positions, vocab] float32,
          mlm_positions [positions] int64,                            mlm_top_ids [positions, TOP_K] int64,
          mlm_candidates [positions, CANDIDATES] int64                mlm_top_log_probs [positions, TOP_K] float32,
                                                                      mlm_candidate_log_probs
                                                                      [positions, CANDIDATES] float32
pooler    hidden_states [tokens, hidden] float32,                     pooled [pooled, hidden] float32,
          pooled_rows [pooled] int64: rows of the first tokens        nsp_logits [pooled, 2] float32
========  ==========================================================  ==============================================

``tokens`` is ``batch * sequence`` or more: rows beyond are not read. TOP_K is `TOP_K` or the size of the vocabulary if
that is less. `PartsRunner` asks the graphs for no more than that, and takes larger questions from the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from bertrt.architecture import BertArchitecture
from bertrt.backends.base import Float32, Int32, Int64, Wanted
from bertrt.backends.padded import BlockLimits, PaddedBlock
from bertrt.manifest import Heads
from bertrt.plans import Shape

ENCODER: Final = "encoder"
MLM: Final = "mlm"
POOLER: Final = "pooler"
# Best tokens of a row that a graph finds, and tokens of a row whose log-probabilities it gives.
TOP_K: Final = 64
CANDIDATES: Final = 16

Array = npt.NDArray[Any]


class Encoded(Protocol):
    """A block whose hidden state has been computed, for as long as its context is open."""

    def hidden_states(self) -> Float32:
        """``[batch, sequence, hidden] float32``."""
        ...

    def mlm(self, positions: Int64, candidates: Int64, outputs: Sequence[str]) -> dict[str, Array]:
        """Run the masked-LM head; the named outputs of the part, a row for each of ``positions``.

        Args:
            positions: ``[n] int64``, n at least 1 and at most `PartsExecutor.mlm_rows`.
            candidates: ``[n, CANDIDATES] int64``.
            outputs: which of the part's outputs are copied back.
        """
        ...

    def pooler(self, rows: Int64, outputs: Sequence[str]) -> dict[str, Array]:
        """Run the pooler; the named outputs, a row for each of ``rows`` (``[n] int64``)."""
        ...


class PartsExecutor(Protocol):
    """Whatever runs the parts: an ONNX Runtime session or a TensorRT context for each."""

    @property
    def limits(self) -> BlockLimits:
        """How large its blocks are."""
        ...

    @property
    def mlm_rows(self) -> int:
        """The most positions of one run of the masked-LM head."""
        ...

    def encode(self, feeds: Mapping[str, Int32]) -> AbstractContextManager[Encoded]:
        """Run the encoder on ``[batch, sequence] int32`` arrays; its result can be used inside the context."""
        ...

    def close(self) -> None:
        """Release all; contexts that are open still have what they need."""
        ...


def parts_of(heads: Heads) -> tuple[str, ...]:
    """The parts of an engine with these heads."""
    return (ENCODER, *([MLM] if heads.mlm else []), *([POOLER] if heads.pooler else []))


def part_inputs(part: str) -> tuple[str, ...]:
    """The inputs of a part, in the order of its graph."""
    return {
        ENCODER: ("input_ids", "attention_mask", "token_type_ids"),
        MLM: ("hidden_states", "mlm_positions", "mlm_candidates"),
        POOLER: ("hidden_states", "pooled_rows"),
    }[part]


def part_outputs(part: str, architecture: BertArchitecture, heads: Heads) -> dict[str, int]:
    """The outputs of a part with their widths, in the order of its graph."""
    if part == ENCODER:
        return {"hidden_states": architecture.hidden_size}
    if part == POOLER:
        return {"pooled": architecture.hidden_size} | ({"nsp_logits": 2} if heads.nsp else {})
    best = min(TOP_K, architecture.vocab_size)
    return {
        "mlm_logits": architecture.vocab_size,
        "mlm_top_ids": best,
        "mlm_top_log_probs": best,
        "mlm_candidate_log_probs": CANDIDATES,
    }


class PartsRunner:
    """Runs padded blocks on a `PartsExecutor`: a `bertrt.backends.padded.BlockRunner`."""

    def __init__(self, executor: PartsExecutor, architecture: BertArchitecture) -> None:
        self._executor = executor
        self._best = min(TOP_K, architecture.vocab_size)

    @property
    def limits(self) -> BlockLimits:
        """See `bertrt.backends.padded.BlockRunner.limits`."""
        return self._executor.limits

    def shape(self, sequences: int, longest: int) -> Shape:
        """No padding beyond the longest sequence."""
        return sequences, longest

    def run(self, block: PaddedBlock, wanted: Wanted, names: Sequence[str]) -> dict[str, Any]:
        """See `bertrt.backends.padded.BlockRunner.run`."""
        results: dict[str, Any] = {}
        with self._executor.encode(block.encoder_feeds()) as encoded:
            if wanted.hidden_states:
                results["hidden_states"] = encoded.hidden_states()
            if pooled := [name for name in names if name in {"pooled", "nsp_logits"}]:
                first = np.arange(len(block.sequences), dtype=np.int64) * block.shape[1]
                results |= encoded.pooler(first, pooled)
            if scored := [name for name in names if name.startswith("mlm_")]:
                results |= self._masked_lm(encoded, block, wanted, scored)
        return results

    def close(self) -> None:
        """See `bertrt.backends.padded.BlockRunner.close`."""
        self._executor.close()

    def _masked_lm(
        self, encoded: Encoded, block: PaddedBlock, wanted: Wanted, names: Sequence[str]
    ) -> dict[str, Any]:
        candidates = wanted.mlm_candidates
        chosen = None if candidates is None else candidates[block.chosen]
        chunks = [
            self._rows(
                encoded,
                block.positions[begin : begin + self._executor.mlm_rows],
                None if chosen is None else chosen[begin : begin + self._executor.mlm_rows],
                wanted.mlm_top_k,
                names,
            )
            for begin in range(0, len(block.positions), self._executor.mlm_rows)
        ]
        return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in names} if chunks else {}

    def _rows(
        self, encoded: Encoded, positions: Int64, candidates: Int64 | None, top_k: int, names: Sequence[str]
    ) -> dict[str, Array]:
        width = 0 if candidates is None else candidates.shape[1]
        from_logits = {name for name in names if name.startswith("mlm_top") and top_k > self._best}
        from_logits |= {name for name in names if name == "mlm_candidate_log_probs" and width > CANDIDATES}
        asked = [name for name in names if name not in from_logits]
        fed = np.zeros((len(positions), CANDIDATES), np.int64)
        if candidates is not None and width <= CANDIDATES:
            fed[:, :width] = candidates
        copied = asked if not from_logits or "mlm_logits" in asked else [*asked, "mlm_logits"]
        found = encoded.mlm(positions, fed, copied)
        results = {name: found[name] for name in asked}
        if {"mlm_top_ids", "mlm_top_log_probs"} & set(asked):
            results |= _best_first(found, top_k)
        if "mlm_candidate_log_probs" in asked:
            results["mlm_candidate_log_probs"] = found["mlm_candidate_log_probs"][:, :width]
        if from_logits:
            logits = found["mlm_logits"]
            totals = _log_sum_exp(logits)
            if top_k > self._best:
                # Stable: equal logits by rising token id.
                best = np.argsort(-logits, axis=1, kind="stable")[:, :top_k].astype(np.int64)
                results["mlm_top_ids"] = best
                results["mlm_top_log_probs"] = np.take_along_axis(logits, best, axis=1) - totals
            if candidates is not None and width > CANDIDATES:
                results["mlm_candidate_log_probs"] = np.take_along_axis(logits, candidates, axis=1) - totals
        return {name: results[name] for name in names}


def _best_first(found: Mapping[str, Array], top_k: int) -> dict[str, Array]:
    """The first ``top_k`` of what a graph found; it leaves open which of two equals comes first."""
    ids, values = found["mlm_top_ids"], found["mlm_top_log_probs"]
    order = np.lexsort((ids, -values), axis=1)[:, :top_k]
    return {
        "mlm_top_ids": np.take_along_axis(ids, order, axis=1),
        "mlm_top_log_probs": np.take_along_axis(values, order, axis=1),
    }


def _log_sum_exp(logits: Float32) -> Float32:
    """``[rows, 1] float32``: the logarithm of the softmax's denominator."""
    largest = logits.max(axis=1, keepdims=True)
    total: Float32 = largest + np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))
    return total
