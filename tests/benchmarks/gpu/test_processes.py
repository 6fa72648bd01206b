"""Contestants and jobs end with the time of their step, and say what went wrong."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bertrt.errors import MeasurementError
from bertrt_bench.cases import Case, SpecialIds, make_question
from bertrt_bench.contestants import Setup
from bertrt_bench.gpu import jobs
from bertrt_bench.gpu.clock import Clock, Share
from bertrt_bench.gpu.processes import run_job
from bertrt_bench.process import ContestantProcess
from bertrt_bench.protocol import LineReader

CASE = Case(task="features", batch=2, sequence=6)
LOOK = {"library": "onnx", "device": "cpu"}


@pytest.fixture
def question(tmp_path: Path) -> Path:
    folder = tmp_path / "question"
    folder.mkdir()
    make_question(CASE, special=SpecialIds(cls=0, sep=1, pad=2, mask=3, unk=4), vocab_size=100).save(folder)
    return folder


def ending() -> Share:
    """A share that has some moments left."""
    clock = Clock(seconds=100)
    return replace(clock.share(50), end=clock.spent + 0.2)


def entrant(fakes, name: str, folder: Path, share: Share) -> ContestantProcess:
    return ContestantProcess(fakes.kind(name), Setup(engine="none", threads=1), folder, patience=share)


def test_a_request_ends_with_the_share(fakes, tmp_path: Path, alive: Callable[[int], bool]) -> None:
    process = entrant(fakes, "hangs", tmp_path, ending())
    process.kind = replace(process.kind, factory="bench_fakes:hangs_at_the_start")
    with pytest.raises(
        MeasurementError,
        match="hangs: its process, starting, gave no answer within 0 s; its step may take no longer",
    ):
        process.__enter__()
    assert not process.usable
    assert not any(map(alive, fakes.pids()))


def test_an_error_that_it_reports_leaves_it_usable(
    fakes, tmp_path: Path, question: Path, share: Share, alive: Callable[[int], bool]
) -> None:
    with entrant(fakes, "raises", tmp_path, share) as process:
        process.prepare(0, CASE, question)
        process.answer(0, CASE, rows=10)
        with pytest.raises(MeasurementError, match="raises: its process, timing .*, failed: out of paper"):
            process.time(0, CASE, warmup=0, runs=1, seconds=0.0)
        assert process.usable
        process.abandon()
        assert not process.usable
        assert not any(map(alive, fakes.pids()))
        process.abandon()


def test_one_that_died_is_not(fakes, tmp_path: Path, question: Path, share: Share) -> None:
    with entrant(fakes, "dies", tmp_path, share) as process:
        process.prepare(0, CASE, question)
        process.answer(0, CASE, rows=10)
        with pytest.raises(MeasurementError, match="exit code 7"):
            process.time(0, CASE, warmup=0, runs=1, seconds=0.0)
        assert not process.usable


def test_time_that_is_measured_is_within_the_share(
    fakes, tmp_path: Path, question: Path, share: Share
) -> None:
    with entrant(fakes, "a", tmp_path, share) as process:
        process.prepare(0, CASE, question)
        process.patience = ending()
        with pytest.raises(
            MeasurementError, match="timing .* gave no answer within 0 s; its step may take no longer"
        ):
            process.time(0, CASE, warmup=0, runs=1, seconds=3.0)
        assert not process.usable
        process.abandon()


def test_an_error_that_comes_when_the_time_is_over_is_told_as_it_is(
    fakes, tmp_path: Path, question: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, read = [0.0], LineReader.read

    def late(self: LineReader, seconds: float) -> bytes:
        line = read(self, seconds)
        now[0] += 60
        return line

    share = Clock(seconds=1000, now=lambda: now[0]).share(500)
    with entrant(fakes, "raises", tmp_path, share) as process:
        process.prepare(0, CASE, question)
        process.answer(0, CASE, rows=10)
        process.patience = replace(share, end=30.0)
        monkeypatch.setattr(LineReader, "read", late)
        with pytest.raises(MeasurementError, match="timing .* failed: out of paper"):
            process.time(0, CASE, warmup=0, runs=1, seconds=0.0)
        assert process.usable


def test_a_job_answers(tmp_path: Path, share: Share) -> None:
    found = run_job("probe", LOOK, folder=tmp_path, threads=1, share=share)
    assert found["problem"] is None
    assert found["version"]


def test_a_job_that_fails(tmp_path: Path, share: Share) -> None:
    request = {"checkpoint": str(tmp_path / "absent"), "random": False, "precision": "fp32", "out": "none"}
    with pytest.raises(MeasurementError, match="export failed: there is no checkpoint folder .*absent"):
        run_job("export", request, folder=tmp_path, threads=1, share=share)


def test_a_defect_of_a_job_is_told_by_its_kind(tmp_path: Path, share: Share) -> None:
    with pytest.raises(MeasurementError, match="probe failed: KeyError: 'library'"):
        run_job("probe", {}, folder=tmp_path, threads=1, share=share)


@pytest.fixture
def broken_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that puts code where jobs find ``onnx``; its last line is run when the job imports it."""

    def make(code: str) -> None:
        (tmp_path / "modules").mkdir()
        (tmp_path / "modules" / "onnx.py").write_text(code, encoding="utf-8")
        places = [str(tmp_path / "modules"), *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))

    return make


