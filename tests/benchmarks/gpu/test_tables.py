"""A record as a table: what stands where, and that no text can break out of its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bertrt import machine
from bertrt_bench.gpu.device import Gpu
from bertrt_bench.gpu.lineup import Step, tensorrt
from bertrt_bench.gpu.options import GpuOptions
from bertrt_bench.gpu.record import Record, StepRecord
from bertrt_bench.gpu.tables import render

PLAN = {"library": "tensorrt", "version": "11.0", "profiles": ["1x1..1x64..1x512", "1x1..8x128..32x512"]}
DRIFT = {
    "precision": "int8",
    "source": "demo",
    "figures": {"non_finite": 0, "kl_mean": 0.5, "top1_agreement": None},
    "budgets": {"non_finite": 0, "kl_mean": 0.01},
    "violations": ["kl_mean is 0.5; the budget is at most 0.01"],
    "reference": "transformers",
    "examples": 400,
    "masked": 9530,
    "text": "a|b\n<script>\x1b.txt",
    "backend": "tensorrt",
}
STATE = {"sm_mhz": 1500, "memory_mhz": None, "temperature_c": 70, "power_w": 300.4}


def record(tmp_path: Path, gpu: Gpu, *steps: StepRecord) -> Record:
    options = GpuOptions(out=tmp_path)
    return Record(options=options, machine=machine.describe(), gpu=gpu.facts, steps=list(steps))


def taken(kind: str, name: str, found: dict[str, Any]) -> StepRecord:
    step = Step(kind=kind, name=name, seconds=1, precision=name.split()[-1] if " " in name else None)
    return StepRecord(step=step, outcome="done", seconds=2.0, found=found)


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_engines_and_drift(tmp_path: Path, fake_gpu: Gpu) -> None:
    export = {"export_seconds": 2.04, "engine_bytes": 220_000_000}
    kept = record(
        tmp_path,
        fake_gpu,
        taken("engine", "engine int8", {**export, "build_seconds": 40.0, "plan": PLAN}),
        taken("engine", "engine fp16", export),
        taken("drift", "drift int8", DRIFT),
    )
    assert kept.failed == ["drift int8: kl_mean is 0.5; the budget is at most 0.01"]
    text = render(kept.to_json())
    assert "| int8 | 220.0 MB | 2.0 | 40.0 | tensorrt 11.0, 1x1..1x64..1x512, 1x1..8x128..32x512 |" in text
    assert "| fp16 | 220.0 MB | 2.0 | - | - |" in text
    assert "- int8: demo, tensorrt, against transformers; over its budgets" in text
    assert "| Masked LM: KL divergence, mean | **0.5** over budget |" in text
    assert "| Masked LM: top-1 agreement | not finite |" in text
    assert "| Values: NaN or infinite values | 0 |" in text
    assert "400 examples of a\\|b &lt;script>\\x1b.txt, 9,530 masked positions." in text
    assert lines_of(text, "**Failed:**")


def test_turns_that_someone_left(tmp_path: Path, fake_gpu: Gpu) -> None:
    found = {"rounds": [3, 4], "complete": False, "left": {"a": "out of memory"}, "restless": {"b": 2}}
    kept = record(
        tmp_path, fake_gpu, taken("turns", "turns 2", {**found, "gpu_before": STATE, "gpu_after": None})
    )
    assert kept.failed == ["turns 2: a left: out of memory"]
    text = render(kept.to_json())
    assert "- b: its threads did not come to rest after 2 turns; the others' times are too long" in text
    assert "| turns 2 | 3, 4 | no: its time was used up | 1500 MHz, 70 °C, 300 W | - |" in text


def test_contestants(tmp_path: Path, fake_gpu: Gpu) -> None:
    contender = tensorrt("fp8")
    step = Step(kind="contestant", name=contender.name, seconds=1, contender=contender)
    found = {
        "description": contender.description,
        "precision": "fp8",
        "versions": {"tensorrt": "11.0"},
        "details": {"backend": "tensorrt"},
        "ready_seconds": 4.25,
        "device_memory_bytes": 1_500_000_000,
        "left_out": {"features at 1x128": "no time"},
        "failed": {"features at 8x128": "disagrees"},
    }
    skipped = StepRecord(step=step, outcome="skipped", seconds=0.0, reason="not\ninstalled")
    kept = record(
        tmp_path, fake_gpu, StepRecord(step=step, outcome="done", seconds=5.0, found=found), skipped
    )
    assert kept.failed == ["bertrt-tensorrt-fp8, features at 8x128: disagrees"]
    value = kept.to_json()
    assert value["steps"][0]["precision"] == "fp8"
    text = render(value)
    assert (
        "| bertrt-tensorrt-fp8 | BertRT in fp8, backend tensorrt | 1.5 GB | 4.2 | tensorrt 11.0; backend tensorrt |"
        in text
    )
    assert "- bertrt-tensorrt-fp8, features at 1x128 left out: no time" in text
    assert "- bertrt-tensorrt-fp8 skipped: not installed" in text


def test_variables_that_change_figures(
    tmp_path: Path, fake_gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    value = record(tmp_path, fake_gpu).to_json()
    assert value["settings"]["environment"]["MALLOC_ARENA_MAX"] == "8"
    assert "MALLOC_ARENA_MAX=8" in "".join(lines_of(render(value), "- environment: `"))


def test_figures_that_were_not_measured(tmp_path: Path, fake_gpu: Gpu) -> None:
    timings = {"p50_ms": 2.0, "p90_ms": 3.0, "p99_ms": None, "runs": 12}
    timings |= {"sequences_per_second": 500.0, "tokens_per_second": 64_000.0}
    timed = {"agreement": {"reference": "a"}, "rounds": [1], "timings": timings, "faster": None}
    prepared = {"agreement": {"reference": "a"}, "rounds": [], "timings": None, "faster": None}
    shape = {"task": "features", "batch": 1, "sequence": 128, "mix": False, "tokens": 128}
    contestants = {"a": {**timed, "operations_per_second": 2e12}, "b": prepared}
    value = {**record(tmp_path, fake_gpu).to_json(), "cases": [{**shape, "contestants": contestants}]}
    text = render(value)
    assert "| a | 2.00 | 3.00 | - | 500 | 64,000 |" in text
    assert "| b |" not in text
    assert text.index("## Not done") < text.index("- b, features, 1x128: no turn came to it")


@pytest.mark.parametrize("state", ["running", "interrupted"])
def test_a_record_that_is_not_finished(tmp_path: Path, fake_gpu: Gpu, state: str) -> None:
    kept = record(tmp_path, fake_gpu)
    kept.state = state
    assert f"**Not finished**: the run is {state}" in render(kept.to_json())
    kept.state = "done"
    text = render(kept.to_json())
    assert "Not finished" not in text
    # Without a step there is no table at all.
    assert "|" not in text.replace("\\|", "")
