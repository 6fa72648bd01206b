"""Budgets: defaults, changes, violations, and how figures are written."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from bertrt.errors import InputError
from bertrt.manifest import Precision
from bertrt_export.drift.budgets import (
    BOUNDED,
    DEFAULT_BUDGETS,
    check_budgets,
    parse_budgets,
    resolve_budgets,
    write_limit,
)
from bertrt_export.drift.figures import FIGURES, write_value


def test_every_precision_has_budgets_of_known_figures() -> None:
    assert set(DEFAULT_BUDGETS) == set(get_args(Precision))
    for budgets in DEFAULT_BUDGETS.values():
        assert budgets["non_finite"] == 0
        assert set(budgets) <= {*BOUNDED, "non_finite"}


def test_what_was_promised_is_a_budget() -> None:
    assert DEFAULT_BUDGETS["fp32"]["logit_error_max"] == 1e-3
    assert DEFAULT_BUDGETS["fp32"]["top1_agreement"] == 1
    assert DEFAULT_BUDGETS["fp16"]["top1_agreement"] == 0.995
    assert DEFAULT_BUDGETS["bf16"]["top1_agreement"] == 0.995
    assert DEFAULT_BUDGETS["int8"]["top1_agreement"] == 0.97
    assert DEFAULT_BUDGETS["int8"]["mlm_accuracy_change_points"] == 0.5


def test_a_lower_precision_has_no_stricter_budget() -> None:
    for stricter, looser in (("fp32", "fp16"), ("fp16", "bf16"), ("bf16", "int8")):
        for name in set(DEFAULT_BUDGETS[stricter]) & set(DEFAULT_BUDGETS[looser]):
            low, high = DEFAULT_BUDGETS[looser][name], DEFAULT_BUDGETS[stricter][name]
            assert low <= high if FIGURES[name].bound == "at least" else low >= high, name


@pytest.mark.parametrize(
    ("name", "limit", "good", "bad"),
    [
        ("top1_agreement", 0.97, [0.97, 1.0], [0.9699, 0.0, math.nan]),
        ("kl_mean", 0.01, [0.0, 0.01], [0.0101, math.inf, math.nan]),
        ("mlm_accuracy_change_points", 0.5, [-0.5, 0.0, 0.5], [-0.51, 0.51, math.nan]),
        ("layer_snr_lowest", 20.0, [20.0, math.inf], [19.9, -math.inf, math.nan]),
        ("non_finite", 0, [0], [1]),
    ],
)
def test_each_kind_of_bound(name: str, limit: float, good: list[float], bad: list[float]) -> None:
    for value in good:
        assert check_budgets({name: value}, {name: limit}) == ()
    for value in bad:
        [violation] = check_budgets({name: value}, {name: limit})
        assert (violation.figure, violation.limit) == (name, limit)
        assert violation.message.startswith(f"{name} is ")


def test_a_message_names_figure_value_and_budget() -> None:
    [violation] = check_budgets({"top1_agreement": 0.9612}, {"top1_agreement": 0.97})
    assert violation.message == "top1_agreement is 96.12 %; the budget is at least 97.00 %"


def test_figures_that_were_not_measured_are_not_checked() -> None:
    assert check_budgets({}, DEFAULT_BUDGETS["fp32"]) == ()


def test_changes_replace_add_and_lift() -> None:
    changes = parse_budgets(["top1_agreement=0.5", "kl_mean=off", "logit_error_max=2", "top1_agreement=0.6"])
    assert changes == {"top1_agreement": 0.6, "kl_mean": None, "logit_error_max": 2.0}
    budgets = resolve_budgets("int8", changes)
    assert budgets["top1_agreement"] == 0.6
    assert budgets["logit_error_max"] == 2
    assert "kl_mean" not in budgets
    assert budgets["kl_p99"] == DEFAULT_BUDGETS["int8"]["kl_p99"]
    assert "logit_error_max" not in DEFAULT_BUDGETS["int8"]


@pytest.mark.parametrize(
    "setting", ["kl_mean", "kl_mean=", "kl_mean=much", "kl_mean=nan", "kl_mean=inf", "=", ""]
)
def test_settings_that_say_nothing(setting: str) -> None:
    with pytest.raises(InputError, match="name=value or name=off"):
        parse_budgets([setting])


@pytest.mark.parametrize(
    ("name", "value"),
    [("speed", 1.0), ("mlm_accuracy_engine", 0.4), ("non_finite", None), ("non_finite", 5.0), ("", 1.0)],
)
def test_figures_without_a_budget(name: str, value: float | None) -> None:
    with pytest.raises(InputError, match=r"no budget for .* can be set are logit_error_max, .*bias_shift$"):
        resolve_budgets("int8", {name: value})


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_bounds_that_nothing_can_meet(value: float) -> None:
    with pytest.raises(InputError, match="kl_mean must be a number of 0 or more"):
        resolve_budgets("int8", {"kl_mean": value})


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("share", 1.0, "100.00 %"),
        ("share", 0.0, "0.00 %"),
        ("share", 0.99999, "99.99900 %"),
        ("share", 0.00001, "0.00100 %"),
        ("change", 0.0123, "+1.23 %"),
        ("change", -1e-9, "0.00 %"),
        ("points", -0.5, "-0.50 points"),
        ("cosine", 0.9999999, "0.9999999"),
        ("cosine", 0.98765, "0.98765"),
        ("decibels", 31.06, "31.1 dB"),
        ("decibels", math.inf, "exact"),
        ("decibels", -math.inf, "not finite"),
        ("number", 0.0, "0"),
        ("number", 2.4e-12, "2.4e-12"),
        ("number", 0.0675, "0.0675"),
        ("number", math.inf, "not finite"),
        ("number", math.nan, "not finite"),
        ("count", 12345, "12,345"),
        ("perplexity", 32.357, "32.36"),
        ("perplexity", 1e100, "1.00e+100"),
        ("perplexity", None, "not finite"),
    ],
)
def test_values_for_people(kind: str, value: float | None, text: str) -> None:
    assert write_value(kind, value) == text


def test_titles_keep_the_capitals_of_names() -> None:
    titles = {name: figure.title for name, figure in FIGURES.items()}
    assert titles["kl_mean"] == "Masked LM: KL divergence, mean"
    assert titles["non_finite"] == "Values: NaN or infinite values"
    assert titles["top1_agreement"] == "Masked LM: top-1 agreement"
    assert titles["prompt_kl_max"] == "Prompts: largest KL divergence of a prompt"
    assert write_limit("mlm_accuracy_change_points", 0.5) == "within 0.50 points"
