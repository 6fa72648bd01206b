"""A run from its command to its records."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bertrt.backends.native import instruction_sets
from bertrt_bench.contestants import RIVALS
from bertrt_bench.cpu import __main__ as command
from bertrt_bench.cpu import run as module
from bertrt_bench.cpu.abilities import Abilities
from bertrt_bench.cpu.children import Ended, run_bertrt
from bertrt_bench.cpu.options import CpuOptions
from bertrt_bench.cpu.plan import planned
from bertrt_bench.cpu.run import run

pytest.importorskip("bertrt._native", reason="the native kernels are not built")

# More than any step here takes.
PATIENCE = 300.0


def quiet(_line: str) -> None:
    pass


@pytest.fixture(autouse=True)
def looked(monkeypatch: pytest.MonkeyPatch) -> Abilities:
    """This processor without rivals, whose import takes seconds."""
    for name in ("BERTRT_ISA", "BERTRT_PIN_THREADS"):
        monkeypatch.delenv(name, raising=False)
    found = Abilities(sets=instruction_sets(), rivals=dict.fromkeys(RIVALS, "not in this test"))
    monkeypatch.setattr(module, "look", lambda: found)
    return found


@pytest.fixture
def answers(
    monkeypatch: pytest.MonkeyPatch,
    abilities: Callable[..., Abilities],
    bench_value: Callable[..., dict[str, Any]],
    drift_value: Callable[..., dict[str, Any]],
) -> dict[str, Ended | BaseException]:
    """No command is run; each has an answer by its first argument, or by its instruction set."""
    found: dict[str, Ended | BaseException] = {
        "export": Ended(code=0, answer=b"", errors=""),
        "bench": Ended(code=0, answer=json.dumps(bench_value()).encode(), errors=""),
        "drift": Ended(code=0, answer=json.dumps(drift_value()).encode(), errors=""),
    }

    def answer(arguments: Sequence[str], *, folder: Path, isa: str | None = None) -> Ended:
        ended = found.get(isa or "", found[arguments[0]])
        if isinstance(ended, BaseException):
            raise ended
        return ended

    monkeypatch.setattr(module, "run_bertrt", answer)
    monkeypatch.setattr(module, "look", abilities)
    return found


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "records"
    arguments = ["--out", str(out), "--model", "demo", "--threads", "1", "--seconds", "0.05"]
    assert command.main([*arguments, "--only", "int8-text"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["cpu.md", "int8-text.json"]
    value = json.loads((out / "int8-text.json").read_text(encoding="utf-8"))
    assert value["format"] == "bertrt-bench"
    assert [case["task"] for case in value["cases"]] == ["features", "fill-mask-text"]
    assert (value["settings"]["threads"], value["settings"]["seconds"]) == (1, 0.05)
    assert value["engine"]["precision"] == "int8"
    assert value["contestants"][0]["details"]["backend"] == "native"
    text = (out / "cpu.md").read_text(encoding="utf-8")
    for word in (
        "**A trial with the demo model**: no bar of speed applies to it.",
        "`python -m bertrt_bench.cpu --out DIR --model demo --threads 1 --seconds 0.05 --only int8-text`",
        "$ bertrt export demo demo-int8 --precision int8 --backend native",
        "`bertrt bench demo-int8 --threads 1 --batch 1 --sequence 128 --task features,fill-mask-text "
        "--seconds 0.05 --json -`",
        "| int8-text | features, 1x128 |",
        "times as long as the same text's features",
        "| for bert-base-cased |",
        "- int8-lengths: left out by --only",
    ):
        assert word in text
    assert "**Not finished**" not in text
    assert str(tmp_path) not in text
    # A record is kept.
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert command.main(["--out", str(out), "--model", "demo", "--only", "avx2"]) == 2
    assert "is there already, and is kept; name another folder with --out" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_another_instruction_set(tmp_path: Path, looked: Abilities) -> None:
    if looked.isa_problem("avx2") or looked.best == "avx2":
        pytest.skip("this processor has not both avx2 and a better one")
    options = CpuOptions(out=tmp_path / "out", model="demo", threads=1, seconds=0.05, only=("int8-avx2",))
    steps = [step for step in planned(options, looked, lengths="") if step.kind == "bench"]
    record = run(options, steps=[step for step in steps if step.name == "int8-avx2"], say=quiet)
    value = json.loads((tmp_path / "out" / "int8-avx2.json").read_text(encoding="utf-8"))
    assert value["contestants"][0]["details"]["instruction_set"] == "avx2"
    assert record.done("int8-avx2").step.command.startswith("BERTRT_ISA=avx2 bertrt bench demo-int8 ")
    text = (tmp_path / "out" / "cpu.md").read_text(encoding="utf-8")
    assert "- int8-avx2, without torch: not in this test" in text


def test_a_command_that_fails_ends_its_step_alone(
    tmp_path: Path, looked: Abilities, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = CpuOptions(out=tmp_path, model="demo", threads=1, seconds=0.05)
    text = next(step for step in planned(options, looked, lengths="") if step.name == "int8-text")
    small = (*("--threads", "1", "--sequence", "8", "--repeats", "1"), "--batch")
    steps = [
        replace(text, name="none", options=(*small, "0")),
        replace(text, name="nowhere", engine=replace(text.engine, model="abacus")),
        replace(text, name="nowhere-again", engine=replace(text.engine, model="abacus")),
        replace(text, name="one", options=(*small, "1")),
    ]
    monkeypatch.setattr(module, "planned", lambda *_, **__: steps)
    assert command.main(["--out", str(tmp_path / "out"), "--model", "demo"]) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cpu.md", "one.json"]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bertrt: failed: ")]
    assert lines[0] == (
        "bertrt: failed: none: ended with exit code 2: bertrt: error: batch must be a whole number of at least 1, got 0"
    )
    assert [line.split(": ")[2] for line in lines] == ["none", "nowhere", "nowhere-again"]
    assert (
        "abacus-int8 cannot be exported: ended with exit code 2: bertrt: error: there are no random weights"
        in lines[1]
    )
    text = (tmp_path / "out" / "cpu.md").read_text(encoding="utf-8")
    assert text.index("**Failed:**") < text.index("- none: ended with exit code 2") < text.index("## Speed")


def test_an_answer_is_kept_as_it_is(tmp_path: Path, answers: dict[str, Any]) -> None:
    bench = b' {"an order": 1, "of": [ 1.50 ],\n' + answers["bench"].answer[1:]
    answers["bench"] = replace(answers["bench"], answer=bench)
    record = run(CpuOptions(out=tmp_path / "out", threads=1, only=("int8-text",)), say=quiet)
    assert (tmp_path / "out" / "int8-text.json").read_bytes() == bench
    assert record.state == "done"


@pytest.mark.parametrize("answer", [b"", b"[]", b'{"format": "abacus"}', b"{"])
def test_what_is_no_record_is_not_kept(tmp_path: Path, answers: dict[str, Any], answer: bytes) -> None:
    answers["bench"] = Ended(code=0, answer=answer, errors="a warning")
    record = run(CpuOptions(out=tmp_path / "out", threads=1, only=("int8-text",)), say=quiet)
    assert record.taken[0].reason == "its answer is no record; ended with exit code 0: a warning"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cpu.md"]


def test_drift_over_its_budgets_is_kept_and_fails(
    tmp_path: Path, answers: dict[str, Any], drift_value: Callable[..., dict[str, Any]], capsys
) -> None:
    over = "top1_agreement is 96.00 %; the budget is at least 97.00 %"
    answers["avx2"] = Ended(code=1, answer=json.dumps(drift_value(0.96, over)).encode(), errors="")
    out = tmp_path / "out"
    assert command.main(["--out", str(out), "--only", "drift-int8"]) == 1
    assert (out / "drift-int8-avx2.json").read_bytes() == answers["avx2"].answer
    assert (out / "drift-int8-amx.json").is_file()
    assert f"failed: drift-int8-avx2: {over}" in capsys.readouterr().err
    text = (out / "cpu.md").read_text(encoding="utf-8")
    assert f"| drift of int8 with avx2 | within its budgets | top-1 96.00 % | missed ({over}) |" in text
    assert "**96.00 %** over budget" in text
    # The same exit code of a benchmark says that answers disagree, and nothing was timed.
    answers["bench"] = Ended(code=1, answer=b"", errors="check failed")
    assert command.main(["--out", str(tmp_path / "other"), "--only", "int8-text"]) == 1
    assert "failed: int8-text: ended with exit code 1: check failed" in capsys.readouterr().err


def test_a_bar_that_was_missed_fails(
    tmp_path: Path, answers: dict[str, Any], bench_value: Callable[..., dict[str, Any]], capsys
) -> None:
    value = bench_value(None, speedups={"openvino": 2.4, "onnxruntime": 3.0})
    answers["bench"] = Ended(code=0, answer=json.dumps(value).encode(), errors="")
    assert command.main(["--out", str(tmp_path / "out"), "--only", "lengths"]) == 1
    failed = "int8, features at real lengths, against openvino: missed (2.40x), must be at least 2.5x"
    assert f"failed: {failed}" in capsys.readouterr().err
    text = (tmp_path / "out" / "cpu.md").read_text(encoding="utf-8")
    assert f"- {failed}" in text
    assert (
        "| int8-lengths | features, a mix of 308 | amx | 2.00 | - | 2.00 (2.40) | 2.00 (3.00) | - |" in text
    )
    assert "308 paragraphs of 6 to 512 tokens, together 44,870" in text


def test_an_interruption_keeps_what_was_measured(tmp_path: Path, answers: dict[str, Any], capsys) -> None:
    answers["avx2"] = KeyboardInterrupt()
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--only", "int8-text,int8-avx2,drift-bf16-avx2"]
    assert command.main(arguments) == 128 + signal.SIGINT
    assert "interrupted; the records hold what was measured" in capsys.readouterr().err
    names = ["cpu.md", "int8-avx2-vnni.json", "int8-text.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    text = (out / "cpu.md").read_text(encoding="utf-8")
    assert "**Not finished**: the run is interrupted" in text
    assert "| int8-text | features, 1x128 | amx |" in text
    assert "- drift-bf16-avx2: the run ended before it" in text


def test_the_summary_is_there_while_the_run_goes_on(tmp_path: Path, answers: dict[str, Any]) -> None:
    seen = []

    def look(_line: str) -> None:
        text = (tmp_path / "out" / "cpu.md").read_text(encoding="utf-8")
        seen.append(("the run is running" in text, "| int8-text |" in text))

    run(CpuOptions(out=tmp_path / "out", threads=1, only=("int8-text", "bf16")), say=look)
    assert seen[:2] == [(True, False), (True, True)]


def test_variables_that_change_the_figures_are_told(
    tmp_path: Path, answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BERTRT_PIN_THREADS", "1")
    monkeypatch.setenv("BERTRT_CACHE", str(tmp_path))
    run(CpuOptions(out=tmp_path / "out", threads=1, only=("int8-text",)), say=quiet)
    text = (tmp_path / "out" / "cpu.md").read_text(encoding="utf-8")
    assert "- environment: `BERTRT_PIN_THREADS=1`" in text
    assert str(tmp_path) not in text


def processes_of(folder: Path) -> list[str]:
    """The processes that were told to keep their temporary files below a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TMPDIR={folder}".encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


