"""Engines in parts: questions that are larger than a graph's fixed answers, and rows in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from bertrt.architecture import BertArchitecture
from bertrt.backends.base import BatchOutput, TokenBatch, Wanted
from bertrt.backends.padded import BlockLimits, PaddedBackend
from bertrt.backends.parts import CANDIDATES, TOP_K, PartsRunner, part_inputs, part_outputs, parts_of
from bertrt.manifest import Heads

VOCABULARY = 150
HEADS = Heads(mlm=True, nsp=True, pooler=True)
SIZES = BertArchitecture(
    hidden_size=4,
    num_hidden_layers=1,
    num_attention_heads=1,
    intermediate_size=1,
    vocab_size=VOCABULARY,
    max_position_embeddings=64,
    type_vocab_size=2,
    hidden_act="gelu",
    layer_norm_eps=1e-12,
)


class Runner(PartsRunner):
    """Pads by one token, so that padding shows."""

    def shape(self, sequences: int, longest: int) -> tuple[int, int]:
        return super().shape(sequences, longest + 1)


TABLE = np.random.default_rng(3).normal(size=(VOCABULARY, 4)).astype(np.float32)


class Executor:
    """The parts in PyTorch: the hidden state is the table's row, its logits the products with the table."""

    limits = BlockLimits(small=8)

    def __init__(self, mlm_rows: int) -> None:
        self.mlm_rows = mlm_rows
        self.asked: list[tuple[str, ...]] = []
        self.rows: list[int] = []
        self.backwards = False

    @contextmanager
    def encode(self, feeds: Mapping[str, Any]) -> Iterator[Any]:
        self.states = TABLE[feeds["input_ids"]]
        yield self

    def hidden_states(self) -> Any:
        return self.states

    def mlm(self, positions: Any, candidates: Any, outputs: Sequence[str]) -> dict[str, Any]:
        self.asked.append(tuple(outputs))
        self.rows.append(len(positions))
        assert 1 <= len(positions) <= self.mlm_rows
        assert candidates.shape == (len(positions), CANDIDATES)
        logits = torch.from_numpy(self.states.reshape(-1, 4)[positions] @ TABLE.T)
        log_probs = logits.log_softmax(-1)
        best = log_probs.topk(TOP_K)
        order = slice(None, None, -1) if self.backwards else slice(None)
        found = {
            "mlm_logits": logits.numpy(),
            "mlm_top_ids": best.indices.numpy()[:, order],
            "mlm_top_log_probs": best.values.numpy()[:, order],
            "mlm_candidate_log_probs": log_probs.gather(1, torch.from_numpy(candidates)).numpy(),
        }
        return {name: found[name] for name in outputs}

    def pooler(self, rows: Any, outputs: Sequence[str]) -> dict[str, Any]:
        first = self.states.reshape(-1, 4)[rows]
        found = {"pooled": np.tanh(first), "nsp_logits": first[:, :2]}
        return {name: found[name] for name in outputs}

    def close(self) -> None:
        """Nothing is held."""


@pytest.fixture
def batch() -> TokenBatch:
    lengths = [3, 7, 1]
    return TokenBatch(
        input_ids=np.random.default_rng(0).integers(0, VOCABULARY, sum(lengths)).astype(np.int32),
        token_type_ids=np.zeros(sum(lengths), np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def run(executor: Executor, batch: TokenBatch, **wanted: Any) -> BatchOutput:
    backend = PaddedBackend("parts", Runner(executor, SIZES), architecture=SIZES, heads=HEADS, threads=1)
    return backend.run(batch, Wanted(**wanted))


def expected_log_probs(batch: TokenBatch, positions: Any) -> torch.Tensor:
    return torch.from_numpy(TABLE[batch.input_ids[positions]] @ TABLE.T).log_softmax(-1)


@pytest.mark.parametrize("mlm_rows", [2, 64])
@pytest.mark.parametrize("top_k", [1, TOP_K, TOP_K + 1, VOCABULARY])
@pytest.mark.parametrize("backwards", [False, True])
def test_top_k_of_any_size(mlm_rows: int, top_k: int, backwards: bool, batch: TokenBatch) -> None:
    executor = Executor(mlm_rows)
    executor.backwards = backwards
    positions = np.array([10, 0, 4, 4, 9], np.int64)
    output = run(executor, batch, mlm_positions=positions, mlm_top_k=top_k)
    log_probs = expected_log_probs(batch, positions)
    values, ids = log_probs.sort(dim=-1, descending=True, stable=True)
    assert output.mlm_top_ids is not None
    np.testing.assert_array_equal(output.mlm_top_ids, ids[:, :top_k])
    np.testing.assert_allclose(output.mlm_top_log_probs, values[:, :top_k], rtol=0, atol=1e-5)
    assert max(executor.rows) <= mlm_rows
    # The logits of all the vocabulary are copied only where the graph's answer is too short.
    assert all(("mlm_logits" in asked) == (top_k > TOP_K) for asked in executor.asked)


@pytest.mark.parametrize("width", [0, 1, CANDIDATES, CANDIDATES + 1, VOCABULARY])
def test_any_number_of_candidates(width: int, batch: TokenBatch) -> None:
    positions = np.array([2, 8], np.int64)
    candidates = np.random.default_rng(1).integers(0, VOCABULARY, (2, width)).astype(np.int64)
    output = run(Executor(64), batch, mlm_positions=positions, mlm_candidates=candidates, mlm_top_k=3)
    expected = expected_log_probs(batch, positions).gather(1, torch.from_numpy(candidates))
    np.testing.assert_allclose(output.mlm_candidate_log_probs, expected, rtol=0, atol=1e-5)
    assert output.mlm_top_ids is not None
    assert output.mlm_top_ids.shape == (2, 3)


def test_only_what_is_wanted_is_run(batch: TokenBatch) -> None:
    executor = Executor(64)
    output = run(executor, batch, hidden_states=True, nsp=True)
    assert executor.asked == []
    assert output.pooled is None
    np.testing.assert_array_equal(output.hidden_states, TABLE[batch.input_ids])
    np.testing.assert_array_equal(output.nsp_logits, TABLE[batch.input_ids[batch.offsets[:-1]]][:, :2])
    run(executor, batch, mlm_positions=np.zeros(0, np.int64), mlm_top_k=2)
    assert executor.asked == []


def test_equal_logits_come_by_rising_token_id(batch: TokenBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = Executor(64)
    executor.backwards = True
    ones = TokenBatch(batch.input_ids * 0, batch.token_type_ids, batch.offsets)
    table = np.ones_like(TABLE)
    monkeypatch.setitem(globals(), "TABLE", table)
    output = run(executor, ones, mlm_positions=np.array([0], np.int64), mlm_top_k=TOP_K + 5)
    assert output.mlm_top_ids is not None
    np.testing.assert_array_equal(output.mlm_top_ids[0], np.arange(TOP_K + 5))


def test_the_interface_follows_the_heads() -> None:
    nothing = Heads(mlm=False, nsp=False, pooler=False)
    assert parts_of(HEADS) == ("encoder", "mlm", "pooler")
    assert parts_of(nothing) == ("encoder",)
    assert part_outputs("pooler", SIZES, Heads(mlm=False, nsp=False, pooler=True)) == {"pooled": 4}
    assert part_outputs("mlm", SIZES, HEADS)["mlm_top_ids"] == TOP_K
    small = BertArchitecture(**{**SIZES.to_json(), "vocab_size": 10})
    assert part_outputs("mlm", small, HEADS)["mlm_top_ids"] == 10
    assert all("hidden_states" in part_inputs(part) for part in ("mlm", "pooler"))
