"""How far two models are apart, gathered batch by batch in float64.

Each class holds running sums, and one number for each masked position where a percentile needs it; never the
logits of more than one batch. Rows in which the engine gave a NaN or an infinity are counted and left out, so
that one bad row does not hide what the others say.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from bertrt.backends.base import Float32, Int64

Float64 = npt.NDArray[np.float64]

TOP_K = 5
# Rows of logits that are widened to float64 at once: a bert-base vocabulary is 0.23 MB a row, and a dozen
# temporaries of this many rows still fit where a batch fits.
_ROWS_AT_ONCE = 64
# exp of more is infinite in float64.
_LARGEST_EXPONENT = 709.0


def log_softmax(logits: npt.NDArray[np.floating]) -> Float64:
    """Natural logarithms of the softmax over the last axis, ``[..., n] float64``."""
    shifted: Float64 = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def kl_divergence(reference: Float64, engine: Float64) -> Float64:
    """``KL(reference || engine)`` in nats of log-probabilities ``[..., n]``, over the last axis."""
    divergence: Float64 = (np.exp(reference) * (reference - engine)).sum(axis=-1)
    # It is never negative (Gibbs' inequality); rounding may say otherwise.
    return divergence.clip(0.0)


def total_variation(first: Float64, second: Float64) -> float:
    """Half the sum of the absolute differences of two distributions given as log-probabilities."""
    return float(np.abs(np.exp(first) - np.exp(second)).sum() / 2)


class MaskedLmDrift:
    """Differences of the masked-LM logits."""

    def __init__(self) -> None:
        self.positions = 0
        self.non_finite = 0
        self._error_max = 0.0
        self._error_sum = 0.0
        self._values = 0
        self._agree = 0
        self._overlap = 0.0
        self._right = [0, 0]
        self._log_likelihood = [0.0, 0.0]
        self._divergences: list[Float64] = []

    def add(self, reference: Float32, engine: Float32, labels: Int64) -> None:
        """Take in ``[n, vocab]`` logits of both and the ``[n]`` true tokens."""
        for start in range(0, labels.shape[0], _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            self._add(reference[rows], engine[rows], labels[rows])

    def _add(self, reference: Float32, engine: Float32, labels: Int64) -> None:
        finite = np.isfinite(engine)
        self.non_finite += int(finite.size - finite.sum())
        keep = finite.all(axis=1)
        reference, engine, labels = reference[keep], engine[keep], labels[keep]
        if not labels.shape[0]:
            return
        self.positions += labels.shape[0]
        error = np.abs(engine.astype(np.float64) - reference)
        self._error_max = max(self._error_max, float(error.max()))
        self._error_sum += float(error.sum())
        self._values += error.size
        best = [logits.argmax(axis=1) for logits in (reference, engine)]
        self._agree += int((best[0] == best[1]).sum())
        k = min(TOP_K, reference.shape[1])
        top = [np.argpartition(-logits, k - 1, axis=1)[:, :k] for logits in (reference, engine)]
        self._overlap += float((top[0][:, :, None] == top[1][:, None, :]).sum()) / k
        log_probs = [log_softmax(logits) for logits in (reference, engine)]
        rows = np.arange(labels.shape[0])
        for side in (0, 1):
            self._right[side] += int((best[side] == labels).sum())
            self._log_likelihood[side] += float(log_probs[side][rows, labels].sum())
        self._divergences.append(kl_divergence(log_probs[0], log_probs[1]))

    def figures(self) -> dict[str, float]:
        """By name; empty if no position was left."""
        if not self.positions:
            return {}
        divergences = np.concatenate(self._divergences)
        accuracy = [right / self.positions for right in self._right]
        loss = [-total / self.positions for total in self._log_likelihood]
        perplexity = [_exp(value) for value in loss]
        return {
            "logit_error_max": self._error_max,
            "logit_error_mean": self._error_sum / self._values,
            "kl_mean": float(divergences.mean()),
            "kl_p99": float(np.percentile(divergences, 99)),
            "top1_agreement": self._agree / self.positions,
            "top5_overlap": self._overlap / self.positions,
            "mlm_accuracy_reference": accuracy[0],
            "mlm_accuracy_engine": accuracy[1],
            "mlm_accuracy_change_points": 100 * (accuracy[1] - accuracy[0]),
            "pseudo_perplexity_reference": perplexity[0],
            "pseudo_perplexity_engine": perplexity[1],
            "pseudo_perplexity_change": _exp(loss[1] - loss[0]) - 1,
        }


class NextSentenceDrift:
    """Differences of the next-sentence decisions."""

    def __init__(self) -> None:
        self.pairs = 0
        self.non_finite = 0
        self._changed = 0
        self._difference_max = 0.0
        self._right = [0, 0]

    def add(self, reference: Float32, engine: Float32, follows: npt.NDArray[np.bool_]) -> None:
        """Take in ``[n, 2]`` logits of both (column 0: B follows A) and ``[n]`` whether B does."""
        finite = np.isfinite(engine)
        self.non_finite += int(finite.size - finite.sum())
        keep = finite.all(axis=1)
        if not keep.any():
            return
        self.pairs += int(keep.sum())
        probability = [np.exp(log_softmax(logits[keep])[:, 0]) for logits in (reference, engine)]
        decision = [value >= 0.5 for value in probability]
        self._changed += int((decision[0] != decision[1]).sum())
        self._difference_max = max(self._difference_max, float(np.abs(probability[1] - probability[0]).max()))
        for side in (0, 1):
            self._right[side] += int((decision[side] == follows[keep]).sum())

    def figures(self) -> dict[str, float]:
        """By name; empty if no pair was left."""
        if not self.pairs:
            return {}
        return {
            "nsp_changed": self._changed / self.pairs,
            "nsp_probability_difference_max": self._difference_max,
            "nsp_accuracy_reference": self._right[0] / self.pairs,
            "nsp_accuracy_engine": self._right[1] / self.pairs,
        }


class CosineDrift:
    """Cosine similarity of vectors, row by row.

    Args:
        name: what the names of the figures begin with.
    """

    def __init__(self, name: str) -> None:
        self.rows = 0
        self.non_finite = 0
        self._name = name
        self._sum = 0.0
        self._worst = 1.0

    def add(self, reference: Float32, engine: Float32) -> None:
        """Take in ``[n, hidden]`` of both."""
        finite = np.isfinite(engine)
        self.non_finite += int(finite.size - finite.sum())
        keep = finite.all(axis=1)
        if not keep.any():
            return
        cosine = cosine_similarity(reference[keep], engine[keep])
        self.rows += cosine.shape[0]
        self._sum += float(cosine.sum())
        self._worst = min(self._worst, float(cosine.min()))

    def figures(self) -> dict[str, float]:
        """By name; empty if no row was left."""
        if not self.rows:
            return {}
        return {f"{self._name}_cosine_mean": self._sum / self.rows, f"{self._name}_cosine_worst": self._worst}


def cosine_similarity(first: Float32, second: Float32) -> Float64:
    """``[n]``: cosine of the angle between the rows of two ``[n, hidden]``.

    A row of zeros is like another row of zeros (1) and unlike any other (0).
    """
    a, b = first.astype(np.float64), second.astype(np.float64)
    norm_a, norm_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    norms = norm_a * norm_b
    product = (a * b).sum(axis=1)
    both_zero = (norm_a == 0) & (norm_b == 0)
    cosine: Float64 = np.divide(product, norms, out=both_zero.astype(np.float64), where=norms > 0)
    return cosine.clip(-1.0, 1.0)


class LayerNoise:
    """Signal-to-noise ratio of one layer's output: what part of it is not the reference."""

    def __init__(self) -> None:
        self.non_finite = 0
        self.tokens = 0
        self._signal = 0.0
        self._noise = 0.0

    def add(self, reference: Float32, engine: Float32) -> None:
        """Take in ``[n, hidden]`` of both."""
        finite = np.isfinite(engine)
        self.non_finite += int(finite.size - finite.sum())
        keep = finite.all(axis=1)
        signal = reference[keep].astype(np.float64)
        noise = engine[keep] - signal
        self.tokens += signal.shape[0]
        self._signal += float((signal * signal).sum())
        self._noise += float((noise * noise).sum())

    @property
    def decibels(self) -> float:
        """``10 log10(signal / noise)``: infinite if exact, minus infinity if nothing is left of the signal."""
        if not self.tokens:
            return -math.inf
        if self._noise == 0:
            return math.inf
        return 10 * math.log10(self._signal / self._noise) if self._signal else -math.inf


def _exp(value: float) -> float:
    return math.exp(value) if value < _LARGEST_EXPONENT else math.inf
