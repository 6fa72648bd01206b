"""The drift metrics, against formulas written out one number at a time, and against PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bertrt_export.drift.metrics import (
    CosineDrift,
    LayerNoise,
    MaskedLmDrift,
    NextSentenceDrift,
    cosine_similarity,
    kl_divergence,
    log_softmax,
    total_variation,
)

# Both sides compute in float64 from the same float32 numbers; sums of some thousand terms lose a few digits.
CLOSE = 1e-11


def logits(rows: int, vocab: int, seed: int, scale: float = 4.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * scale).astype(np.float32)


def slow_log_softmax(row: list[float]) -> list[float]:
    largest = max(row)
    total = math.fsum(math.exp(value - largest) for value in row)
    return [value - largest - math.log(total) for value in row]


# 64 rows are widened at a time.
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 150])
def test_masked_lm_figures_are_the_written_out_formulas(rows: int) -> None:
    reference = logits(rows, 41, seed=1)
    engine = reference + logits(rows, 41, seed=2, scale=0.8)
    labels = np.random.default_rng(3).integers(41, size=rows)
    drift = MaskedLmDrift()
    drift.add(reference[:20], engine[:20], labels[:20])
    drift.add(reference[20:], engine[20:], labels[20:])

    errors, divergences, losses = [], [], ([], [])
    agree, overlap, right = 0, 0.0, [0, 0]
    for row in range(rows):
        both = [[float(value) for value in side[row]] for side in (reference, engine)]
        errors += [abs(b - a) for a, b in zip(*both, strict=True)]
        log_p, log_q = map(slow_log_softmax, both)
        divergences.append(math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)))
        order = [sorted(range(41), key=side.__getitem__, reverse=True) for side in both]
        agree += order[0][0] == order[1][0]
        overlap += len(set(order[0][:5]) & set(order[1][:5])) / 5
        for side, log_probs in enumerate((log_p, log_q)):
            right[side] += order[side][0] == labels[row]
            losses[side].append(-log_probs[labels[row]])
    loss = [math.fsum(values) / rows for values in losses]
    expected = {
        "logit_error_max": max(errors),
        "logit_error_mean": math.fsum(errors) / len(errors),
        "kl_mean": math.fsum(divergences) / rows,
        "kl_p99": float(np.percentile(divergences, 99)),
        "top1_agreement": agree / rows,
        "top5_overlap": overlap / rows,
        "mlm_accuracy_reference": right[0] / rows,
        "mlm_accuracy_engine": right[1] / rows,
        "mlm_accuracy_change_points": 100 * (right[1] - right[0]) / rows,
        "pseudo_perplexity_reference": math.exp(loss[0]),
        "pseudo_perplexity_engine": math.exp(loss[1]),
        "pseudo_perplexity_change": math.exp(loss[1]) / math.exp(loss[0]) - 1,
    }
    assert drift.positions == rows
    assert drift.figures() == pytest.approx(expected, rel=1e-9, abs=CLOSE)
    if rows == 150:
        # The case is worth something only if the two differ.
        assert 0 < agree < rows


def test_kl_divergence_is_torchs() -> None:
    reference, engine = logits(7, 30, seed=4), logits(7, 30, seed=5)
    log_p, log_q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (reference, engine))
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).numpy()
    found = kl_divergence(log_softmax(reference), log_softmax(engine))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_cosine_is_torchs() -> None:
    first, second = logits(9, 24, seed=6), logits(9, 24, seed=7)
    expected = torch.cosine_similarity(torch.from_numpy(first).double(), torch.from_numpy(second).double())
    np.testing.assert_allclose(cosine_similarity(first, second), expected.numpy(), atol=CLOSE)
    drift = CosineDrift("hidden")
    drift.add(first[:4], second[:4])
    drift.add(first[4:], second[4:])
    assert drift.figures() == pytest.approx(
        {"hidden_cosine_mean": float(expected.mean()), "hidden_cosine_worst": float(expected.min())},
        abs=CLOSE,
    )


def test_cosine_of_zeros_is_defined() -> None:
    zero, one = np.zeros((1, 3), np.float32), np.ones((1, 3), np.float32)
    assert cosine_similarity(zero, zero) == 1
    assert cosine_similarity(zero, one) == cosine_similarity(one, zero) == 0
    assert cosine_similarity(one, -one) == pytest.approx(-1)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=30))
def test_log_softmax_never_overflows(values: list[float]) -> None:
    found = log_softmax(np.array(values, np.float32))
    assert np.isfinite(found).all()
    assert np.exp(found).sum() == pytest.approx(1)
    np.testing.assert_allclose(found, slow_log_softmax(values), rtol=1e-9, atol=1e-9)


@given(st.integers(0, 2**32 - 1), st.floats(0, 20))
def test_divergence_is_never_negative_and_bounds_the_distance(seed: int, scale: float) -> None:
    p, q = log_softmax(logits(1, 20, seed, scale)[0]), log_softmax(logits(1, 20, seed + 1, scale)[0])
    divergence = float(kl_divergence(p, q))
    assert divergence >= 0
    assert kl_divergence(p, p) == 0
    # Pinsker's inequality ties the two distances together; a divergence is a sum of float64 terms of at most 1.
    assert total_variation(p, q) <= math.sqrt((divergence + 20 * 2**-53) / 2) + CLOSE
    assert total_variation(p, q) == pytest.approx(total_variation(q, p))


def test_total_variation_of_known_distributions() -> None:
    first, second = np.log([0.5, 0.5, 1e-300]), np.log([1e-300, 0.5, 0.5])
    assert total_variation(first, second) == pytest.approx(0.5)


def test_equal_logits_have_no_drift() -> None:
    same = logits(70, 33, seed=8)
    drift = MaskedLmDrift()
    drift.add(same, same.copy(), np.arange(70) % 33)
    figures = drift.figures()
    for name in ("logit_error_max", "logit_error_mean", "kl_mean", "kl_p99", "pseudo_perplexity_change"):
        assert figures[name] == 0, name
    assert figures["top1_agreement"] == figures["top5_overlap"] == 1


def test_a_vocabulary_smaller_than_the_top_five() -> None:
    drift = MaskedLmDrift()
    drift.add(logits(3, 2, seed=9), logits(3, 2, seed=10), np.array([0, 1, 0]))
    assert drift.figures()["top5_overlap"] == 1


def test_next_sentence_figures() -> None:
    # Probabilities that B follows A: 0.9, 0.6, 0.3 and 0.5 in the reference, as logits of column 0 minus column 1.
    probability = [np.array([0.9, 0.6, 0.3, 0.5]), np.array([0.8, 0.4, 0.25, 0.5])]
    sides = [
        np.stack([np.log(p / (1 - p)) + 3, np.full(4, 3.0)], axis=1).astype(np.float32) for p in probability
    ]
    drift = NextSentenceDrift()
    drift.add(sides[0], sides[1], np.array([True, False, False, True]))
    assert drift.pairs == 4
    # float32 logits: seven digits.
    assert drift.figures() == pytest.approx(
        {
            "nsp_changed": 0.25,
            "nsp_probability_difference_max": 0.2,
            "nsp_accuracy_reference": 0.75,
            "nsp_accuracy_engine": 1.0,
        },
        abs=1e-6,
    )


@pytest.mark.parametrize("decibels", [-10.0, 0.0, 20.0, 60.0])
def test_signal_to_noise_is_what_was_put_in(decibels: float) -> None:
    rng = np.random.default_rng(11)
    signal = rng.standard_normal((500, 40)).astype(np.float32)
    noise = rng.standard_normal((500, 40))
    noise *= np.sqrt((signal.astype(np.float64) ** 2).sum() / (noise**2).sum() / 10 ** (decibels / 10))
    layer = LayerNoise()
    for part in (slice(0, 123), slice(123, None)):
        layer.add(signal[part], (signal[part] + noise[part]).astype(np.float32))
    # The sum is rounded to float32, which is itself noise at about -150 dB.
    assert layer.decibels == pytest.approx(decibels, abs=0.01)
    assert layer.tokens == 500


def test_signal_without_noise_and_noise_without_signal() -> None:
    ones, zeros = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    exact, drowned, empty = LayerNoise(), LayerNoise(), LayerNoise()
    exact.add(ones, ones)
    drowned.add(zeros, ones)
    assert exact.decibels == math.inf
    assert drowned.decibels == empty.decibels == -math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_counted_and_left_out(bad: float) -> None:
    reference = logits(80, 12, seed=12)
    engine = reference.copy()
    engine[[3, 70], 5] = bad
    engine[70, 6] = bad
    mlm, cosine, layer, nsp = MaskedLmDrift(), CosineDrift("pooled"), LayerNoise(), NextSentenceDrift()
    mlm.add(reference, engine, np.zeros(80, np.int64))
    cosine.add(reference, engine)
    layer.add(reference, engine)
    nsp.add(reference[:, 5:7], engine[:, 5:7], np.ones(80, bool))
    assert (mlm.non_finite, cosine.non_finite, layer.non_finite, nsp.non_finite) == (3, 3, 3, 3)
    assert (mlm.positions, cosine.rows, layer.tokens, nsp.pairs) == (78, 78, 78, 78)
    assert mlm.figures()["logit_error_max"] == 0
    assert layer.decibels == math.inf


def test_nothing_finite_gives_no_figures() -> None:
    bad = np.full((2, 2), np.nan, np.float32)
    good = np.zeros((2, 2), np.float32)
    mlm, cosine, nsp = MaskedLmDrift(), CosineDrift("hidden"), NextSentenceDrift()
    mlm.add(good, bad, np.zeros(2, np.int64))
    cosine.add(good, bad)
    nsp.add(good, bad, np.ones(2, bool))
    assert mlm.figures() == cosine.figures() == nsp.figures() == {}


def test_a_hopeless_engine_has_an_infinite_perplexity_and_no_warning() -> None:
    reference = np.zeros((1, 3), np.float32)
    engine = np.array([[3e4, 0, 0]], np.float32)
    drift = MaskedLmDrift()
    drift.add(reference, engine, np.array([1]))
    assert drift.figures()["pseudo_perplexity_engine"] == math.inf
