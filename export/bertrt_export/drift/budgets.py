"""How much drift is too much: a budget for each precision, and the reason for each number.

**fp32** computes what PyTorch computes, with the sums in another order. Each product of a 24-bit significand
rounds by 2^-24, so that the outputs differ in the sixth or seventh digit. The budget of 1e-3 for the largest
logit error leaves room for models with logits in the tens and for the longest sums; a wrong formula (another
GELU, another epsilon, a lost bias) is far beyond it. From an error of at most e follow, by Hoeffding's lemma,
a KL divergence of at most e²/2 = 5e-7, and a next-sentence probability that is off by at most e/2 (the slope
of the logistic function is at most 1/4, and two logits are off). Preferred tokens and decisions must be the
same, all of them, and with them the accuracy.

**fp16** has 11 bits of significand: rounding is 2^-11 = 4.9e-4 of each value, a noise some 66 dB below the
signal at every place where a value is stored; a dozen such places in a row leave 40 dB or more. Logits
between 16 and 32 are stored in steps of 1/64, so that two tokens that close change places now and then: 0.5 %
of the positions may. A KL divergence of 1e-4 nats corresponds to logits off by 0.014, one such step.

**bf16** has 8 bits of significand: rounding is at most 2^-8 of each value, and its mean square 55 dB below the
signal. Some fifty such places in a row of twelve layers add up to a noise at 38 dB; 30 dB leave room for what
grows on the way. Noise of that size moves logits with a spread of 3 by 0.1, which is a KL divergence of at most
0.1² / 2 = 5e-3 where all of them move against each other, and less than 1e-3 in the mean, where they do not; as
in fp16, 0.5 % of the preferred tokens may change places with one as good. The cosine of one token may fall below
that of 30 dB, 0.9995, by ten times the noise.

**int8** has 256 steps for the range of an activation or of a weight's channel, some 30 to 40 dB for each
product. The largest logit error says nothing here (it is that of the least likely words), so that what
follows from the logits is bounded instead. 97 % of the preferred tokens stay; where they change, the two were
close together, so that the accuracy moves by half a point at most; one next-sentence decision in fifty may
change. A mean KL divergence of 0.01 nats moves, by Pinsker's inequality, at most sqrt(0.01 / 2) = 7 % of the
probability, and 5 points is what the prompts about man and woman may shift apart. A layer whose noise is 20 dB
below its signal has a cosine of 1 / sqrt(1 + 0.01) = 0.995 with the reference, which is the bound of both.

**fp8** (E4M3) has 4 bits of significand: rounding is at most 2^-4 of each value and 2.6 % in the root mean square, so
that a product of two such operands has its noise 29 dB below the signal, whatever the range: for values that fill an
int8 range evenly that is 10 dB more noise, for those that do not much the same. A mean KL divergence of twice int8's
budget, and 95 % of the preferred tokens; what follows from them as in int8.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from bertrt.errors import InputError
from bertrt.manifest import Precision
from bertrt_export.drift.figures import FIGURES

# A budget of this figure cannot be lifted: an engine that gives NaN has failed.
NON_FINITE: Final = "non_finite"

DEFAULT_BUDGETS: Final[Mapping[Precision, Mapping[str, float]]] = {
    "fp32": {
        NON_FINITE: 0,
        "logit_error_max": 1e-3,
        "kl_mean": 5e-7,
        "top1_agreement": 1.0,
        "top5_overlap": 0.999,
        "mlm_accuracy_change_points": 0.0,
        "pseudo_perplexity_change": 1e-3,
        "nsp_changed": 0.0,
        "nsp_probability_difference_max": 5e-4,
        "hidden_cosine_worst": 0.99999,
        "pooled_cosine_worst": 0.99999,
        "layer_snr_lowest": 80.0,
        "prompt_kl_max": 5e-7,
        "bias_shift": 0.1,
    },
    "fp16": {
        NON_FINITE: 0,
        "kl_mean": 1e-4,
        "kl_p99": 1e-3,
        "top1_agreement": 0.995,
        "top5_overlap": 0.99,
        "mlm_accuracy_change_points": 0.2,
        "pseudo_perplexity_change": 0.005,
        "nsp_changed": 0.005,
        "nsp_probability_difference_max": 0.05,
        "hidden_cosine_worst": 0.999,
        "pooled_cosine_worst": 0.999,
        "layer_snr_lowest": 40.0,
        "prompt_kl_max": 1e-3,
        "bias_shift": 1.0,
    },
    "bf16": {
        NON_FINITE: 0,
        "kl_mean": 1e-3,
        "kl_p99": 1e-2,
        "top1_agreement": 0.995,
        "top5_overlap": 0.98,
        "mlm_accuracy_change_points": 0.2,
        "pseudo_perplexity_change": 0.01,
        "nsp_changed": 0.005,
        "hidden_cosine_worst": 0.995,
        "pooled_cosine_worst": 0.995,
        "layer_snr_lowest": 30.0,
        "prompt_kl_max": 1e-2,
        "bias_shift": 2.0,
    },
    "int8": {
        NON_FINITE: 0,
        "kl_mean": 0.01,
        "kl_p99": 0.1,
        "top1_agreement": 0.97,
        "top5_overlap": 0.93,
        "mlm_accuracy_change_points": 0.5,
        "pseudo_perplexity_change": 0.02,
        "nsp_changed": 0.02,
        "hidden_cosine_mean": 0.995,
        "pooled_cosine_mean": 0.995,
        "layer_snr_lowest": 20.0,
        "prompt_kl_max": 0.05,
        "bias_shift": 5.0,
    },
    "fp8": {
        NON_FINITE: 0,
        "kl_mean": 0.02,
        "kl_p99": 0.2,
        "top1_agreement": 0.95,
        "top5_overlap": 0.92,
        "mlm_accuracy_change_points": 1.0,
        "pseudo_perplexity_change": 0.03,
        "nsp_changed": 0.03,
        "hidden_cosine_mean": 0.995,
        "pooled_cosine_mean": 0.995,
        "layer_snr_lowest": 20.0,
        "prompt_kl_max": 0.1,
        "bias_shift": 7.0,
    },
}

# The figures whose budgets can be set.
BOUNDED: Final = tuple(name for name, figure in FIGURES.items() if figure.bound and name != NON_FINITE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A figure over its budget.

    Attributes:
        figure: its name.
        measured: its value; may be NaN or infinite.
        limit: the budget.
    """

    figure: str
    measured: float
    limit: float

    @property
    def message(self) -> str:
        """One line for people."""
        figure = FIGURES[self.figure]
        limit = write_limit(self.figure, self.limit)
        return f"{self.figure} is {figure.write(self.measured)}; the budget is {limit}"


