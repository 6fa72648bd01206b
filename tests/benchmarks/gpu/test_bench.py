"""Contestants come, are checked, take turns and leave; engines and drift; on fakes that misbehave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest

from bertrt.errors import BackendUnavailableError, MeasurementError
from bertrt_bench.gpu import bench as module
from bertrt_bench.gpu import options as amounts
from bertrt_bench.gpu.bench import Bench
from bertrt_bench.gpu.clock import Clock, Share
from bertrt_bench.gpu.device import Gpu
from bertrt_bench.gpu.lineup import ORT_CUDA, TENSORRT, Step, onnxruntime, tensorrt
from bertrt_bench.gpu.options import GpuOptions
from bertrt_bench.gpu.subject import Subject, open_subject
from bertrt_export.demo import demo_folder

HERE = {"version": "1", "problem": None}
LIBRARIES = {"onnx": HERE, "onnxruntime": HERE, "torch": HERE}
MIX = "features at 8 lengths of 18 to 186"


@pytest.fixture
def options(tmp_path: Path) -> GpuOptions:
    return GpuOptions(out=tmp_path / "out", device="cpu")


@pytest.fixture
def subject(options: GpuOptions, tmp_path: Path) -> Subject:
    folder = tmp_path / "subject"
    folder.mkdir()
    return open_subject(options, folder)


@pytest.fixture
def bench(options: GpuOptions, subject: Subject, tmp_path: Path, fakes: object) -> Iterator[Bench]:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with Bench(options, subject, LIBRARIES, gpu=None, scratch=scratch) as found:
        yield found


def test_cases_of_a_rehearsal(subject: Subject) -> None:
    assert [str(case) for case in subject.cases] == [
        "features at 1x16",
        "features at 2x32",
        MIX,
        "next-sentence at 1x16",
        "next-sentence at 2x32",
    ]
    assert (subject.checkpoint, subject.random, subject.left_out) == ("demo", False, {})


def test_turns_of_all_who_are_there(bench: Bench, enter: Callable[..., Step], share: Share, fakes) -> None:
    for name in ("a", "b"):
        found = bench.take(enter(name), share)
        assert (found["left_out"], found["failed"], found["versions"]) == ({}, {}, {"fake": "1.0"})
        # Without a GPU there is none of its memory.
        assert found["device_memory_bytes"] is None
    turns = Step(kind="turns", name="turns", seconds=60)
    assert bench.take(turns, share) == {
        "rounds": [1],
        "complete": True,
        "left": {},
        "restless": {},
        "gpu_before": None,
        "gpu_after": None,
    }
    found = bench.take(enter("c"), share)
    assert bench.take(turns, share)["rounds"] == [2]
    # The one that came later has the later round alone; every round has two runs of each case at least.
    assert set(bench.times) == {(index, name) for index in range(5) for name in "abc"}
    for (_, name), rounds in bench.times.items():
        assert set(rounds) == ({2} if name == "c" else {1, 2})
        # And goes on for its time: a run writes a line into a log.
        assert all(len(times) > 2 for times in rounds.values())
    # Asked once each, then in turns, each warmed up once and timed twice at least; each round has its order.
    runs = [
        (name, len(list(events)))
        for name, events in groupby(
            event.name for event in fakes.events() if event.what == "run:features:2:32"
        )
    ]
    # b was asked last and has the first turn, without another between.
    assert [name for name, _ in runs] == ["a", "b", "a", "c", "b", "c", "a"]
    assert [count for name, count in (runs[0], runs[3])] == [1, 1]
    assert all(count >= 3 for _, count in runs[1:3] + runs[4:])
    assert bench.agreements[0, "a"] == {"reference": "a"}
    assert bench.agreements[0, "b"] == {"reference": "a", "error": 0.0, "tolerance": 1e-3}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wrong", "wrong and a disagree on features at 1x16: .* it is not timed"),
        ("not_finite", "not_finite answered features at 1x16 with NaN or infinite values"),
        ("misshapen", r"'hidden_states' of shape \[15, 256\]; expected \[16, 256\]"),
    ],
)
def test_one_that_answers_otherwise_is_not_timed(
    bench: Bench,
    enter: Callable[..., Step],
    share: Share,
    fakes,
    alive: Callable[[int], bool],
    name: str,
    reason: str,
) -> None:
    bench.take(enter("a"), share)
    with pytest.raises(MeasurementError, match=f"no case is left to {name}: .*{reason}"):
        bench.take(enter(name), share)
    assert set(bench.present) == {"a"}
    assert sum(map(alive, fakes.pids())) == 1


def test_a_case_that_fails_is_named_and_the_others_are_timed(
    bench: Bench, enter: Callable[..., Step], share: Share
) -> None:
    bench.take(enter("a"), share)
    found = bench.take(enter("half", factory="gpu_fakes:open_half"), share)
    assert set(found["failed"]) == {"next-sentence at 1x16", "next-sentence at 2x32"}
    assert all("never heard of it" in reason for reason in found["failed"].values())
    assert bench.turns(share)["left"] == {}
    assert {index for index, name in bench.times if name == "half"} == {0, 1, 2}


def test_cases_that_do_not_suit(bench: Bench, enter: Callable[..., Step], share: Share) -> None:
    found = bench.take(enter("a", mixes=False), share)
    assert found["left_out"] == {MIX: "compiled for fixed shapes; each block of a mix would be compiled anew"}
    assert bench.present["a"].cases == [0, 1, 3, 4]


def test_cases_for_which_no_time_is_left(
    bench: Bench, enter: Callable[..., Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Time:
        """Stands still until the first case is done, which then took a minute."""

        def __call__(self) -> float:
            return 60.0 if any(here.cases for here in watched) else 0.0

    watched: list[module.Present] = []
    made = module.Present

    class Watched(made):
        def __init__(self, **fields: object) -> None:
            super().__init__(**fields)
            watched.append(self)

    monkeypatch.setattr(module, "Present", Watched)
    clock = Clock(seconds=1000, now=Time())
    found = bench.take(enter("a"), clock.share(50))
    reason = "the cases before it used up the time of the step"
    assert set(found["left_out"].values()) == {reason}
    assert len(found["left_out"]) == 4
    assert bench.present["a"].cases == [0]


@pytest.mark.parametrize(("name", "reason"), [("dies", "exit code 7"), ("raises", "out of paper")])
def test_one_that_fails_in_its_turn_leaves(
    bench: Bench,
    enter: Callable[..., Step],
    share: Share,
    fakes,
    alive: Callable[[int], bool],
    name: str,
    reason: str,
) -> None:
    for contestant in ("a", name, "b"):
        bench.take(enter(contestant), share)
    found = bench.turns(share)
    assert set(found["left"]) == {name}
    assert reason in found["left"][name]
    assert set(bench.present) == {"a", "b"}
    assert {contestant for _, contestant in bench.times} == {"a", "b"}
    assert sum(map(alive, fakes.pids())) == 2


def test_one_that_dies_at_the_start(bench: Bench, enter: Callable[..., Step], share: Share) -> None:
    with pytest.raises(MeasurementError, match="there is no contestant 'bench_fakes:open_nobody'"):
        bench.take(enter("nobody"), share)
    assert bench.present == {}


def test_turns_end_with_their_time(bench: Bench, enter: Callable[..., Step], share: Share) -> None:
    bench.take(enter("a"), share)
    clock = Clock(seconds=100)
    over = replace(clock.share(50), end=clock.spent - 1)
    found = bench.turns(over)
    assert (found["rounds"], found["complete"], found["left"]) == ([], False, {})
    # Nor does one begin that the end of the run would cut off.
    close = replace(clock.share(50), end=clock.spent + 1, limit=clock.spent + 1)
    found = bench.turns(close)
    assert (found["complete"], found["left"]) == (False, {})
    assert bench.times == {}
    assert set(bench.present) == {"a"}


def test_turns_of_nobody(bench: Bench, share: Share) -> None:
    with pytest.raises(BackendUnavailableError, match="no contestant is there; the steps before say why"):
        bench.turns(share)


def test_all_processes_end_with_the_bench(
    options: GpuOptions,
    subject: Subject,
    tmp_path: Path,
    enter: Callable[..., Step],
    share: Share,
    fakes,
    alive,
) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        Bench(options, subject, LIBRARIES, gpu=None, scratch=tmp_path) as bench,
    ):
        bench.take(enter("a"), share)
        bench.take(enter("b"), share)
        assert sum(map(alive, fakes.pids())) == 2
        raise KeyboardInterrupt
    assert not any(map(alive, fakes.pids()))


class Jobs:
    """Stands for `run_job`: remembers what is asked and answers at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **failing: str) -> None:
        self.asked: list[tuple[str, dict]] = []
        self._failing = failing
        monkeypatch.setattr(module, "run_job", self)

    def __call__(self, name: str, request: dict, **_: object) -> dict:
        self.asked.append((name, dict(request)))
        if name in self._failing:
            raise MeasurementError(self._failing[name])
        return {
            "export": {"export_seconds": 1.0, "engine_bytes": 2},
            "build": {"build_seconds": 3.0, "plan": {}},
            "drift": {"figures": {}},
        }[name]


