"""The steps of a run, and what each of them needs."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import get_args

import pytest

from bertrt.errors import BackendUnavailableError
from bertrt.manifest import Precision
from bertrt_bench.contestants import load_factory
from bertrt_bench.gpu import jobs
from bertrt_bench.gpu.abilities import Abilities
from bertrt_bench.gpu.device import Gpu
from bertrt_bench.gpu.lineup import (
    GPU_BASELINE,
    ORT_CUDA,
    REHEARSAL_BASELINE,
    TENSORRT,
    TORCH,
    chosen,
    gpu_steps,
    rehearsal_steps,
    scaled,
)

HERE = {"version": "1", "problem": None}
AWAY = {"version": None, "problem": "it is on holiday"}


@pytest.mark.parametrize(
    ("steps", "baseline"), [(gpu_steps(), GPU_BASELINE), (rehearsal_steps(), REHEARSAL_BASELINE)]
)
def test_a_lineup_can_be_carried_out(steps: list, baseline: str) -> None:
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    built: set[str] = set()
    for step in steps:
        contender = step.contender
        if step.kind == "engine":
            built.add(step.precision)
        elif step.kind == "drift":
            assert step.precision in built
        elif contender is not None:
            assert load_factory(contender.factory)
            assert contender.kind.name == step.name == contender.name
            # An engine is there before those that run it.
            assert not contender.engine or contender.precision in built
    # The first answers are the measure for all others; and all are timed at last.
    first = steps[0].contender
    assert (first.precision, first.needs) == ("fp32", (TORCH,))
    assert steps[-1].kind == "turns"
    assert baseline in [step.name for step in steps if step.contender]


def test_what_a_gpu_run_measures() -> None:
    steps = gpu_steps()
    assert {step.precision for step in steps if step.kind == "engine"} == set(get_args(Precision))
    assert {step.precision for step in steps if step.kind == "drift"} == set(get_args(Precision))
    names = {step.name for step in steps if step.contender}
    assert {f"bertrt-tensorrt-{precision}" for precision in get_args(Precision)} <= names
    assert {"bertrt-onnxruntime-cuda-fp16", "bertrt-onnxruntime-tensorrt-fp16"} <= names
    for kind in ("sdpa", "eager", "compile"):
        assert {f"torch-{kind}-fp16", f"torch-{kind}-bf16"} <= names
    # What is looked for is what is needed.
    found = set(jobs.libraries_of("cuda"))
    assert {need for step in steps if step.contender for need in step.contender.needs} <= found
    assert {TENSORRT, ORT_CUDA} <= found


@pytest.mark.parametrize(("minutes", "factor"), [(19.0, 2.0), (9.5, 1.0), (3.0, 1.0)])
def test_limits_grow_with_the_minutes(minutes: float, factor: float) -> None:
    steps = gpu_steps()
    for before, after in zip(steps, scaled(steps, minutes), strict=True):
        assert after == replace(before, seconds=factor * before.seconds)


def test_steps_by_their_names() -> None:
    steps = rehearsal_steps()
    assert chosen(steps, ()) == steps
    some = chosen(steps, ("sdpa", "int8"))
    assert [step.name for step in some] == [
        "torch-sdpa-fp32",
        "turns 1",
        "engine int8",
        "bertrt-onnxruntime-cpu-int8",
        "drift int8",
        "turns 2",
    ]


def test_what_is_missing_is_said() -> None:
    abilities = Abilities({TORCH: HERE, TENSORRT: AWAY}, None)
    abilities.require(TORCH)
    with pytest.raises(BackendUnavailableError, match="^it is on holiday; triton was not looked for$"):
        abilities.require(TORCH, TENSORRT, "triton")
    # Without a GPU the engine is rehearsed, and no plan is built, whatever is installed.
    assert abilities.engine_backend() == "onnxruntime:cpu"
    assert not Abilities({TENSORRT: HERE}, None).builds_plans


@pytest.mark.parametrize(
    ("libraries", "backend"),
    [
        ({TENSORRT: HERE, ORT_CUDA: HERE}, "tensorrt"),
        ({TENSORRT: AWAY, ORT_CUDA: HERE}, "onnxruntime:cuda"),
    ],
)
def test_the_backend_of_an_engine(fake_gpu: Gpu, libraries: dict, backend: str) -> None:
    abilities = Abilities(libraries, fake_gpu)
    assert abilities.engine_backend() == backend
    assert abilities.builds_plans == (backend == "tensorrt")


def test_nothing_runs_an_engine(fake_gpu: Gpu) -> None:
    with pytest.raises(
        BackendUnavailableError,
        match="nothing here runs an engine on the GPU: it is on holiday; it is on holiday",
    ):
        Abilities({TENSORRT: AWAY, ORT_CUDA: AWAY}, fake_gpu).engine_backend()


@pytest.mark.parametrize(
    ("capability", "lacking"), [("7.5", {"bf16", "fp8"}), ("8.6", {"fp8"}), ("8.9", set()), ("12.0", set())]
)
def test_precisions_that_a_gpu_lacks(
    nvml: str, monkeypatch: pytest.MonkeyPatch, capability: str, lacking: set[str]
) -> None:
    monkeypatch.setenv("FAKE_CAPABILITY", capability)
    found = set()
    with Gpu(nvml, {}) as gpu:
        for precision in get_args(Precision):
            try:
                Abilities({}, gpu).require_precision(precision)
            except BackendUnavailableError as error:
                assert f"this one has {capability}" in str(error)
                found.add(precision)
    assert found == lacking


def test_a_job_for_every_kind_of_work() -> None:
    assert set(jobs.JOBS) == {"probe", "export", "build", "drift"}
    assert importlib.import_module("bertrt_export.plans").build_plans