def wait_for(condition: Callable[[], object]) -> None:
    patience = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < patience
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="there is no /proc")
def test_a_polite_request_to_end_keeps_the_records_and_ends_every_process(tmp_path: Path) -> None:
    out, temporary = tmp_path / "out", tmp_path / "tmp"
    temporary.mkdir()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "bertrt_bench.cpu", "--out", str(out), "--model", "demo"),
            *("--only", "int8-text", "--seconds", "600"),
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    # The command and its contestant, which keeps its files in the benchmark's folder.
    wait_for(
        lambda: process.poll() is not None or list(temporary.glob("bertrt-cpu-*/bertrt-bench-*/question-1"))
    )
    assert process.poll() is None, process.stderr.read()
    assert len(processes_of(temporary)) >= 3
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM
    wait_for(lambda: not processes_of(temporary))
    assert list(temporary.glob("bertrt-*")) == []
    assert "**Not finished**: the run is interrupted" in (out / "cpu.md").read_text(encoding="utf-8")


def test_the_last_lines_of_a_command(tmp_path: Path) -> None:
    ended = run_bertrt(["bench", str(tmp_path / "absent")], folder=tmp_path)
    assert (ended.code, ended.answer) == (2, b"")
    assert ended.obituary.startswith("ended with exit code 2: bertrt: error: ")
    assert Ended(code=-9, answer=b"", errors="").obituary.startswith("was ended by SIGKILL")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "99999"], "threads is 99999, but this process may use"),
        (["--seconds", "0"], "seconds must be a positive number"),
        (["--only", "abacus"], "no step's name holds abacus"),
        (["--only", "text,"], "--only has an empty word"),
        (["--lengths-from", "absent"], "--lengths-from 'absent' is no file"),
        (["--lengths-from", os.devnull], "is no file; name a text in UTF-8"),
        (["--lengths-from", sys.executable], "is not UTF-8"),
    ],
)
def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert command.main(["--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m bertrt_bench.cpu: error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert command.main(["--out", str(tmp_path / "file" / "out"), "--only", "int8-text"]) == 2
    assert "cannot make the folder" in capsys.readouterr().err
