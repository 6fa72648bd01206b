"""Whether two contestants answer the same question the same, before either is timed.

One number decides: the root-mean-square error of the engine's answer, relative to how much the reference's
answer varies. 0 is the same answer; 1 is what an answer of zeros would get; unrelated answers are at about
the square root of 2. This tells an answer from a wrong one, no more: how good a precision is,
``bertrt drift`` measures. And it tells it only of what was asked: the texts of ``fill-mask-text``, and the
features that are measured beside it, have one segment.

Next-sentence has two numbers for each pair, the fewest of all, and the larger part of them is the same for every
pair. Random weights in bert-base-cased's shape answer eight pairs with logits of 0.2 that deviate by some 0.07; int8
is off by 0.007 at most, the answer to other pairs by 0.056 to 0.13, without the segments by 0.087 to 0.15. In the
demo they deviate by 0.5, and int8 is off by 0.05. From four pairs on the error is relative to that deviation. Fewer
do not tell it, and it is relative to the logits: what is coarsely wrong is refused, but not every answer to another
pair on random weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bertrt.architecture import BertArchitecture
from bertrt.errors import AnswersDisagreeError, MeasurementError
from bertrt.manifest import Precision
from bertrt_bench.cases import TOP_K, Case, Task
from bertrt_bench.contestants import Answer

# fp32: sums in another order differ by some 1e-6 in each layer. fp16: a rounding is 2**-11; some ten of them
# in each of 24 layers add up to about 0.01 as random errors do. bf16 has three bits fewer: eight times that.
# int8: a step of 1/127 of the largest activation, which is ten to twenty times the usual one, is an error of
# a few per cent in each product; 0.05 at the end of the demo model, several times that in models with
# outlying activations. Two contestants in int8, each with scales of its own, were 0.04 to 0.13 apart on the demo
# model and on random weights, whatever the task. A wrong model shows above that: the demo model's hidden
# states change by 0.27 without the segments, 0.30 when padding is attended to, 0.35 with positions off by one,
# 0.73 without the last layer. An answer to another question is above 1. fp8 (e4m3) has three bits behind the
# leading one: rounding is off by up to 2**-4, in the root mean square by 2.7 %, of both operands of a product, so by
# 4 % of the product: the few per cent of int8.
TOLERANCES: Final[Mapping[Precision, float]] = {
    "fp32": 1e-3,
    "fp16": 3e-2,
    "bf16": 0.24,
    "int8": 0.25,
    "fp8": 0.25,
}

MEASURES: Final[Mapping[Task, str]] = {
    "features": "error of the hidden states, relative to their deviation from the mean token",
    "fill-mask": "error of the best tokens' log-probabilities, relative to the deviation over the vocabulary",
    "next-sentence": "error of the logits, relative to their deviation over the pairs, of few pairs to their size",
    "mlm-all": "error of the centred logits, relative to their size",
    "fill-mask-text": "error of the best tokens' log-probabilities, relative to the deviation over the vocabulary",
}

# Of next-sentence: pairs whose deviation counts; the least deviation, relative to the logits (where a model gives all
# pairs the same answer, rounding is all that deviates); and the least size of fewer pairs' logits (the errors of a pair
# between yes and no, whose logits are near 0, are no smaller than another's).
_FEWEST_PAIRS: Final = 4
_LEAST_DEVIATION: Final = 0.1
_LEAST_LOGITS: Final = 0.2

# Numbers in one array of an answer that is compared (16 MiB of float32).
_LARGEST_ARRAY: Final = 1 << 22

_Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """The outcome of a check.

    Attributes:
        error: the relative root-mean-square error.
        tolerance: the largest error that passes.
    """

    error: float
    tolerance: float


def rows_compared(case: Case, architecture: BertArchitecture) -> int:
    """Rows of an answer that are kept and compared at most; see `bertrt_bench.protocol.sample_rows`."""
    widest = architecture.hidden_size if case.task == "features" else architecture.vocab_size
    return max(1, _LARGEST_ARRAY // widest)


def answer_shapes(case: Case, architecture: BertArchitecture) -> dict[str, tuple[int, ...]]:
    """The shape of each array that an answer must hold, when `rows_compared` rows of it are kept."""
    rows, hidden_size, vocab_size = (
        rows_compared(case, architecture),
        architecture.hidden_size,
        architecture.vocab_size,
    )
    tokens, batch = min(case.tokens, rows), min(case.batch, rows)
    shapes: dict[Task, dict[str, tuple[int, ...]]] = {
        "features": {"hidden_states": (tokens, hidden_size)},
        "fill-mask": {"ids": (batch, TOP_K), "log_probs": (batch, TOP_K)},
        "next-sentence": {"logits": (batch, 2)},
        "mlm-all": {"logits": (tokens, vocab_size)},
        "fill-mask-text": {"ids": (batch, TOP_K), "log_probs": (batch, TOP_K)},
    }
    return shapes[case.task]


def check_answer(name: str, case: Case, answer: Answer, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check one answer by itself.

    Raises:
        MeasurementError: an array is missing, or of the wrong shape.
        AnswersDisagreeError: a value is not finite.
    """
    for array, shape in shapes.items():
        found = answer.get(array)
        if found is None or found.shape != shape:
            raise MeasurementError(
                f"{name} answered {case} with {array!r} "
                f"{'missing' if found is None else f'of shape {list(found.shape)}'}; expected {list(shape)}"
            )
        if not bool(np.all(np.isfinite(found))):
            raise AnswersDisagreeError(
                f"{name} answered {case} with NaN or infinite values; nothing was timed"
            )


