"""Our own BERT in PyTorch says what transformers' says, and is a reference for the drift check."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bertrt.backends.base import TokenBatch
from bertrt.batching import offsets_of
from bertrt.errors import ReferenceUnavailableError
from bertrt.manifest import Heads
from bertrt_bench.gpu.model import load_model
from bertrt_bench.gpu.reference import PlainReference, open_any_reference
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.drift.reference import TorchReference, open_reference

# In float64 two ways to add the same up to 40 numbers are 1e-16 apart, relative to values of 10 at most; a dozen such
# steps in a row stay far below this, and a wrong formula or epsilon is far above it.
EXACT = 1e-12


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 97, (4, 23), generator=generator)
    segments = torch.randint(0, 2, (4, 23), generator=generator)
    present = torch.arange(23)[None] < torch.tensor([23, 1, 7, 16])[:, None]
    return ids, segments, present


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"hidden_act": "gelu_new"}, {"hidden_act": "relu"}, {"tie_word_embeddings": False}],
    ids=str,
)
def test_every_output_is_that_of_transformers(
    small_bert: Callable[..., Any],
    save_checkpoint: Callable[..., Path],
    attention: str,
    changes: dict[str, Any],
) -> None:
    theirs = small_bert(**changes)
    folder = save_checkpoint(theirs)
    theirs = (
        transformers.BertForPreTraining.from_pretrained(folder, attn_implementation="eager").eval().double()
    )
    with open_checkpoint(folder) as checkpoint:
        ours = load_model(checkpoint, attention=attention, dtype=torch.float64, device="cpu")
    ids, segments, present = inputs()
    with torch.inference_mode():
        expected = theirs.bert(ids, present.long(), segments, output_hidden_states=True)
        states = ours.layers(ids, segments, present)
        assert len(states) == len(expected.hidden_states) == 4
        for state, other in zip(states, expected.hidden_states, strict=True):
            torch.testing.assert_close(state[present], other[present], rtol=0, atol=EXACT)
        rows, first = states[-1][present], states[-1][:, 0]
        logits = theirs.cls.predictions(expected.last_hidden_state[present])
        torch.testing.assert_close(ours.masked_lm(rows), logits, rtol=0, atol=EXACT)
        torch.testing.assert_close(ours.pool(first), expected.pooler_output, rtol=0, atol=EXACT)
        decisions = theirs.cls.seq_relationship(expected.pooler_output)
        torch.testing.assert_close(ours.next_sentence(first), decisions, rtol=0, atol=EXACT)
        # Without padding no mask is needed.
        whole = theirs.bert(ids, None, segments).last_hidden_state
        torch.testing.assert_close(ours(ids, segments), whole, rtol=0, atol=EXACT)


def test_an_encoder_without_heads(
    save_checkpoint: Callable[..., Path], small_bert: Callable[..., Any]
) -> None:
    theirs = small_bert().bert
    theirs.pooler = None
    folder = save_checkpoint(theirs)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.heads == Heads(mlm=False, nsp=False, pooler=False)
        ours = load_model(checkpoint, attention="sdpa", dtype=torch.float64, device="cpu")
    ids, segments, present = inputs()
    with torch.inference_mode():
        expected = theirs.double()(ids, present.long(), segments).last_hidden_state
        torch.testing.assert_close(
            ours(ids, segments, present)[present], expected[present], rtol=0, atol=EXACT
        )


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 11), (torch.bfloat16, 8)])
def test_a_lower_precision_is_one(small_checkpoint: Path, dtype: torch.dtype, bits: int) -> None:
    with open_checkpoint(small_checkpoint) as checkpoint:
        exact, rounded = (
            load_model(checkpoint, attention="sdpa", dtype=kind, device="cpu")
            for kind in (torch.float64, dtype)
        )
    ids, segments, present = inputs()
    with torch.inference_mode():
        found = rounded(ids, segments, present)
        expected = exact(ids, segments, present)[present]
    assert found.dtype == dtype
    noise = (found[present].double() - expected).square().mean().sqrt() / expected.std()
    # At least the rounding of the result itself (2**-bits / sqrt(12), of values half a step below it), at most some
    # hundred such roundings with random signs.
    assert 2.0**-bits / 8 < noise < 16 * 2.0**-bits


def batch() -> tuple[TokenBatch, np.ndarray[Any, Any]]:
    random = np.random.default_rng(3)
    lengths = [9, 4, 31]
    tokens = TokenBatch(
        input_ids=random.integers(0, 97, sum(lengths)).astype(np.int32),
        token_type_ids=random.integers(0, 2, sum(lengths)).astype(np.int32),
        offsets=offsets_of(lengths),
    )
    return tokens, np.array([0, 12, 11, 43], np.int64)


def test_the_reference_is_that_of_transformers(small_checkpoint: Path) -> None:
    tokens, positions = batch()
    with open_checkpoint(small_checkpoint) as checkpoint:
        with open_reference(checkpoint, checkpoint.heads, threads=1) as theirs:
            expected = theirs.run(tokens, positions, layers=True)
        model = load_model(checkpoint, attention="eager", dtype=torch.float32, device="cpu")
        found = PlainReference(model, checkpoint.heads, "cpu").run(tokens, positions, layers=True)
    # The same operations in float32; a rounding is 6e-8 of values below 20, and some tens follow one another.
    close = {"rtol": 0, "atol": 5e-5}
    for name in ("hidden_states", "mlm_logits", "pooled", "nsp_logits"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), **close)
    assert len(found.layers) == len(expected.layers) == 4
    for state, other in zip(found.layers, expected.layers, strict=True):
        np.testing.assert_allclose(state, other, **close)
    assert PlainReference(model, checkpoint.heads, "cpu").run(tokens, positions, layers=False).layers == ()


def test_a_reference_that_is_not_finite(small_checkpoint: Path) -> None:
    with open_checkpoint(small_checkpoint) as checkpoint:
        model = load_model(checkpoint, attention="eager", dtype=torch.float32, device="cpu")
        model.encoder["layer"][0]["output"]["dense"].bias[3] = torch.inf
        with pytest.raises(ReferenceUnavailableError, match="PyTorch itself gives NaN or infinity"):
            PlainReference(model, checkpoint.heads, "cpu").run(*batch(), layers=False)


def test_which_reference(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    absent: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    with open_checkpoint(small_checkpoint) as checkpoint:
        with open_any_reference(checkpoint, threads=1, device="cpu") as opened:
            assert isinstance(opened.reference, TorchReference)
            assert opened.description == "transformers in float32 on the CPU"
        absent.add("transformers")
        with open_any_reference(checkpoint, threads=1, device="cpu") as opened:
            assert isinstance(opened.reference, PlainReference)
            assert "without transformers" in opened.description
        absent.add("torch")
        with (
            pytest.raises(ReferenceUnavailableError, match="needs PyTorch; pip install"),
            open_any_reference(checkpoint, threads=1, device="cpu"),
        ):
            pass
