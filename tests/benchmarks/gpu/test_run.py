"""A run from its command to its record: on a CPU as far as there is no GPU, and with a driver that is made up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bertrt.errors import InputError
from bertrt_bench.gpu import __main__ as command
from bertrt_bench.gpu import run as module
from bertrt_bench.gpu.clock import Clock
from bertrt_bench.gpu.device import Gpu
from bertrt_bench.gpu.lineup import Step, compiled, rehearsal_steps, sdpa, tensorrt
from bertrt_bench.gpu.options import GpuOptions
from bertrt_bench.gpu.record import command_of
from bertrt_bench.gpu.run import run
from bertrt_bench.gpu.tables import render

TURNS = Step(kind="turns", name="turns 1", seconds=20)
# More than any step here takes.
PATIENCE = 300.0


def quiet(_line: str) -> None:
    pass


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked for, which would import PyTorch and takes seconds; the fakes need nothing."""
    monkeypatch.setattr(module, "run_job", lambda name, request, **_: {"version": "1", "problem": None})


def read(folder: Path, stem: str = "rehearsal") -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
    # The table is made of the record alone, whatever kept it.
    assert (folder / f"{stem}.md").read_text(encoding="utf-8") == render(value)
    return value


def test_a_rehearsal_measures_everything_that_a_cpu_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "record"
    # But for what is compiled, which takes a minute.
    words = ["sdpa", "eager", "engine fp32", "onnxruntime-cpu-fp32", "drift fp32"]
    assert (
        command.main(["--out", str(out), "--device", "cpu", "--minutes", "60", "--only", ",".join(words)])
        == 0
    )
    record = read(out)
    assert record["rehearsal"] is True
    assert record["measurement"] == "rehearsal on a CPU: nothing here was measured on a GPU"
    assert (record["state"], record["failed"], record["gpu"]) == ("done", [], None)
    assert [step["name"] for step in record["steps"]] == [
        step.name for step in rehearsal_steps() if "int8" not in step.name and "compile" not in step.name
    ]
    assert {step["outcome"] for step in record["steps"]} == {"done"}
    for case in record["cases"]:
        assert set(case["contestants"]) == {
            "torch-sdpa-fp32",
            "torch-eager-fp32",
            "bertrt-onnxruntime-cpu-fp32",
        }
        for name, found in case["contestants"].items():
            assert found["timings"]["runs"] >= 2
            assert found["timings"]["p50_ms"] > 0
            assert found["rounds"] == [1, 2]
            if name == "torch-sdpa-fp32":
                assert found["agreement"] == {"reference": name}
                assert found["faster"] == {"median": 1.0, "low": 1.0, "high": 1.0}
            else:
                # float32 rounds to 6e-8; sums over 256 and 1,024 numbers in four layers stay below a hundred times
                # that.
                assert found["agreement"]["error"] <= 1e-5
                assert found["faster"]["low"] <= found["faster"]["high"]
    drift = next(step for step in record["steps"] if step["kind"] == "drift")["found"]
    assert drift["violations"] == []
    assert drift["figures"]["top1_agreement"] == 1.0
    assert drift["reference"] == "transformers in float32 on the CPU"
    text = render(record)
    for word in (
        "# Rehearsal on a CPU",
        "**Nothing here was measured on a GPU.**",
        "## features, a mix of 8",
        "## Drift",
        "fp32: demo, onnxruntime:cpu, against transformers in float32 on the CPU; within its budgets",
    ):
        assert word in text
    assert "wrote" in capsys.readouterr().err
    # A record is kept.
    assert command.main(["--out", str(out), "--device", "cpu"]) == 2
    assert "is there already, and is kept; name another folder with --out" in capsys.readouterr().err
    assert read(out) == record


