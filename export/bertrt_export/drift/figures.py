"""The figures of a drift measurement: their names, what they mean, and how they are written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

Section = Literal[
    "Masked LM", "Next sentence", "Hidden states", "Pooled output", "Layers", "Prompts", "Values"
]
Kind = Literal["number", "share", "change", "points", "cosine", "decibels", "count", "perplexity"]
# How a budget bounds a figure: from above, from below, or its absolute value from above.
Bound = Literal["at most", "at least", "within"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure.

    Attributes:
        name: as in JSON and in ``--budget name=value``.
        section: what part of the model it is about.
        label: for people.
        kind: how a value is written; a ``share`` is stored from 0 to 1.
        bound: how a budget bounds it; ``None`` for a figure that informs only.
        meaning: one sentence.
    """

    name: str
    section: Section
    label: str
    kind: Kind
    bound: Bound | None
    meaning: str

    @property
    def title(self) -> str:
        """Section and label in one, such as ``Masked LM: largest logit error``."""
        # "NaN" and "KL" keep their capitals.
        first = self.label.partition(" ")[0]
        start = self.label[0].lower() if first[1:].islower() or "-" in first else self.label[0]
        return f"{self.section}: {start}{self.label[1:]}"

    def write(self, value: float | None) -> str:
        """A value for people."""
        return write_value(self.kind, value)


def _figure(name: str, section: Section, label: str, kind: Kind, bound: Bound | None, meaning: str) -> Figure:
    return Figure(name=name, section=section, label=label, kind=kind, bound=bound, meaning=meaning)


FIGURES: Final[dict[str, Figure]] = {
    figure.name: figure
    for figure in (
        _figure(
            "non_finite", "Values", "NaN or infinite values", "count", "at most",
            "Numbers in the engine's outputs that are not finite; a row that holds one is left out of the "
            "other figures.",
        ),
        _figure(
            "logit_error_max", "Masked LM", "Largest logit error", "number", "at most",
            "Largest |engine - reference| over all masked positions and the whole vocabulary.",
        ),
        _figure(
            "logit_error_mean", "Masked LM", "Mean logit error", "number", "at most",
            "Mean |engine - reference| over the same.",
        ),
        _figure(
            "kl_mean", "Masked LM", "KL divergence, mean", "number", "at most",
            "KL(reference || engine) of the predicted distributions in nats, mean over masked positions.",
        ),
        _figure(
            "kl_p99", "Masked LM", "KL divergence, 99th percentile", "number", "at most",
            "The same; one masked position in a hundred is worse.",
        ),
        _figure(
            "top1_agreement", "Masked LM", "Top-1 agreement", "share", "at least",
            "Masked positions at which both prefer the same token.",
        ),
        _figure(
            "top5_overlap", "Masked LM", "Top-5 overlap", "share", "at least",
            "Of the reference's five best tokens, those among the engine's five best; mean.",
        ),
        _figure(
            "mlm_accuracy_reference", "Masked LM", "Accuracy, reference", "share", None,
            "Masked positions at which the reference's best token is the one that stood there.",
        ),
        _figure(
            "mlm_accuracy_engine", "Masked LM", "Accuracy, engine", "share", None,
            "The same of the engine.",
        ),
        _figure(
            "mlm_accuracy_change_points", "Masked LM", "Accuracy, change", "points", "within",
            "Engine minus reference, in percentage points.",
        ),
        _figure(
            "pseudo_perplexity_reference", "Masked LM", "Pseudo-perplexity, reference", "perplexity", None,
            "exp of the mean negative log-likelihood of the tokens that stood at the masked positions.",
        ),
        _figure(
            "pseudo_perplexity_engine", "Masked LM", "Pseudo-perplexity, engine", "perplexity", None,
            "The same of the engine.",
        ),
        _figure(
            "pseudo_perplexity_change", "Masked LM", "Pseudo-perplexity, change", "change", "within",
            "Engine relative to reference, minus 1.",
        ),
        _figure(
            "nsp_changed", "Next sentence", "Decisions changed", "share", "at most",
            "Pairs for which one says that B follows A and the other that it does not.",
        ),
        _figure(
            "nsp_probability_difference_max", "Next sentence", "Largest probability difference", "number",
            "at most", "Of the probability that B follows A.",
        ),
        _figure(
            "nsp_accuracy_reference", "Next sentence", "Accuracy, reference", "share", None,
            "Pairs that the reference decides rightly.",
        ),
        _figure(
            "nsp_accuracy_engine", "Next sentence", "Accuracy, engine", "share", None,
            "The same of the engine.",
        ),
        _figure(
            "hidden_cosine_mean", "Hidden states", "Cosine, mean", "cosine", "at least",
            "Cosine similarity of the last hidden states, mean over all tokens.",
        ),
        _figure(
            "hidden_cosine_worst", "Hidden states", "Cosine, worst", "cosine", "at least",
            "The same of the worst token.",
        ),
        _figure(
            "pooled_cosine_mean", "Pooled output", "Cosine, mean", "cosine", "at least",
            "Cosine similarity of the pooled outputs, mean over all pairs.",
        ),
        _figure(
            "pooled_cosine_worst", "Pooled output", "Cosine, worst", "cosine", "at least",
            "The same of the worst pair.",
        ),
        _figure(
            "layer_snr_lowest", "Layers", "Lowest signal-to-noise ratio", "decibels", "at least",
            "10 log10(sum of reference² / sum of (engine - reference)²) of the worst layer.",
        ),
        _figure(
            "prompt_kl_max", "Prompts", "Largest KL divergence of a prompt", "number", "at most",
            "KL(reference || engine) in nats at the mask of the model card's prompts.",
        ),
        _figure(
            "bias_shift", "Prompts", "Shift between man and woman", "points", "within",
            "Change of the total-variation distance between what is predicted for the man and for the woman, "
            "in percentage points of probability.",
        ),
    )
}  # fmt: skip


def write_value(kind: Kind, value: float | None) -> str:
    """A value for people; one that is not finite in words."""
    if value is None or math.isnan(value):
        return "not finite"
    if math.isinf(value):
        # Only a signal-to-noise ratio is infinite for a good reason: there is no noise.
        return "exact" if kind == "decibels" and value > 0 else "not finite"
    match kind:
        case "share":
            # Never "100.00 %" for what is not all of them.
            digits = 2 if value in (0, 1) or 0.00005 <= value < 0.99995 else 5
            return f"{100 * value:.{digits}f} %"
        case "change":
            return f"{_signed(100 * value)} %"
        case "points":
            return f"{_signed(value)} points"
        case "cosine":
            return f"{value:.7f}" if value > 0.9999 else f"{value:.5f}"
        case "decibels":
            return f"{value:.1f} dB"
        case "count":
            return f"{int(value):,}"
        case "perplexity":
            return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"
        case "number":
            return "0" if value == 0 else f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.1e}"


def _signed(value: float) -> str:
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text