def write_limit(name: str, limit: float) -> str:
    """A budget for people, such as ``at least 97.00 %``."""
    figure = FIGURES[name]
    # A limit within which a change must stay has no sign.
    return f"{figure.bound} {figure.write(limit).lstrip('+')}"


def parse_budgets(settings: Iterable[str]) -> dict[str, float | None]:
    """Read ``name=value`` settings; ``name=off`` gives ``None``, which lifts a default budget.

    Raises:
        InputError: unknown figure, one that cannot be bounded, or not a number.
    """
    budgets: dict[str, float | None] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        try:
            value = None if text == "off" else float(text)
        except ValueError:
            value = math.nan
        if not separator or (value is not None and not math.isfinite(value)):
            raise InputError(
                f"a budget is written name=value or name=off, such as top1_agreement=0.98; got {setting!r}"
            )
        budgets[name] = value
    return budgets


def resolve_budgets(precision: Precision, changes: Mapping[str, float | None]) -> dict[str, float]:
    """The default budgets of a precision with changes applied, in the order of `FIGURES`.

    Raises:
        InputError: unknown figure, one that cannot be bounded, or a negative bound where none can hold.
    """
    budgets: dict[str, float | None] = {**DEFAULT_BUDGETS[precision]}
    for name, value in changes.items():
        figure = FIGURES.get(name)
        if figure is None or figure.bound is None or name == NON_FINITE:
            raise InputError(
                f"there is no budget for {name!r}; those that can be set are {', '.join(BOUNDED)}"
            )
        if value is not None and (not math.isfinite(value) or (figure.bound != "at least" and value < 0)):
            raise InputError(f"the budget of {name} must be a number of 0 or more, got {value}")
        budgets[name] = value
    return {name: value for name in FIGURES if (value := budgets.get(name)) is not None}


def check_budgets(figures: Mapping[str, float], budgets: Mapping[str, float]) -> tuple[Violation, ...]:
    """The figures that are over their budgets; one that was not measured is not checked."""
    return tuple(
        Violation(figure=name, measured=figures[name], limit=limit)
        for name, limit in budgets.items()
        if name in figures and not _within(name, figures[name], limit)
    )


def _within(name: str, value: float, limit: float) -> bool:
    match FIGURES[name].bound:
        case "at least":
            return value >= limit
        case "within":
            return abs(value) <= limit
        case _:
            return value <= limit