def test_a_job_that_dies(tmp_path: Path, share: Share, broken_job: Callable[[str], None]) -> None:
    broken_job("import os, sys\nprint('last words', file=sys.stderr, flush=True)\nos._exit(3)\n")
    with pytest.raises(
        MeasurementError,
        match=r"probe left no result: it ended with exit code 3 \(its last line: last words\)",
    ):
        run_job("probe", LOOK, folder=tmp_path, threads=1, share=share)


def test_a_job_that_dies_leaves_nothing_running(
    tmp_path: Path, share: Share, broken_job: Callable[[str], None], gone: Callable[[int], None]
) -> None:
    log = tmp_path / "pid"
    broken_job(
        "import os, pathlib, signal, subprocess\nchild = subprocess.Popen(['sleep', '600'])\n"
        f"pathlib.Path({str(log)!r}).write_text(str(child.pid))\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with pytest.raises(MeasurementError, match="probe left no result: it was ended by SIGKILL"):
        run_job("probe", LOOK, folder=tmp_path, threads=1, share=share)
    gone(int(log.read_text()))


def test_a_job_that_is_late_is_ended_with_all_that_it_started(
    tmp_path: Path, broken_job: Callable[[str], None], gone: Callable[[int], None]
) -> None:
    log = tmp_path / "pids"
    broken_job(
        "import os, pathlib, time\nchild = os.fork()\n"
        f"with pathlib.Path({str(log)!r}).open('a') as file:\n    file.write(f'{{os.getpid()}}\\n')\n"
        "time.sleep(600)\n"
    )
    clock = Clock(seconds=100)
    share = replace(clock.share(50), end=clock.spent + 3)
    with pytest.raises(MeasurementError, match="probe was not done after 3 s; its step may take no longer"):
        run_job("probe", LOOK, folder=tmp_path, threads=1, share=share)
    pids = [int(line) for line in log.read_text().split()]
    assert len(pids) == 2
    for pid in pids:
        gone(pid)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"other": 1}'])
def test_what_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: Share, text: str) -> None:
    # The interpreter that would run the job writes this instead.
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nprintf '%s' '{text}' >\"$7\"\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(MeasurementError, match="probe left no result: it ended with exit code 0"):
        run_job("probe", {}, folder=tmp_path, threads=1, share=share)


def test_a_result_that_json_cannot_carry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["jobs", "odd", str(place)])
    monkeypatch.setattr(sys, "stdin", (tmp_path / "request").open("w+"))
    sys.stdin.write("{}")
    sys.stdin.seek(0)
    monkeypatch.setattr(jobs, "JOBS", {"odd": lambda request: {"value": float("nan")}})
    with sys.stdin:
        assert jobs.main() == 1
    assert json.loads(place.read_text())["error"].startswith("ValueError: Out of range float")
