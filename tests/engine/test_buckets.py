"""Length buckets: the shape and the profile of a block, how much of it is padding, and blocks that have to be cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertrt.architecture import BertArchitecture
from bertrt.backends.base import TokenBatch, Wanted
from bertrt.backends.buckets import BucketRunner, Buckets, pad_rows, row_bucket
from bertrt.backends.padded import PaddedBackend
from bertrt.errors import SequenceTooLongError
from bertrt.manifest import Heads
from bertrt.plans import Profile

DEFAULT = ("1x1..1x64..1x512", "1x1..8x128..32x512")
# One for many short sequences, one for a few long ones: no profile holds both.
STAIRS = ("1x1..16x64..64x64", "1x1..2x256..3x300", "2x16..2x100..8x128")
HIDDEN, VOCAB = 6, 11


def make(*profiles: str) -> Buckets:
    return Buckets([Profile.parse(profile) for profile in profiles], rebuild="bertrt build here")


@pytest.mark.parametrize(
    ("sequences", "longest", "shape"),
    [
        (1, 1, (1, 1)),
        (1, 2, (1, 16)),
        (1, 16, (1, 16)),
        (1, 17, (1, 32)),
        (1, 113, (1, 128)),
        (1, 129, (1, 160)),
        (1, 257, (1, 320)),
        (1, 512, (1, 512)),
        (3, 100, (3, 112)),
        (5, 128, (6, 128)),
        (7, 20, (8, 32)),
        (17, 449, (24, 512)),
        (32, 512, (32, 512)),
    ],
)
def test_shapes(sequences: int, longest: int, shape: tuple[int, int]) -> None:
    assert make(*DEFAULT).shape(sequences, longest) == shape


def test_the_least_the_best_and_the_most_are_steps() -> None:
    buckets = make("2x20..5x100..9x130")
    assert buckets.shape(1, 5) == (2, 20)
    assert buckets.shape(5, 97) == (5, 100)
    assert buckets.shape(5, 101) == (5, 112)
    assert buckets.shape(7, 129) == (8, 130)
    assert buckets.shape(9, 130) == (9, 130)


@pytest.mark.parametrize(
    ("profiles", "shape", "expected"),
    [
        # Tuned for one sequence, tuned for eight.
        (DEFAULT, (1, 64), 0),
        (DEFAULT, (1, 512), 0),
        (DEFAULT, (2, 128), 1),
        # Both hold it and are as near: the smaller one.
        (("1x1..4x64..32x512", "1x1..4x64..8x128"), (4, 64), 1),
        # Nearer in doublings: 1x16 is 1 + 0 from 2x16, and 0 + 2 from 1x64.
        (("1x1..1x64..1x64", "1x1..2x16..2x64"), (1, 16), 1),
    ],
)
def test_the_profile_that_is_tuned_nearest(
    profiles: tuple[str, ...], shape: tuple[int, int], expected: int
) -> None:
    assert make(*profiles).profile(shape) == expected


def test_a_nearer_profile_is_not_worth_any_padding() -> None:
    # Tuned for 8 sequences, and has no fewer: 8x16 tokens where 1x16 do.
    assert make("8x16..8x16..8x64", "1x1..1x512..1x512").shape(1, 16) == (1, 16)
    # Here it costs 112 tokens where 100 would do, and is tuned for them.
    assert make("1x1..32x100..32x512", "1x1..1x112..1x512").shape(1, 97) == (1, 112)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 64), st.integers(1, 512), st.sampled_from([DEFAULT, STAIRS, ("1x1..32x512",)]))
def test_every_block_lies_in_a_profile_with_little_padding(
    sequences: int, longest: int, profiles: tuple[str, ...]
) -> None:
    buckets = make(*profiles)
    parsed = [Profile.parse(profile) for profile in profiles]
    room = [p for p in parsed if sequences <= p.most[0] and longest <= p.most[1]]
    if longest > buckets.longest:
        with pytest.raises(SequenceTooLongError):
            buckets.shape(sequences, longest)
        return
    shape = buckets.shape(sequences, longest)
    if not room:
        assert shape is None
        assert sequences > buckets.most_sequences(longest)
        return
    assert shape is not None
    batch, tokens = shape
    assert batch >= sequences
    assert tokens >= longest
    assert buckets.holds(shape)
    assert parsed[buckets.profile(shape)].holds(shape)
    fewest = min(max(p.least[0], sequences) * max(p.least[1], longest) for p in room)
    # What the module promises of each ladder, and the 1.25 by which a nearer profile's block may be larger; below 65
    # tokens, a multiple of 16.
    padded = 1.5 * max(1.25, (longest + 15) / longest) * 1.25
    assert batch * tokens <= padded * fewest
    if len(profiles) == 1:
        assert batch - sequences < batch / 3
        assert tokens - longest < max(16, tokens / 5)


def test_too_long_for_every_profile() -> None:
    with pytest.raises(SequenceTooLongError) as caught:
        make(*STAIRS).shape(1, 301)
    assert str(caught.value) == (
        "a sequence has 301 tokens, the plan's profiles hold at most 300; cut it, or build the plan for it with: "
        "bertrt build here --profile 1x1..16x64..64x64 --profile 1x1..2x256..3x300 --profile 2x16..2x100..8x128 "
        "--profile 1x1..1x301..1x301"
    )
    # The last profile is one that the command reads.
    assert Profile.parse("1x1..1x301..1x301").holds((1, 301))


def test_limits() -> None:
    limits = make(*STAIRS).limits(workers=3)
    assert (limits.sequences, limits.tokens, limits.workers) == (64, 64 * 64, 3)
    assert make(*DEFAULT).longest == 512


def test_rows() -> None:
    assert [row_bucket(rows, 100) for rows in (1, 2, 3, 5, 64, 65, 100)] == [1, 2, 4, 8, 64, 100, 100]
    values = np.arange(1, 7).reshape(3, 2)
    np.testing.assert_array_equal(pad_rows(values, 4), [[1, 2], [3, 4], [5, 6], [0, 0]])
    np.testing.assert_array_equal(pad_rows(values[:, 0], 3), [1, 3, 5])


class Executor:
    """Computes what follows from the tokens alone, so that a row in the wrong place shows, in a profile's shapes."""

    def __init__(self, buckets: Buckets) -> None:
        self.buckets = buckets
        self.limits = buckets.limits()
        self.mlm_rows = 4
        self.shapes: list[tuple[int, int]] = []

    def close(self) -> None:
        pass

    @contextmanager
    def encode(self, feeds: Mapping[str, Any]) -> Iterator[Any]:
        ids, mask, segments = (feeds[name] for name in ("input_ids", "attention_mask", "token_type_ids"))
        assert self.buckets.holds(ids.shape), ids.shape
        self.shapes.append(ids.shape)
        sums = (ids * mask).sum(axis=1, keepdims=True)
        place = np.arange(ids.shape[1])[None, :]
        columns = [ids, segments, place + 0 * ids, sums + 0 * ids, mask, ids * 0 + 7]
        states = np.stack(columns, axis=-1).astype(np.float32)
        rows = states.reshape(-1, HIDDEN)

        def mlm(positions: Any, candidates: Any, outputs: Sequence[str]) -> dict[str, Any]:
            assert len(positions) <= self.mlm_rows
            logits = rows[positions] @ np.arange(HIDDEN * VOCAB, dtype=np.float32).reshape(HIDDEN, VOCAB)
            return {"mlm_logits": logits}

        def pooler(first: Any, outputs: Sequence[str]) -> dict[str, Any]:
            found = {"pooled": rows[first], "nsp_logits": rows[first][:, :2]}
            return {name: found[name] for name in outputs}

        yield SimpleNamespace(hidden_states=lambda: states, mlm=mlm, pooler=pooler)


