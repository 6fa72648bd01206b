"""Bars, judged from records that are made up, and from one that was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from bertrt_bench.cpu.abilities import Abilities
from bertrt_bench.cpu.bars import BARS, Verdict, judge
from bertrt_bench.cpu.record import Record
from bertrt_bench.cpu.summary import failures
from bertrt_export.drift.budgets import DEFAULT_BUDGETS

LARGE = "int8, features at 32x128, "


def by_title(found: Record) -> dict[str, Verdict]:
    verdicts = judge(found)
    titles = {verdict.title: verdict for verdict in verdicts}
    assert len(titles) == len(verdicts)
    return titles


def test_the_limits() -> None:
    assert [(bar.title, bar.bound) for bar in BARS] == [
        ("int8, features at 1x16, against openvino", "at least 1.8x"),
        ("int8, features at 1x128, against openvino", "at least 2.5x"),
        ("int8, features at 8x128, against openvino", "at least 2.2x"),
        ("int8, features at 32x128, against openvino", "at least 2.2x"),
        ("int8, features at real lengths, against openvino", "at least 2.5x"),
        ("bf16, features at 1x128, against openvino", "at least 2x"),
        ("bf16, features at 32x128, against openvino", "at least 2x"),
        ("int8, features at 32x128, against torch", "at least 15x"),
        ("int8, features at 32x128, of the peak", "at least 30 %"),
        ("int8, fill-mask-text at 1x128, over features", "below 1.15x"),
        ("int8 with avx512-vnni, features at 1x128, against onnxruntime", "at least 1x"),
        ("int8 with avx512-vnni, features at 8x128, against onnxruntime", "at least 1x"),
        ("int8 with avx2-vnni, features at 1x128, against torch", "at least 1.5x"),
        ("int8 with avx2, features at 1x128, against torch", "at least 1x"),
    ]
    # What bf16 must keep here, its budget keeps everywhere.
    assert DEFAULT_BUDGETS["bf16"]["top1_agreement"] >= 0.995


@pytest.mark.parametrize(
    ("name", "title", "arguments", "measured", "outcome"),
    [
        ("int8-32x128", "against openvino", {"speedups": {"openvino": 2.2}}, "2.20x", "met"),
        ("int8-32x128", "against openvino", {"speedups": {"openvino": 2.19}}, "2.19x", "missed (2.19x)"),
        ("int8-32x128", "against torch", {"speedups": {"torch": 16}}, "16.00x", "met"),
        ("int8-32x128", "of the peak", {"share": 0.3}, "30 %", "met"),
        ("int8-32x128", "of the peak", {"share": 0.214}, "21 %", "missed (21 %)"),
        ("int8-lengths", "at real lengths", {"shape": None, "speedups": {"openvino": 2.4}}, "2.40x", "missed (2.40x)"),
        ("int8-text", "over features", {"task": "fill-mask-text", "over": 1.14}, "1.14x", "met"),
        ("int8-text", "over features", {"task": "fill-mask-text", "over": 1.15}, "1.15x", "missed (1.15x)"),
        ("bf16", "bf16, features at 1x128", {"speedups": {"openvino": 2.5}}, "2.50x", "met"),
    ],
)  # fmt: skip
def test_with_amx(
    record: Callable[..., Record],
    bench_value: Callable[..., dict[str, Any]],
    name: str,
    title: str,
    arguments: dict[str, Any],
    measured: str,
    outcome: str,
) -> None:
    value = bench_value(**{"shape": (32, 128) if "32x128" in name else (1, 128), **arguments})
    found = record({name: value})
    (verdict,) = [verdict for verdict in judge(found) if title in verdict.title and verdict.measured]
    assert (verdict.measured, verdict.outcome) == (measured, outcome)
    assert verdict.missed is outcome.startswith("missed")
    # A bar that was missed is a failure of the run.
    expected = [f"{verdict.title}: {outcome}, must be {verdict.bound}"] if verdict.missed else []
    assert failures(found) == expected


def test_without_amx_the_bars_of_amx_inform_only(
    record: Callable[..., Record], abilities: Callable[..., Abilities], kept: dict[str, Any]
) -> None:
    found = record({"int8-32x128": kept}, abilities("amx"))
    verdicts = by_title(found)
    for what, measured in (
        ("against openvino", "1.16x"),
        ("against torch", "9.16x"),
        ("of the peak", "77 %"),
    ):
        verdict = verdicts[LARGE + what]
        assert (verdict.measured, verdict.outcome) == (measured, "for processors with AMX")
    assert failures(found) == []


@pytest.mark.parametrize(
    ("isa", "rival", "speedup", "outcome"),
    [
        ("avx512-vnni", "onnxruntime", 0.99, "missed (0.99x)"),
        ("avx512-vnni", "onnxruntime", 1.0, "met"),
        ("avx2-vnni", "torch", 1.4, "missed (1.40x)"),
        ("avx2", "torch", 1.2, "met"),
    ],
)
@pytest.mark.parametrize("best", [False, True])
def test_bars_of_any_processor(
    record: Callable[..., Record],
    abilities: Callable[..., Abilities],
    bench_value: Callable[..., dict[str, Any]],
    isa: str,
    rival: str,
    speedup: float,
    outcome: str,
    best: bool,
) -> None:
    """The record of an instruction set is its own or, where it is the best, that of the features."""
    better = ("amx", "avx512-bf16", "avx512-vnni", "avx2-vnni")
    lacking = better[: better.index(isa) if isa in better else None] if best else ()
    value = bench_value(isa=isa, speedups={rival: speedup})
    found = record({"int8-features" if best else f"int8-{isa}": value}, abilities(*lacking))
    verdict = by_title(found)[f"int8 with {isa}, features at 1x128, against {rival}"]
    assert verdict.outcome == outcome


def test_the_demo_model_meets_no_bar_of_speed(
    record: Callable[..., Record], bench_value: Callable[..., dict[str, Any]]
) -> None:
    value = bench_value((32, 128), speedups={"openvino": 0.5})
    found = record({"int8-32x128": value}, model="demo")
    verdict = by_title(found)[LARGE + "against openvino"]
    assert (verdict.measured, verdict.outcome) == ("0.50x", "for bert-base-cased")
    assert failures(found) == []


def test_why_a_bar_was_not_measured(
    record: Callable[..., Record],
    abilities: Callable[..., Abilities],
    bench_value: Callable[..., dict[str, Any]],
) -> None:
    able = abilities("avx2-vnni", openvino="openvino not installed")
    found = record({"int8-32x128": bench_value((32, 128))}, able, only=("32x128", "avx2", "int8-text"))
    found.taken = [
        replace(taken, outcome="failed", reason="exit code 2") if taken.step.name == "int8-text" else taken
        for taken in found.taken
        if taken.step.name != "int8-avx2"
    ]
    outcomes = {title: verdict.outcome for title, verdict in by_title(found).items()}
    assert outcomes[LARGE + "against openvino"] == "not measured: openvino not installed"
    assert outcomes[LARGE + "of the peak"] == "not measured: int8-32x128 has no such figure"
    assert outcomes["int8, features at 1x16, against openvino"] == "not measured: left out by --only"
    assert outcomes["int8, fill-mask-text at 1x128, over features"] == "not measured: int8-text failed"
    assert outcomes["int8 with avx2-vnni, features at 1x128, against torch"] == "not measured: no avx2-vnni"
    avx2 = outcomes["int8 with avx2, features at 1x128, against torch"]
    assert avx2 == "not measured: the run ended before it"
    assert outcomes["drift of int8 with avx2-vnni"] == "not measured: no avx2-vnni"
    assert failures(found) == ["int8-text: exit code 2"]


def test_drift(record: Callable[..., Record], drift_value: Callable[..., dict[str, Any]]) -> None:
    over = "kl_mean is 0.02; the budget is at most 0.01"
    found = record(
        {
            "drift-int8-amx": drift_value(0.98),
            "drift-int8-avx2": drift_value(0.98, over),
            "drift-bf16-amx": drift_value(0.995),
            "drift-bf16-avx2": drift_value(0.9949),
            "drift-bf16-avx512-vnni": drift_value(None),
        },
        # Random weights have no drift; the demo checkpoint's is judged whatever the model.
        model="demo",
    )
    verdicts = by_title(found)
    assert {title: verdict.outcome for title, verdict in verdicts.items() if verdict.measured} == {
        "drift of int8 with amx": "met",
        "drift of int8 with avx2": f"missed ({over})",
        "drift of bf16 with amx": "met",
        "drift of bf16 with avx512-vnni": "missed (top-1 not finite)",
        "drift of bf16 with avx2": "missed (top-1 99.49 %)",
    }
    assert failures(found)[0] == f"drift-int8-avx2: {over}"
    assert "drift of bf16 with avx2: missed (top-1 99.49 %), must be top-1 at least 99.50 %" in failures(
        found
    )