def gpu_bench(options: GpuOptions, subject: Subject, tmp_path: Path, gpu: Gpu, *libraries: str) -> Bench:
    found = LIBRARIES | dict.fromkeys(libraries, HERE)
    return Bench(replace(options, device="cuda"), subject, found, gpu=gpu, scratch=tmp_path)


def test_an_engine_and_its_plan(
    options: GpuOptions, subject: Subject, tmp_path: Path, fake_gpu: Gpu, share: Share, monkeypatch
) -> None:
    jobs = Jobs(monkeypatch)
    random = replace(subject, checkpoint="bert-base-cased", random=True)
    bench = gpu_bench(options, random, tmp_path, fake_gpu, TENSORRT)
    found = bench.engine("fp16", share)
    assert found == {"export_seconds": 1.0, "engine_bytes": 2, "build_seconds": 3.0, "plan": {}}
    out = str(tmp_path / "engine-fp16")
    assert jobs.asked == [
        ("export", {"checkpoint": "bert-base-cased", "random": True, "precision": "fp16", "out": out}),
        ("build", {"folder": out, "profiles": []}),
    ]
    # Random weights have no answers to lose: the drift is the demo checkpoint's, which gets a plan of its own.
    jobs.asked.clear()
    found = bench.drift("fp16", share)
    assert (found["source"], found["precision"], found["build_seconds"]) == ("demo", "fp16", 3.0)
    (export, exported), (build, built), (drift, compared) = jobs.asked
    assert (export, build, drift) == ("export", "build", "drift")
    assert (exported["checkpoint"], exported["random"]) == ("demo", False)
    assert built == {"folder": str(tmp_path / "drift-fp16"), "profiles": list(amounts.FULL.drift_profiles)}
    assert compared["folder"] == str(tmp_path / "drift-fp16")
    assert (compared["backend"], compared["device"], compared["checkpoint"]) == ("tensorrt", "cuda", "demo")


