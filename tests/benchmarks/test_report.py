"""A report as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from bertrt import machine
from bertrt.folder import EngineFolder
from bertrt_bench.agreement import Agreement
from bertrt_bench.cases import Case
from bertrt_bench.options import BenchOptions
from bertrt_bench.report import CaseResult, Comparison, ContestantRecord, Report
from bertrt_bench.timings import speedup, summarise

CASE = Case(task="features", batch=2, sequence=8)


def contestant(name: str, **changes: Any) -> ContestantRecord:
    fields = {"description": f"the {name}", "threads": 2, "versions": {name: "1.0"}, "details": {}}
    return ContestantRecord(**{"name": name, **fields, **changes})


@pytest.fixture
def report(demo_engine: Callable[..., Path]) -> Callable[..., Report]:
    """A function that makes a report of the engine and a rival that is twice as slow."""

    def make(runs: int = 100, rival: ContestantRecord | None = None, **changes: Any) -> Report:
        rival = rival or contestant("rival")
        ours, theirs = (summarise([[ms * 1_000_000] * runs], CASE) for ms in (2, 4))
        comparison = Comparison(
            speedup=speedup(ours, theirs), agreement=Agreement(error=0.125, tolerance=0.25)
        )
        result = CaseResult(
            case=CASE, timings={"engine": ours, rival.name: theirs}, comparisons={rival.name: comparison}
        )
        fields = {
            "options": BenchOptions(engine="demo", threads=1),
            "manifest": EngineFolder.open(demo_engine()).manifest,
            "machine": machine.describe(),
            "load_average": 0.5,
            "started": datetime(2026, 1, 2, tzinfo=UTC),
            "duration_seconds": 3.0,
            "contestants": [contestant("engine"), rival],
            "results": [result],
        }
        return Report(**{**fields, **changes})

    return make


def row(text: str, name: str) -> list[str]:
    """The words of a contestant's row in the table."""
    return next(line.split() for line in text.splitlines() if f" {name} " in line and " 0.000 " in line)


def test_the_table(report: Callable[..., Report]) -> None:
    text = report().to_text()
    assert row(text, "engine")[:10] == [
        *("features", "2", "8", "engine"),
        *("2.00", "2.00", "2.00", "2.00", "0.000", "1,000"),
    ]
    assert row(text, "rival") == [
        *("rival", "4.00", "4.00", "4.00", "4.00", "0.000", "500", "4,000", "100", "2.00x", "(2.00-2.00)"),
    ]
    assert "  features 0.12 (tolerance 0.25)" in text
    assert "  rival 1.0, 2 threads" in text
    assert "warning" not in text


@pytest.mark.parametrize(
    ("runs", "shown"),
    [(1, ["4.00", "4.00"]), (9, ["4.00", "4.00", "0.000"]), (10, ["4.00", "4.00", "4.00", "0.000"])],
)
def test_what_too_few_runs_do_not_tell_is_blank(
    report: Callable[..., Report], runs: int, shown: list[str]
) -> None:
    found = report(runs=runs)
    (line,) = [line for line in found.to_text().splitlines() if line.strip().startswith("rival  ")]
    assert line.split()[1 : 1 + len(shown)] == shown
    assert line.split()[1 + len(shown)] == "500"
    timings = json.loads(found.to_json_text())["cases"][0]["timings"]["rival"]
    assert timings["p99_ms"] is None
    assert (timings["p90_ms"] is None, timings["std_ms"] is None) == (runs < 10, runs < 2)


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({}, None),
        ({"idle_cpu_seconds": 0.01, "idle_seconds": 1.0}, None),
        (
            {"idle_cpu_seconds": 0.5, "idle_seconds": 10.0},
            "warning: rival used 5% of a processor while it was another's turn; the others' times are too long",
        ),
        (
            {"restless_turns": 1},
            "warning: the threads of rival did not come to rest after 1 turn; the others' times are too long",
        ),
    ],
)
def test_who_disturbed_the_others_is_told(
    report: Callable[..., Report], changes: dict[str, Any], warning: str | None
) -> None:
    found = report(rival=contestant("rival", **changes))
    told = [line for line in found.to_text().splitlines() if line.startswith("warning")]
    assert told == ([] if warning is None else [warning])
    value = json.loads(found.to_json_text())["contestants"][1]
    assert value["idle_cpu_seconds"] == changes.get("idle_cpu_seconds")
    assert value["restless_turns"] == changes.get("restless_turns", 0)


def test_threads_that_nobody_told(report: Callable[..., Report]) -> None:
    found = report(rival=contestant("rival", threads=None))
    assert "  rival 1.0\n" in found.to_text()
    assert json.loads(found.to_json_text())["contestants"][1]["threads"] is None


def test_variables_that_change_figures(report: Callable[..., Report]) -> None:
    found = report(environment={"BERTRT_PIN_THREADS": "1"})
    assert "environment: BERTRT_PIN_THREADS=1" in found.to_text()
    assert json.loads(found.to_json_text())["settings"]["environment"] == {"BERTRT_PIN_THREADS": "1"}
    assert "environment" not in report().to_text()
