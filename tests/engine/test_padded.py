"""Blocks of padded sequences: how batches are cut, padded, spread over workers and put together again."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from bertrt.architecture import BertArchitecture
from bertrt.backends.base import TokenBatch, Wanted
from bertrt.backends.padded import BlockLimits, PaddedBackend, PaddedBlock, split_by_length
from bertrt.errors import BackendRunError, EngineClosedError
from bertrt.manifest import Heads

HEADS = Heads(mlm=True, nsp=True, pooler=True)


def numbered_batch(lengths: Sequence[int]) -> TokenBatch:
    """Token number i has the id i."""
    tokens = sum(lengths)
    return TokenBatch(
        input_ids=np.arange(tokens, dtype=np.int32),
        token_type_ids=np.arange(tokens, dtype=np.int32) % 2,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


class Echo:
    """A runner whose answers are the ids that it was given, so that a misplaced row shows."""

    def __init__(self, limits: BlockLimits, extra: tuple[int, int] = (0, 0)) -> None:
        self.limits = limits
        self.extra = extra
        self.shapes: list[tuple[int, int]] = []
        self.threads: set[int] = set()
        self.meet: threading.Barrier | None = None
        self.closed = False

    def shape(self, sequences: int, longest: int) -> tuple[int, int]:
        return sequences + self.extra[0], longest + self.extra[1]

    def run(self, block: PaddedBlock, _wanted: Wanted, names: Sequence[str]) -> dict[str, Any]:
        if self.meet is not None:
            self.meet.wait(timeout=30)
        self.shapes.append(block.shape)
        self.threads.add(threading.get_ident())
        ids = block.encoder_feeds()["input_ids"].astype(np.float32)
        rows = ids.reshape(-1, 1)
        answers = {
            "hidden_states": ids[..., None],
            "pooled": ids[:, :1],
            "mlm_logits": rows[block.positions] + np.arange(1000, dtype=np.float32),
        }
        return {name: answers[name] for name in names}

    def close(self) -> None:
        self.closed = True


def make_backend(runner: Echo) -> PaddedBackend:
    sizes = BertArchitecture(
        hidden_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=1,
        vocab_size=1000,
        max_position_embeddings=512,
        type_vocab_size=2,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
    )
    return PaddedBackend("echo", runner, architecture=sizes, heads=HEADS, threads=1)


@pytest.mark.parametrize("extra", [(0, 0), (3, 5)])
@pytest.mark.parametrize(
    "limits", [BlockLimits(small=1), BlockLimits(small=64, sequences=3), BlockLimits(small=16, tokens=40)]
)
def test_every_row_comes_back_to_its_place(limits: BlockLimits, extra: tuple[int, int]) -> None:
    lengths = [5, 1, 40, 7, 7, 30, 2, 1, 1, 19, 33]
    batch = numbered_batch(lengths)
    positions = np.array([0, batch.num_tokens - 1, 6, 6, 50, 3], np.int64)
    runner = Echo(limits, extra)
    output = make_backend(runner).run(
        batch, Wanted(hidden_states=True, pooled=True, mlm_positions=positions, mlm_logits=True)
    )
    assert output.hidden_states is not None
    assert output.pooled is not None
    assert output.mlm_logits is not None
    np.testing.assert_array_equal(output.hidden_states[:, 0], np.arange(batch.num_tokens))
    np.testing.assert_array_equal(output.pooled[:, 0], batch.offsets[:-1])
    np.testing.assert_array_equal(output.mlm_logits[:, 0], positions)
    assert len(runner.shapes) > 1


def test_limits_hold() -> None:
    lengths = np.random.default_rng(0).integers(1, 129, 300).astype(np.int64)
    limits = BlockLimits(small=64, sequences=16, tokens=1024)
    blocks = split_by_length(lengths, limits)
    assert sorted(np.concatenate(blocks).tolist()) == list(range(300))
    for block in blocks:
        assert len(block) <= 16
        assert lengths[block].max() * len(block) <= 1024
    # One that is longer than a block may be is a block of its own.
    assert [len(block) for block in split_by_length(np.array([2000, 3]), limits)] == [1, 1]


def test_workers_run_at_once() -> None:
    runner = Echo(BlockLimits(small=8, workers=2))
    # Neither goes on before the other has come.
    runner.meet = threading.Barrier(2)
    batch = numbered_batch([20] * 8)
    output = make_backend(runner).run(batch, Wanted(hidden_states=True))
    assert output.hidden_states is not None
    np.testing.assert_array_equal(output.hidden_states[:, 0], np.arange(160))
    assert runner.shapes == [(4, 20), (4, 20)]
    assert len(runner.threads) == 2


def test_an_error_of_a_worker_is_the_call_s() -> None:
    class Broken(Echo):
        def run(self, block: PaddedBlock, _wanted: Wanted, names: Sequence[str]) -> dict[str, Any]:
            if 0 in block.sequences:
                raise BackendRunError("no")
            return super().run(block, _wanted, names)

    backend = make_backend(Broken(BlockLimits(small=8, workers=2)))
    with pytest.raises(BackendRunError, match="^no$"):
        backend.run(numbered_batch([20] * 8), Wanted(hidden_states=True))


def test_closing() -> None:
    runner = Echo(BlockLimits(small=8))
    backend = make_backend(runner)
    backend.close()
    backend.close()
    assert runner.closed
    with pytest.raises(EngineClosedError, match="the engine is closed; load it again"):
        backend.run(numbered_batch([3]), Wanted(hidden_states=True))
