"""The comparison: a perturbed engine is found out, an exact one is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from bertrt.backends.base import Backend, BatchOutput, Float32, TokenBatch, Wanted
from bertrt.errors import InputError
from bertrt.manifest import Heads
from bertrt.tokenization import WordPieceTokenizer
from bertrt_export.checkpoints import Checkpoint, open_checkpoint
from bertrt_export.drift import DEFAULT_BUDGETS
from bertrt_export.drift.budgets import check_budgets
from bertrt_export.drift.compare import Comparison, compare
from bertrt_export.drift.examples import Example, build_examples
from bertrt_export.drift.prompts import CARD_PROMPTS
from bertrt_export.drift.reference import TorchReference, open_reference
from bertrt_export.drift.text import read_corpus

# The vocabulary of `save_checkpoint` spells lower-case words letter by letter.
TEXT = "\n".join(
    f"he saw {a} {b} there. she went to {b}.\n" + "\n" * (index % 3 == 2)
    for index, (a, b) in enumerate(
        [
            ("cat", "dogs"),
            ("kings", "rain"),
            ("tea", "ships"),
            ("fog", "snow"),
            ("oaks", "bees"),
            ("sun", "moss"),
        ]
    )
)
POSITIONS = 50
ALL = Heads(mlm=True, nsp=True, pooler=True)


@pytest.fixture(scope="module")
def checkpoint(
    small_bert: Callable[..., transformers.BertForPreTraining], save_checkpoint: Callable[..., Path]
) -> Checkpoint:
    return open_checkpoint(save_checkpoint(small_bert()))


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> WordPieceTokenizer:
    return checkpoint.tokenizer


@pytest.fixture(scope="module")
def examples(tokenizer: WordPieceTokenizer) -> list[Example]:
    corpus = read_corpus(TEXT, tokenizer, name="text", max_length=POSITIONS)
    return list(build_examples(corpus, tokenizer, count=160, seed=0, max_length=POSITIONS))


@pytest.fixture
def reference(checkpoint: Checkpoint) -> TorchReference:
    with open_reference(checkpoint, ALL, threads=2) as reference:
        return reference


class Perturbed:
    """An engine that is the reference with something done to its answers."""

    name = "perturbed"
    threads = 1
    pads = True

    def __init__(self, reference: TorchReference, **changes: Callable[[Float32], Float32]) -> None:
        self._reference = reference
        self._changes = changes

    def run(self, batch: TokenBatch, wanted: Wanted) -> BatchOutput:
        positions = wanted.mlm_positions if wanted.mlm_positions is not None else np.zeros(0, np.int64)
        found = self._reference.run(batch, positions, layers=False)

        def change(name: str, asked: bool) -> Float32 | None:
            array = getattr(found, name)
            return self._changes.get(name, np.copy)(array.copy()) if asked else None

        return BatchOutput(
            mlm_logits=change("mlm_logits", wanted.mlm_logits),
            hidden_states=change("hidden_states", wanted.hidden_states),
            pooled=change("pooled", wanted.pooled),
            nsp_logits=change("nsp_logits", wanted.nsp),
        )

    def close(self) -> None: ...


class NoisyLayers:
    """A probe whose layers have the noise that each is given, in decibels below the signal."""

    def __init__(self, reference: TorchReference, decibels: list[float]) -> None:
        self._reference = reference
        self._decibels = decibels
        self._rng = np.random.default_rng(0)

    def run(self, batch: TokenBatch) -> list[Float32]:
        layers = self._reference.run(batch, np.zeros(0, np.int64), layers=True).layers
        assert len(layers) == len(self._decibels)
        noisy = []
        for layer, decibels in zip(layers, self._decibels, strict=True):
            noise = self._rng.standard_normal(layer.shape)
            noise *= np.sqrt((layer.astype(np.float64) ** 2).sum() / (noise**2).sum() / 10 ** (decibels / 10))
            noisy.append((layer + noise).astype(np.float32))
        return noisy


def measure(
    reference: TorchReference,
    tokenizer: WordPieceTokenizer,
    examples: list[Example],
    backend: Backend | None = None,
    *,
    layers: tuple[float, ...] = (math.inf,) * 4,
    heads: Heads = ALL,
) -> Comparison:
    return compare(
        backend or Perturbed(reference),
        reference,
        NoisyLayers(reference, list(layers)),
        tokenizer=tokenizer,
        heads=heads,
        examples=examples,
        max_length=POSITIONS,
    )


def test_an_exact_engine_has_no_drift(
    reference: TorchReference, tokenizer: WordPieceTokenizer, examples: list[Example]
) -> None:
    found = measure(reference, tokenizer, examples)
    zeros = ("non_finite", "logit_error_max", "logit_error_mean", "kl_mean", "kl_p99", "nsp_changed")
    zeros += ("nsp_probability_difference_max", "mlm_accuracy_change_points", "pseudo_perplexity_change")
    for name in (*zeros, "prompt_kl_max", "bias_shift"):
        assert found.figures[name] == 0, name
    ones = ("top1_agreement", "top5_overlap", "hidden_cosine_mean", "hidden_cosine_worst")
    for name in (*ones, "pooled_cosine_mean", "pooled_cosine_worst"):
        assert found.figures[name] == pytest.approx(1, abs=1e-12), name
    assert [layer.name for layer in found.layers] == ["embeddings", "layer 1", "layer 2", "layer 3"]
    assert {layer.snr_db for layer in found.layers} == {math.inf}
    for budgets in DEFAULT_BUDGETS.values():
        assert check_budgets(found.figures, budgets) == ()


def test_the_noise_of_each_layer_is_found(
    reference: TorchReference, tokenizer: WordPieceTokenizer, examples: list[Example]
) -> None:
    found = measure(reference, tokenizer, examples, layers=(70.0, 45.0, 38.0, 41.0))
    # Each batch has its share of noise; rounding to float32 adds some at 150 dB.
    assert [layer.snr_db for layer in found.layers] == pytest.approx([70, 45, 38, 41], abs=0.01)
    assert found.figures["layer_snr_lowest"] == pytest.approx(38, abs=0.01)
    assert 0 < found.layer_tokens < sum(example.input_ids.shape[0] for example in examples)
    assert [v.figure for v in check_budgets(found.figures, DEFAULT_BUDGETS["fp16"])] == ["layer_snr_lowest"]


def test_a_constant_error_of_the_logits_changes_only_the_logits(
    reference: TorchReference, tokenizer: WordPieceTokenizer, examples: list[Example]
) -> None:
    found = measure(
        reference, tokenizer, examples, Perturbed(reference, mlm_logits=lambda x: x + np.float32(0.25))
    )
    # Softmax does not see it.
    assert found.figures["logit_error_max"] == pytest.approx(0.25, abs=1e-5)
    assert found.figures["logit_error_mean"] == pytest.approx(0.25, abs=1e-5)
    assert found.figures["kl_mean"] < 1e-9
    assert found.figures["top1_agreement"] == 1
    assert [v.figure for v in check_budgets(found.figures, DEFAULT_BUDGETS["fp32"])] == ["logit_error_max"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mlm_logits": lambda x: -8 * x}, {"kl_mean", "top1_agreement", "top5_overlap", "prompt_kl_max"}),
        ({"nsp_logits": lambda x: x[:, ::-1]}, {"nsp_changed"}),
        ({"hidden_states": lambda x: np.roll(x, 1, axis=1)}, {"hidden_cosine_mean"}),
        ({"pooled": lambda x: np.roll(x, 1, axis=1)}, {"pooled_cosine_mean"}),
    ],
)
def test_each_fault_breaks_its_own_budgets(
    changes: dict[str, Callable[[Float32], Float32]],
    expected: set[str],
    reference: TorchReference,
    tokenizer: WordPieceTokenizer,
    examples: list[Example],
) -> None:
    found = measure(reference, tokenizer, examples, Perturbed(reference, **changes))
    broken = {violation.figure for violation in check_budgets(found.figures, DEFAULT_BUDGETS["int8"])}
    assert expected <= broken
    if "mlm_logits" not in changes:
        assert broken == expected


def test_swapped_decisions_are_all_changed(
    reference: TorchReference, tokenizer: WordPieceTokenizer, examples: list[Example]
) -> None:
    found = measure(
        reference, tokenizer, examples, Perturbed(reference, nsp_logits=lambda x: x[:, ::-1])
    ).figures
    assert found["nsp_changed"] == 1
    assert found["nsp_accuracy_engine"] == pytest.approx(1 - found["nsp_accuracy_reference"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["mlm_logits", "nsp_logits", "hidden_states", "pooled"])
def test_values_that_are_not_finite_fail_and_are_counted(
    name: str, bad: float, reference: TorchReference, tokenizer: WordPieceTokenizer, examples: list[Example]
) -> None:
    def spoil(array: Float32) -> Float32:
        array[0, 0] = bad
        return array

    found = measure(reference, tokenizer, examples, Perturbed(reference, **{name: spoil}))
    assert found.figures["non_finite"] >= 1
    violations = check_budgets(found.figures, DEFAULT_BUDGETS["fp32"])
    assert "non_finite" in [violation.figure for violation in violations]
    if name == "mlm_logits":
        assert all(prompt.engine == () and math.isnan(prompt.kl) for prompt in found.prompts)
        assert found.bias is None
        assert math.isnan(found.figures["prompt_kl_max"])
        assert "prompt_kl_max is not finite; the budget is at most" in " ".join(v.message for v in violations)


def test_an_engine_that_gives_nothing_but_nan_does_not_crash(
    reference: TorchReference, tokenizer: WordPieceTokenizer, examples: list[Example]
) -> None:
    names = ("mlm_logits", "nsp_logits", "hidden_states", "pooled")
    backend = Perturbed(reference, **{name: lambda x: np.full_like(x, np.nan) for name in names})
    found = measure(reference, tokenizer, examples, backend, layers=(math.nan,) * 4)
    assert set(found.figures) == {"non_finite", "layer_snr_lowest", "prompt_kl_max"}
    assert found.figures["layer_snr_lowest"] == -math.inf
    assert all(layer.non_finite for layer in found.layers)


def test_prompts_are_the_cards_and_the_shift_is_seen(
    reference: TorchReference, tokenizer: WordPieceTokenizer, examples: list[Example]
) -> None:
    found = measure(
        reference, tokenizer, examples, Perturbed(reference, mlm_logits=lambda x: x * np.float32(1.5))
    )
    assert tuple(prompt.prompt for prompt in found.prompts) == CARD_PROMPTS
    assert found.bias is not None
    distributions = {"reference": [], "engine": []}
    for prompt, drift in zip(CARD_PROMPTS, found.prompts, strict=True):
        ids = tokenizer.encode([prompt], max_length=POSITIONS)[0][0].input_ids
        batch = TokenBatch(ids, np.zeros_like(ids), np.array([0, len(ids)], np.int64))
        mask = np.flatnonzero(ids == tokenizer.mask_id)
        logits = torch.from_numpy(reference.run(batch, mask, layers=False).mlm_logits[0]).double()
        p, q = logits.softmax(-1), (logits * 1.5).softmax(-1)
        distributions["reference"].append(p)
        distributions["engine"].append(q)
        assert drift.kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
        best = torch.topk(p, 5)
        assert [prediction.token for prediction in drift.reference] == best.indices.tolist()
        assert [prediction.reference for prediction in drift.reference] == pytest.approx(best.values.tolist())
        assert [prediction.engine for prediction in drift.reference] == pytest.approx(
            q[best.indices].tolist(), rel=1e-5
        )
        assert [prediction.token_str for prediction in drift.reference] == [
            tokenizer.decode([token], skip_special_tokens=False) for token in best.indices.tolist()
        ]
    distances = {side: float((p[1] - p[2]).abs().sum() / 2) for side, p in distributions.items()}
    assert found.bias.reference == pytest.approx(distances["reference"], rel=1e-5)
    assert found.bias.engine == pytest.approx(distances["engine"], rel=1e-5)
    assert found.figures["bias_shift"] == pytest.approx(
        100 * (distances["engine"] - distances["reference"]), abs=1e-4
    )
    # Logits half as large again make every log-ratio half as large again, but for the normalisation they share.
    leans = found.bias.leans
    assert 5 <= len(leans) <= 10
    assert [lean.reference for lean in leans] == sorted(lean.reference for lean in leans)
    shifts = [lean.engine - 1.5 * lean.reference for lean in leans]
    assert max(shifts) - min(shifts) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("heads", "absent"),
    [
        (replace(ALL, mlm=False), {"kl_mean", "top1_agreement", "prompt_kl_max", "bias_shift"}),
        (replace(ALL, nsp=False), {"nsp_changed", "nsp_accuracy_engine"}),
        (Heads(mlm=True, nsp=False, pooler=False), {"nsp_changed", "pooled_cosine_mean"}),
    ],
)
def test_what_a_checkpoint_lacks_is_left_out(
    heads: Heads,
    absent: set[str],
    checkpoint: Checkpoint,
    tokenizer: WordPieceTokenizer,
    examples: list[Example],
) -> None:
    with open_reference(checkpoint, heads, threads=2) as reference:
        found = measure(reference, tokenizer, examples, heads=heads)
    assert not absent & set(found.figures)
    assert "hidden_cosine_mean" in found.figures
    assert bool(found.prompts) is heads.mlm


def test_text_without_a_known_word_is_refused(
    reference: TorchReference, tokenizer: WordPieceTokenizer
) -> None:
    corpus = read_corpus("ДА. НЕТ.\n" * 10, tokenizer, name="t", max_length=POSITIONS)
    examples = list(build_examples(corpus, tokenizer, count=10, seed=0, max_length=POSITIONS))
    with pytest.raises(InputError, match="no token that can be masked"):
        measure(reference, tokenizer, examples)


def test_progress_counts_every_example(
    reference: TorchReference, tokenizer: WordPieceTokenizer, examples: list[Example]
) -> None:
    done: list[int] = []
    compare(
        Perturbed(reference),
        reference,
        None,
        tokenizer=tokenizer,
        heads=ALL,
        examples=examples,
        max_length=POSITIONS,
        progress=done.append,
    )
    assert sum(done) == len(examples)
    assert len(done) > 1
