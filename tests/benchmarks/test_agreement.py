"""The check of answers: noise of a known size passes or fails as its size says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bertrt.architecture import BertArchitecture
from bertrt.errors import AnswersDisagreeError, MeasurementError
from bertrt_bench import agreement
from bertrt_bench.agreement import (
    TOLERANCES,
    Agreement,
    answer_shapes,
    check_answer,
    coarser,
    compare,
    require,
    rows_compared,
)
from bertrt_bench.cases import RANKED, TASKS, Case

VOCAB, HIDDEN = 500, 48
RANDOM = np.random.default_rng(0)
ARCHITECTURE = BertArchitecture.from_config(
    {
        "model_type": "bert",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": HIDDEN,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
    }
)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def fill_mask(logits: np.ndarray) -> dict[str, np.ndarray]:
    log_probs = log_softmax(logits)
    ids = np.argsort(-log_probs, axis=1)[:, :5]
    best = np.take_along_axis(log_probs, ids, axis=1)
    return {"ids": ids, "log_probs": best, "all_log_probs": log_probs}


def answer(task: str, values: np.ndarray) -> dict[str, np.ndarray]:
    if task in RANKED:
        return fill_mask(values)
    return {"hidden_states" if task == "features" else "logits": values}


def values(task: str, rows: int = 64) -> np.ndarray:
    width = {"features": HIDDEN, "next-sentence": 2}.get(task, VOCAB)
    # A large common part, as BERT's hidden states have it.
    common = 5.0 if task == "features" else 0.0
    return (RANDOM.normal(size=(rows, width)) * 3 + common).astype(np.float32)


@pytest.mark.parametrize("task", TASKS)
def test_the_error_is_the_relative_size_of_the_noise(task: str) -> None:
    case = Case(task=task, batch=8, sequence=8)
    exact = values(task)
    noisy = exact + 0.1 * 3 * RANDOM.normal(size=exact.shape).astype(np.float32)
    found = compare(case, "int8", answer(task, noisy), answer(task, exact))
    # Fill-mask sees few numbers, and those that the noise pushed up most; the others are means over many.
    assert found.error == pytest.approx(0.1, rel=1.5 if task in RANKED else 0.3)
    assert compare(case, "fp32", answer(task, exact), answer(task, exact)).error == 0.0


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("task", TASKS)
def test_an_answer_to_another_question_fails_at_every_precision(task: str, precision: str) -> None:
    case = Case(task=task, batch=8, sequence=8)
    found = compare(case, precision, answer(task, values(task)), answer(task, values(task)))
    assert found.error > 0.5
    assert found.tolerance == TOLERANCES[precision]
    with pytest.raises(
        AnswersDisagreeError, match=rf"engine and torch disagree on {task} at 8x8: .* nothing"
    ):
        require(case, "engine", "torch", found, outcome="nothing was timed")


def test_tolerances_rise_with_coarseness() -> None:
    assert TOLERANCES["fp32"] < TOLERANCES["fp16"] < TOLERANCES["bf16"] < TOLERANCES["int8"] < 1
    assert coarser("fp32", "int8") == coarser("int8", "fp32") == "int8"
    assert coarser("fp16", "fp16") == "fp16"


def test_an_error_at_the_tolerance_passes() -> None:
    case = Case(task="features", batch=1, sequence=8)
    require(case, "engine", "torch", Agreement(error=0.5, tolerance=0.5), outcome="")


def test_no_number_is_no_agreement() -> None:
    with pytest.raises(AnswersDisagreeError):
        case = Case(task="features", batch=1, sequence=8)
        require(case, "engine", "torch", Agreement(error=float("nan"), tolerance=1), outcome="")


def test_near_ties_may_change_places() -> None:
    case = Case(task="fill-mask", batch=1, sequence=8)
    logits = values("fill-mask", rows=1)
    logits[0, :6] = 20.0 + 1e-6 * np.arange(6)
    other = logits.copy()
    other[0, :6] = other[0, 5::-1]
    assert fill_mask(logits)["ids"].tolist() != fill_mask(other)["ids"].tolist()
    assert compare(case, "fp32", fill_mask(logits), fill_mask(other)).error < TOLERANCES["fp32"]


def test_leaving_out_the_best_token_fails() -> None:
    case = Case(task="fill-mask", batch=1, sequence=8)
    right = fill_mask(values("fill-mask", rows=1))
    worse = np.argsort(-right["all_log_probs"], axis=1)[:, 100:105]
    ours = {"ids": worse, "log_probs": np.take_along_axis(right["all_log_probs"], worse, axis=1)}
    assert compare(case, "int8", ours, right).error > TOLERANCES["int8"]


@pytest.mark.parametrize("wrong", [-1, VOCAB])
def test_an_id_outside_the_vocabulary_fails(wrong: int) -> None:
    right = fill_mask(values("fill-mask", rows=1))
    ours = {**right, "ids": np.full((1, 5), wrong)}
    assert compare(Case(task="fill-mask", batch=1, sequence=8), "int8", ours, right).error == float("inf")


def test_a_constant_reference_is_no_division_by_zero() -> None:
    case = Case(task="features", batch=1, sequence=4)
    flat = {"hidden_states": np.ones((4, 3), np.float32)}
    assert compare(case, "fp32", flat, flat).error == 0.0
    assert compare(case, "fp32", {"hidden_states": np.zeros((4, 3), np.float32)}, flat).error == float("inf")


@pytest.mark.parametrize("task", TASKS)
def test_shapes(task: str) -> None:
    case = Case(task=task, batch=4, sequence=8)
    shapes = answer_shapes(case, ARCHITECTURE)
    rows = {"features": 32, "mlm-all": 32}.get(task, 4)
    right = {name: array[:rows] for name, array in answer(task, values(task)).items()}
    check_answer("torch", case, right, shapes)
    first = next(iter(shapes))
    with pytest.raises(MeasurementError, match=f"torch answered {task} at 4x8 with '{first}' of shape"):
        check_answer("torch", case, {**right, first: right[first][1:]}, shapes)
    with pytest.raises(MeasurementError, match=f"'{first}' missing; expected"):
        check_answer("torch", case, {}, shapes)


def test_only_some_rows_are_expected_of_large_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_LARGEST_ARRAY", 7 * VOCAB + 1)
    case = Case(task="mlm-all", batch=4, sequence=8)
    assert rows_compared(case, ARCHITECTURE) == 7
    assert answer_shapes(case, ARCHITECTURE) == {"logits": (7, VOCAB)}
    # Hidden states are narrower.
    assert rows_compared(replace(case, task="features"), ARCHITECTURE) == (7 * VOCAB + 1) // HIDDEN
    # However wide a row is, one is compared.
    monkeypatch.setattr(agreement, "_LARGEST_ARRAY", 1)
    assert rows_compared(case, ARCHITECTURE) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_fail(bad: float) -> None:
    case = Case(task="features", batch=1, sequence=4)
    states = np.zeros((4, HIDDEN), np.float32)
    states[2, 1] = bad
    with pytest.raises(AnswersDisagreeError, match="engine answered features at 1x4 with NaN or infinite"):
        check_answer("engine", case, {"hidden_states": states}, {"hidden_states": (4, HIDDEN)})
