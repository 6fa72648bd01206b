"""Machines and records that the tests make up."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from bertrt import machine
from bertrt.backends.native import InstructionSet
from bertrt_bench.cpu.abilities import Abilities
from bertrt_bench.cpu.options import CpuOptions
from bertrt_bench.cpu.plan import chosen, planned
from bertrt_bench.cpu.record import Record, Taken

SETS = ("amx", "avx512-bf16", "avx512-vnni", "avx2-vnni", "avx2", "portable")
RIVALS = ("torch", "onnxruntime", "openvino")
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


@pytest.fixture
def abilities() -> Callable[..., Abilities]:
    """A function that makes a machine, of what it lacks."""

    def make(*lacking: str, **rivals: str) -> Abilities:
        usable = [name for name in SETS if name not in lacking]
        sets = [
            InstructionSet(name=name, active=name == usable[0], reason="" if name in usable else f"no {name}")
            for name in SETS
        ]
        return Abilities(sets=sets, rivals={**dict.fromkeys(RIVALS, ""), **rivals})

    return make


@pytest.fixture
def kept() -> dict[str, Any]:
    """A record of ``bertrt bench`` that was measured: int8, features at 32x128, on avx512-bf16."""
    value: dict[str, Any] = json.loads(
        (RESULTS / "native-int8-32x128-epyc-zen5.json").read_text(encoding="utf-8")
    )
    return value


@pytest.fixture
def bench_value() -> Callable[..., dict[str, Any]]:
    """A function that makes as much of a record of ``bertrt bench`` as is read, with one case."""

    def make(
        shape: tuple[int, int] | None = (1, 128),
        *,
        isa: str = "amx",
        task: str = "features",
        speedups: Mapping[str, float] | None = None,
        share: float | None = None,
        over: float | None = None,
    ) -> dict[str, Any]:
        speedups = speedups or {}
        case = {
            "task": task,
            "batch": shape[0] if shape else 308,
            "sequence": shape[1] if shape else 512,
            "mix": shape is None,
            "share_of_peak": share,
            "over_features": None if over is None else {"median": over},
            "timings": {name: {"p50_ms": 2.0} for name in ("engine", *speedups)},
            "comparisons": {name: {"speedup": {"median": value}} for name, value in speedups.items()},
        }
        details = {"backend": "native", "instruction_set": isa}
        mix = {"name": "lengths-of-x", "paragraphs": 308, "least": 6, "most": 512, "tokens": 44870}
        return {
            "format": "bertrt-bench",
            "machine": {"load_average": 0.25},
            "settings": {"lengths": mix if shape is None else None},
            "contestants": [
                {"name": "engine", "versions": {"native": "0.1.0"}, "details": details},
                *({"name": name, "versions": {name: "1.2"}, "details": {}} for name in speedups),
            ],
            "cases": [case],
        }

    return make


@pytest.fixture
def drift_value() -> Callable[..., dict[str, Any]]:
    """A function that makes as much of a record of ``bertrt drift`` as is read."""

    def make(top1: float | None = 0.998, *violations: str) -> dict[str, Any]:
        return {
            "format": "bertrt-drift",
            "passed": not violations,
            "violations": [{"figure": text.partition(" ")[0], "message": text} for text in violations],
            "examples": {"text": "evaluation.txt", "examples": 400, "masked": 9530},
            "figures": {"top1_agreement": top1, "kl_mean": 1.2e-3},
            "versions": {"torch": "2.13.0"},
            "machine": {},
        }

    return make


@pytest.fixture
def record(tmp_path: Path, abilities: Callable[..., Abilities]) -> Callable[..., Record]:
    """A function that makes the record of a finished run in which these steps, by name, left these values."""

    def make(
        values: Mapping[str, Mapping[str, Any]], able: Abilities | None = None, **options: Any
    ) -> Record:
        able = able or abilities()
        asked = CpuOptions(out=tmp_path / "out", **{"threads": 1, **options})
        plan = planned(asked, able, lengths="lengths-of-x")
        steps = chosen(plan, asked.only)
        taken = [
            Taken(step=step, outcome="done", seconds=3.2, value=values[step.name])
            if step.name in values
            else Taken(step=step, outcome="skipped", reason=step.problem or "not in this test")
            for step in steps
        ]
        return Record(
            options=asked,
            machine=machine.describe(),
            abilities=able,
            plan=plan,
            steps=steps,
            state="done",
            taken=taken,
        )

    return make