def run(lengths: list[int], profiles: tuple[str, ...]) -> tuple[TokenBatch, Any, Executor, Any]:
    generator = np.random.default_rng(sum(lengths))
    tokens = sum(lengths)
    batch = TokenBatch(
        input_ids=generator.integers(0, VOCAB, tokens).astype(np.int32),
        token_type_ids=generator.integers(0, 2, tokens).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
    architecture = BertArchitecture(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=HIDDEN,
        max_position_embeddings=512,
        type_vocab_size=2,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
    )
    buckets = make(*profiles)
    executor = Executor(buckets)
    backend = PaddedBackend(
        "fake",
        BucketRunner(executor, architecture, buckets),
        architecture=architecture,
        heads=Heads(mlm=True, nsp=True, pooler=True),
        threads=1,
    )
    positions = generator.permutation(tokens)[: min(tokens, 50)].astype(np.int64)
    wanted = Wanted(mlm_positions=positions, mlm_logits=True, hidden_states=True, pooled=True, nsp=True)
    return batch, wanted, executor, backend.run(batch, wanted)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=90))
def test_blocks_that_no_profile_holds_are_cut_and_put_together_again(lengths: list[int]) -> None:
    batch, wanted, _, found = run(lengths, STAIRS)
    expected = np.empty((batch.num_tokens, HIDDEN), np.float32)
    for start, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
        ids = batch.input_ids[start:end]
        columns = [ids, batch.token_type_ids[start:end], np.arange(end - start), 0 * ids + ids.sum()]
        expected[start:end] = np.stack([*columns, 0 * ids + 1, 0 * ids + 7], axis=-1)
    weights = np.arange(HIDDEN * VOCAB, dtype=np.float32).reshape(HIDDEN, VOCAB)
    # Whole numbers below 2^24, which float32 holds exactly.
    np.testing.assert_array_equal(found.hidden_states, expected)
    np.testing.assert_array_equal(found.pooled, expected[batch.offsets[:-1]])
    np.testing.assert_array_equal(found.nsp_logits, expected[batch.offsets[:-1], :2])
    np.testing.assert_array_equal(found.mlm_logits, expected[wanted.mlm_positions] @ weights)


def test_long_sequences_share_blocks_as_far_as_a_profile_goes() -> None:
    _, _, executor, _ = run([300] * 7, STAIRS)
    assert sorted(executor.shapes) == [(1, 300), (3, 300), (3, 300)]
    _, _, executor, _ = run([60] * 64, STAIRS)
    assert executor.shapes == [(64, 64)]