def compare(case: Case, precision: Precision, ours: Answer, theirs: Answer) -> Agreement:
    """Compare the engine's answer with a rival's, which is the reference.

    Args:
        case: what was asked.
        precision: the coarser of the two contestants' precisions.
        ours: the engine's answer.
        theirs: the rival's; for ``fill-mask`` with ``all_log_probs``.
    """
    if case.task == "features":
        error = _features(ours["hidden_states"], theirs["hidden_states"])
    elif case.task == "mlm-all":
        error = _logits(ours["logits"], theirs["logits"])
    elif case.task == "next-sentence":
        error = _next_sentence(ours["logits"], theirs["logits"])
    else:
        error = _fill_mask(ours, theirs)
    return Agreement(error=error, tolerance=TOLERANCES[precision])


def require(case: Case, ours: str, theirs: str, agreement: Agreement, *, outcome: str) -> None:
    """Stop at a disagreement.

    Args:
        case: what was asked.
        ours: who answered.
        theirs: whose answer that was compared with.
        agreement: what came of it.
        outcome: what a disagreement means, for the message.

    Raises:
        AnswersDisagreeError: the error is above the tolerance, or not a number.
    """
    if not agreement.error <= agreement.tolerance:
        raise AnswersDisagreeError(
            f"{ours} and {theirs} disagree on {case}: {MEASURES[case.task]}, is {agreement.error:.3g}, the "
            f"tolerance {agreement.tolerance:g}; {outcome}. "
            "See where the error comes from with 'bertrt drift'"
        )


def coarser(first: Precision, second: Precision) -> Precision:
    """The precision with the wider tolerance."""
    return first if TOLERANCES[first] >= TOLERANCES[second] else second


def _features(ours: _Array, theirs: _Array) -> float:
    # BERT's hidden states share a large common part, which even unrelated tokens have.
    theirs = theirs.astype(np.float64)
    return _ratio(_rms(ours - theirs), _rms(theirs - theirs.mean(axis=0)))


def _logits(ours: _Array, theirs: _Array) -> float:
    # A constant added to all the logits of a position changes no probability.
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    ours -= ours.mean(axis=1, keepdims=True)
    theirs -= theirs.mean(axis=1, keepdims=True)
    return _ratio(_rms(ours - theirs), _rms(theirs))


def _next_sentence(ours: _Array, theirs: _Array) -> float:
    # Both logits, though their difference alone decides: one number is right by chance too often.
    theirs = theirs.astype(np.float64)
    if len(theirs) < _FEWEST_PAIRS:
        scale = max(_LEAST_LOGITS, _rms(theirs))
    else:
        scale = max(_rms(theirs - theirs.mean(axis=0)), _LEAST_DEVIATION * _rms(theirs))
    return _ratio(_rms(ours - theirs), scale)


def _fill_mask(ours: Answer, theirs: Answer) -> float:
    everything = theirs["all_log_probs"].astype(np.float64)
    ids, log_probs = ours["ids"], ours["log_probs"].astype(np.float64)
    if int(ids.min()) < 0 or int(ids.max()) >= everything.shape[1]:
        return float("inf")
    # The same tokens must have the same log-probabilities, and no better tokens may have been left out: two
    # tokens that are nearly equal may change places.
    same_tokens = log_probs - np.take_along_axis(everything, ids, axis=1)
    same_ranks = log_probs - theirs["log_probs"]
    spread = _rms(everything - everything.mean(axis=1, keepdims=True))
    return _ratio(max(_rms(same_tokens), _rms(same_ranks)), spread)


def _rms(values: _Array) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _ratio(error: float, size: float) -> float:
    if size > 0:
        return error / size
    return 0.0 if error == 0 else float("inf")