def test_the_drift_of_a_checkpoint_that_was_named(
    options: GpuOptions, subject: Subject, tmp_path: Path, fake_gpu: Gpu, share: Share, monkeypatch
) -> None:
    jobs = Jobs(monkeypatch)
    named = replace(options, checkpoint=str(demo_folder()))
    bench = gpu_bench(named, subject, tmp_path, fake_gpu, TENSORRT)
    with pytest.raises(
        BackendUnavailableError, match="no engine in fp16 for it; the step 'engine fp16' says why"
    ):
        bench.drift("fp16", share)
    bench.engine("fp16", share)
    jobs.asked.clear()
    # By its name, not by the folder that it lies in.
    assert bench.drift("fp16", share)["source"] == "demo"
    assert [(name, request["folder"]) for name, request in jobs.asked] == [
        ("drift", str(tmp_path / "engine-fp16"))
    ]


def test_an_engine_whose_plan_cannot_be_built(
    options: GpuOptions, subject: Subject, tmp_path: Path, fake_gpu: Gpu, share: Share, monkeypatch
) -> None:
    Jobs(monkeypatch, build="the builder is on strike")
    bench = gpu_bench(options, subject, tmp_path, fake_gpu, TENSORRT, ORT_CUDA)
    with pytest.raises(MeasurementError, match="on strike"):
        bench.engine("fp16", share)
    with pytest.raises(BackendUnavailableError, match="no engine in fp16 for it"):
        bench.enter(tensorrt("fp16"), share)
    # ONNX Runtime needs no plan: it is started, and fails for a reason of its own.
    with pytest.raises(MeasurementError, match="bertrt-onnxruntime-cuda-fp16: its process, starting, failed"):
        bench.enter(onnxruntime("fp16", "cuda"), share)


def test_without_tensorrt_no_plan_is_built(
    options: GpuOptions, subject: Subject, tmp_path: Path, fake_gpu: Gpu, share: Share, monkeypatch
) -> None:
    jobs = Jobs(monkeypatch)
    bench = gpu_bench(options, subject, tmp_path, fake_gpu, ORT_CUDA)
    bench.engine("int8", share)
    bench.drift("int8", share)
    assert [name for name, _ in jobs.asked] == ["export", "export", "drift"]
    assert jobs.asked[-1][1]["backend"] == "onnxruntime:cuda"
    with pytest.raises(BackendUnavailableError, match="tensorrt was not looked for"):
        bench.enter(tensorrt("int8"), share)


def test_nothing_is_exported_for_nobody(
    options: GpuOptions, subject: Subject, tmp_path: Path, fake_gpu: Gpu, share: Share, monkeypatch
) -> None:
    jobs = Jobs(monkeypatch)
    bench = gpu_bench(options, subject, tmp_path, fake_gpu)
    for step in (bench.engine, bench.drift):
        with pytest.raises(BackendUnavailableError, match="nothing here runs an engine on the GPU"):
            step("fp16", share)
    assert jobs.asked == []


def test_memory_is_what_the_driver_says_more(
    options: GpuOptions,
    subject: Subject,
    tmp_path: Path,
    fake_gpu: Gpu,
    share: Share,
    enter: Callable[..., Step],
    fakes,
    monkeypatch,
) -> None:
    # As much at the start, and again when every case was answered.
    used = iter([5_000, 5_000 + 700])
    monkeypatch.setattr(Gpu, "used_bytes", lambda self: next(used))
    scale = replace(amounts.FULL, shapes=amounts.REHEARSAL.shapes)
    monkeypatch.setattr(amounts, "FULL", scale)
    with gpu_bench(options, subject, tmp_path, fake_gpu) as bench:
        assert bench.take(enter("a"), share)["device_memory_bytes"] == 700
        state = bench.turns(share)["gpu_after"]
        assert state == {"sm_mhz": 1000, "memory_mhz": 2000, "temperature_c": 45, "power_w": 61.5}