@pytest.mark.gpu
def test_a_run_on_a_gpu(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--checkpoint", "demo", "--minutes", "10", "--only", "torch-sdpa"]
    assert command.main(arguments) == 0
    record = read(tmp_path, "gpu")
    assert (record["rehearsal"], record["state"], record["failed"]) == (False, "done", [])
    contestants = [
        step for step in record["steps"] if step["outcome"] == "done" and step["kind"] == "contestant"
    ]
    assert {"torch-sdpa-fp32", "torch-sdpa-fp16"} <= {step["name"] for step in contestants}
    # Each has a context of its own at least.
    assert all(step["found"]["device_memory_bytes"] > 1 << 20 for step in contestants)
    assert all(case["contestants"]["torch-sdpa-fp16"]["timings"] for case in record["cases"])


def test_without_a_gpu_it_says_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bertrt_bench.gpu", "--out", str(tmp_path / "record")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        # Where there is a GPU it is not used for hours by a test.
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("python -m bertrt_bench.gpu: error: ")
    assert "no GPU here" in done.stderr or "hides every GPU" in done.stderr
    assert not (tmp_path / "record").exists()


@pytest.fixture
def fake_steps(enter: Callable[..., Step]) -> list[Step]:
    """One that answers, one that answers otherwise, one whose library is not here."""
    return [enter("a"), enter("b"), enter("wrong"), enter("c", needs=("abacus",)), TURNS]


@pytest.mark.usefixtures("probed")
def test_what_fails_or_is_missing_is_named_and_the_rest_is_measured(
    tmp_path: Path, fakes, fake_steps: list[Step], alive: Callable[[int], bool]
) -> None:
    record = run(GpuOptions(out=tmp_path / "out", device="cpu"), gpu=None, steps=fake_steps, say=quiet)
    value = read(tmp_path / "out")
    outcomes = {step["name"]: (step["outcome"], step["reason"]) for step in value["steps"]}
    assert [outcome for outcome, _ in outcomes.values()] == ["done", "done", "failed", "skipped", "done"]
    assert "wrong and a disagree on features at 1x16" in outcomes["wrong"][1]
    assert outcomes["c"][1] == "abacus was not looked for"
    assert value["failed"] == record.failed == [f"wrong: {outcomes['wrong'][1]}"]
    assert {name for case in value["cases"] for name in case["contestants"]} == {"a", "b"}
    text = (tmp_path / "out" / "rehearsal.md").read_text(encoding="utf-8")
    assert "- c skipped: abacus was not looked for" in text
    assert text.index("**Failed:**") < text.index("## features, 1x16")
    assert not any(map(alive, fakes.pids()))


def test_a_library_that_breaks_is_its_own_problem(
    tmp_path: Path, fakes, enter: Callable[..., Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that crashes when it is imported, in the process that looks for it."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(modules), os.environ["PYTHONPATH"]]))
    steps = [enter("a"), enter("b", needs=("torch",)), TURNS]
    record = run(GpuOptions(out=tmp_path / "out", device="cpu"), gpu=None, steps=steps, say=quiet)
    assert [step.outcome for step in record.steps] == ["done", "skipped", "done"]
    reason = "torch cannot be used: probe left no result: it was ended by SIGSEGV"
    assert record.steps[1].reason.startswith(reason)
    libraries = read(tmp_path / "out")["libraries"]
    assert {name: bool(found["problem"]) for name, found in libraries["libraries"].items()} == {
        "onnx": False,
        "onnxruntime": False,
        "torch": True,
    }
    assert libraries["torch"] == {}


@pytest.mark.usefixtures("probed")
def test_a_defect_ends_its_step_alone(
    tmp_path: Path, fakes, enter: Callable[..., Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = module.Bench

    class Defective(bench):
        def take(self, step: Step, share: object) -> dict[str, Any]:
            if step.name == "b":
                raise ZeroDivisionError("by zero")
            return super().take(step, share)

    monkeypatch.setattr(module, "Bench", Defective)
    steps = [enter("a"), enter("b"), TURNS]
    record = run(GpuOptions(out=tmp_path / "out", device="cpu"), gpu=None, steps=steps, say=quiet)
    assert record.failed == ["b: ZeroDivisionError: by zero"]
    assert [step["outcome"] for step in read(tmp_path / "out")["steps"]] == ["done", "failed", "done"]


@pytest.mark.usefixtures("probed")
def test_steps_for_which_no_time_is_left_are_named(tmp_path: Path, fakes, enter: Callable[..., Step]) -> None:
    now = [0.0]

    def jump(line: str) -> None:
        """To the time at which the step of a line begins."""
        now[0] = {"a": 0, "b": 90, "c": 180, "turns 1": 180}.get(line.partition("s  ")[2], now[0])

    steps = [enter("a"), enter("b"), enter("c"), TURNS]
    options = GpuOptions(out=tmp_path / "out", device="cpu")
    clock = Clock(seconds=190, now=lambda: now[0])
    record = run(options, gpu=None, steps=steps, clock=clock, say=jump)
    assert [(step.step.name, step.outcome) for step in record.steps] == [
        ("a", "done"),
        ("b", "done"),
        ("c", "skipped"),
        ("turns 1", "done"),
    ]
    # The turns' time was kept for them.
    reason = record.steps[2].reason
    assert reason == "no time is left for it: 10 s until the end, of which 20 are for the last turns"
    assert record.failed == []


def test_too_few_minutes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"0\.01 minutes are too few to begin"):
        run(GpuOptions(out=tmp_path, device="cpu", minutes=0.01), gpu=None, say=quiet)


def test_no_step_of_that_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no step's name holds abacus or bead"):
        run(GpuOptions(out=tmp_path / "out", device="cpu", only=("abacus", "bead")), gpu=None, say=quiet)
    assert not (tmp_path / "out").exists()


def test_the_record_of_a_gpu(
    tmp_path: Path, fakes, fake_gpu: Gpu, enter: Callable[..., Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a record says of a GPU; the driver is made up, and what takes part computes nothing."""
    # 8.9 has fp8; but there is nothing to run it.
    steps = [enter("a"), Step(kind="engine", name="engine fp8", seconds=60, precision="fp8")]
    steps += [Step(kind="contestant", name="plan", seconds=60, contender=tensorrt("fp8")), TURNS]
    options = GpuOptions(out=tmp_path / "out", checkpoint="demo", minutes=30)

    def find(_name: str, request: dict[str, str], **_: object) -> dict[str, str | None]:
        here = request["library"] in {"onnx", "onnxruntime", "torch"}
        return {"version": "1" if here else None, "problem": None if here else "it is on holiday"}

    monkeypatch.setattr(module, "run_job", find)
    run(options, gpu=fake_gpu, steps=steps, say=quiet)
    value = read(tmp_path / "out", "gpu")
    assert (value["rehearsal"], value["measurement"]) == (False, "measured on a GPU")
    assert value["gpu"] == fake_gpu.facts.to_json()
    assert value["steps"][0]["found"]["device_memory_bytes"] == 0
    assert [(step["outcome"], step["reason"]) for step in value["steps"]][1:3] == [
        ("skipped", "nothing here runs an engine on the GPU: it is on holiday; it is on holiday"),
        ("skipped", "it is on holiday"),
    ]
    state = {"sm_mhz": 1000, "memory_mhz": 2000, "temperature_c": 45, "power_w": 61.5}
    assert value["steps"][-1]["found"]["gpu_before"] == state
    text = render(value)
    for word in (
        "# GPU run: NVIDIA Abacus",
        "compute capability 8.9, 24.0 GB (5.0 GB in use before the run), at most 72 W; driver 580.01, CUDA up to 13.1",
        "1000 MHz, 2000 MHz memory, 45 °C, 62 W",
        "## features, 32x384",
    ):
        assert word in text
    assert "Nothing here was measured" not in text


def test_workers_see_the_gpu_that_was_chosen(
    tmp_path: Path, fakes, nvml: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def look(options: GpuOptions, *, gpu: Gpu) -> object:
        seen.update({name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")})
        raise InputError("enough")

    monkeypatch.setattr(command, "Gpu", lambda: Gpu(nvml))
    monkeypatch.setattr(command, "run", look)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-0123,GPU-9999")
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    assert command.main(["--out", str(tmp_path)]) == 2
    assert seen == {"CUDA_VISIBLE_DEVICES": "GPU-0123", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-0123,GPU-9999"
    assert "CUDA_DEVICE_ORDER" not in os.environ


@pytest.mark.usefixtures("probed")
def test_an_interruption_keeps_what_was_measured(
    tmp_path: Path, fakes, enter: Callable[..., Step], alive: Callable[[int], bool]
) -> None:
    def interrupt(line: str) -> None:
        if line.endswith(" b"):
            raise KeyboardInterrupt

    steps = [enter("a"), TURNS, enter("b")]
    with pytest.raises(KeyboardInterrupt):
        run(GpuOptions(out=tmp_path / "out", device="cpu"), gpu=None, steps=steps, say=interrupt)
    value = read(tmp_path / "out")
    assert value["state"] == "interrupted"
    assert [step["name"] for step in value["steps"]] == ["a", "turns 1"]
    assert value["cases"][0]["contestants"]["a"]["timings"]["runs"] >= 2
    assert "**Not finished**: the run is interrupted" in render(value)
    assert fakes.pids()
    assert not any(map(alive, fakes.pids()))


@pytest.mark.usefixtures("probed")
def test_the_record_is_there_while_the_run_goes_on(tmp_path: Path, fakes, enter: Callable[..., Step]) -> None:
    states = []

    def look(_line: str) -> None:
        value = read(tmp_path / "out")
        states.append((value["state"], [step["name"] for step in value["steps"]]))

    run(GpuOptions(out=tmp_path / "out", device="cpu"), gpu=None, steps=[enter("a"), TURNS], say=look)
    assert states == [("running", []), ("running", ["a"])]
    assert read(tmp_path / "out")["state"] == "done"


def test_a_polite_request_to_end_keeps_the_record(tmp_path: Path) -> None:
    out = tmp_path / "record"
    process = subprocess.Popen(
        [sys.executable, "-m", "bertrt_bench.gpu", "--out", str(out), "--device", "cpu", "--only", "eager"],
        stderr=subprocess.PIPE,
        text=True,
    )
    patience = time.monotonic() + PATIENCE
    while not (out / "rehearsal.json").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < patience
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM
    assert read(out)["state"] == "interrupted"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "-1"], "minutes must be a number above 0"),
        (["--lengths-from", "absent"], "--lengths-from 'absent' is no file"),
        (["--checkpoint", "./absent"], "there is no checkpoint folder './absent'"),
    ],
)
def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert command.main(["--out", str(tmp_path / "out"), "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert command.main(["--out", str(tmp_path / "file" / "out"), "--device", "cpu"]) == 2
    assert "cannot make the folder" in capsys.readouterr().err


@pytest.mark.usefixtures("probed")
def test_the_exit_code_of_a_failure(
    tmp_path: Path, fakes, fake_steps: list[Step], capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setattr(module, "rehearsal_steps", lambda: fake_steps)
    assert command.main(["--out", str(tmp_path), "--device", "cpu"]) == 1
    assert "failed: wrong: no case is left to wrong" in capsys.readouterr().err


def test_a_command_tells_nothing_of_the_machine(tmp_path: Path) -> None:
    text = tmp_path / "prose.txt"
    text.touch()
    options = GpuOptions(
        out=tmp_path,
        device="cpu",
        checkpoint=str(tmp_path),
        text=text,
        lengths_from=text,
        only=("torch",),
        seed=3,
    )
    assert command_of(options) == (
        f"python -m bertrt_bench.gpu --out DIR --device cpu --minutes 9.5 --checkpoint {tmp_path.name} "
        "--text prose.txt --lengths-from prose.txt --only torch --seed 3"
    )
    assert command_of(GpuOptions(out=tmp_path, checkpoint="owner/model")).endswith("--checkpoint owner/model")


def test_contestants_of_a_rehearsal_compute_on_the_cpu() -> None:
    steps = [step.contender for step in rehearsal_steps() if step.contender]
    assert {contender.backend for contender in steps} == {"cpu", "onnxruntime:cpu"}
    assert (sdpa("fp16", "cuda").needs, compiled("fp16", "cuda").needs) == (("torch",), ("torch", "triton"))
