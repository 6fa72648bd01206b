"""Worker processes: what they are given, and that each way of failing is told and leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bertrt.errors import MeasurementError
from bertrt_bench import protocol
from bertrt_bench.cases import Case, SpecialIds, make_question
from bertrt_bench.contestants import ContestantKind, Setup
from bertrt_bench.patience import StepTimeout
from bertrt_bench.process import ContestantProcess, Idle

CASE = Case(task="features", batch=2, sequence=6)
# Much longer than any step here takes; a test that meets it has failed.
PATIENCE = 120.0


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., ContestantProcess]:
    def make(kind: ContestantKind, timeout: float = PATIENCE) -> ContestantProcess:
        folder = tmp_path / kind.name
        folder.mkdir()
        setup = Setup(engine="none", threads=2)
        return ContestantProcess(kind, setup, folder, patience=StepTimeout(timeout))

    return make


@pytest.fixture
def question(tmp_path: Path) -> Path:
    folder = tmp_path / "question"
    folder.mkdir()
    special = SpecialIds(cls=0, sep=1, pad=2, mask=3, unk=4)
    make_question(CASE, special=special, vocab_size=100).save(folder)
    return folder


def test_a_contestant_answers_and_is_timed(fakes, start, question: Path, alive) -> None:
    with start(fakes.kind("a")) as process:
        (pid,) = fakes.pids()
        assert alive(pid)
        assert process.usable
        assert process.versions == {"fake": "1.0"}
        assert process.details == {"omp": "2", "setup_threads": "2"}
        assert process.threads == 2
        process.prepare(0, CASE, question)
        answer = process.answer(0, CASE, rows=5)
        assert answer["hidden_states"].shape == (5, 256)
        times = process.time(0, CASE, warmup=2, runs=7, seconds=0.0)
        assert len(times) == 7
        assert min(times) > 0
        # Nobody else has had a turn.
        assert (process.idle, process.restless) == (None, 0)
        # One run for the answer, two to warm up, seven timed.
        assert sum(event.what.startswith("run") for event in fakes.events()) == 10
    assert not process.usable
    assert not alive(pid)


def test_a_turn_by_time_ends(fakes, start, question: Path) -> None:
    with start(fakes.kind("a")) as process:
        process.prepare(0, CASE, question)
        times = process.time(0, CASE, warmup=0, runs=1, seconds=0.3)
        # A run writes a line into a log.
        assert len(times) > 1
        assert sum(times) <= 0.3e9 + max(times)


def test_idle_time_is_added_up_and_unrest_counted(
    fakes, start, question: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = iter(
        [
            {"idle": None, "rested": True},
            {"idle": {"cpu_seconds": 0.25, "seconds": 2.0}, "rested": False},
            {"idle": {"cpu_seconds": -1e-9, "seconds": 1.0}, "rested": False},
        ]
    )
    with start(fakes.kind("a")) as process:
        process.prepare(0, CASE, question)
        decode = protocol.decode
        monkeypatch.setattr(protocol, "decode", lambda line: {**decode(line), **next(reports)})
        found = []
        for _ in range(3):
            process.time(0, CASE, warmup=0, runs=1, seconds=0.0)
            found.append((process.idle, process.restless))
    assert found == [
        (None, 0),
        (Idle(cpu_seconds=0.25, seconds=2.0), 1),
        (Idle(cpu_seconds=0.25, seconds=3.0), 2),
    ]


def test_two_contestants_give_the_same_answer(fakes, start, question: Path) -> None:
    with start(fakes.kind("a")) as first, start(fakes.kind("b")) as second:
        assert len(fakes.pids()) == 2
        answers = []
        for process in (first, second):
            process.prepare(0, CASE, question)
            answers.append(process.answer(0, CASE, rows=100)["hidden_states"])
    np.testing.assert_array_equal(answers[0], answers[1])


def test_what_libraries_print_is_no_answer(fakes, start, question: Path) -> None:
    with start(fakes.kind("chatty")) as process:
        process.prepare(0, CASE, question)
        assert process.answer(0, CASE, rows=100)["hidden_states"].shape == (12, 256)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dies", r"timing features at 2x6, ended with exit code 7 \(its last line: last words of a fake\)"),
        ("killed", "timing features at 2x6, was ended by SIGKILL; the machine may have run out of memory"),
        ("raises", "timing features at 2x6, failed: out of paper"),
        ("garbles", "a worker wrote a line that is not JSON: b'no JSON'"),
    ],
)
def test_a_contestant_that_fails_is_told_and_reaped(
    fakes, start, question: Path, alive, name: str, message: str
) -> None:
    with pytest.raises(MeasurementError, match=message) as caught, start(fakes.kind(name)) as process:
        process.prepare(0, CASE, question)
        process.answer(0, CASE, rows=100)
        process.time(0, CASE, warmup=0, runs=1, seconds=0)
    assert "\n" not in str(caught.value)
    (pid,) = fakes.pids()
    assert not alive(pid)


def test_what_a_dead_contestant_left_running_ends_with_it(
    fakes, start, question: Path, gone: Callable[[int], None]
) -> None:
    with (
        pytest.raises(MeasurementError, match="was ended by SIGKILL"),
        start(fakes.kind("orphans")) as process,
    ):
        process.prepare(0, CASE, question)
        process.answer(0, CASE, rows=100)
        process.time(0, CASE, warmup=0, runs=1, seconds=0)
    (orphan,) = [event.pid for event in fakes.events() if event.name == "orphan"]
    gone(orphan)


@pytest.mark.parametrize(
    ("name", "message", "usable"),
    [
        ("raises", "failed: out of paper", True),
        ("dies", "ended with exit code 7", False),
        ("garbles", "not JSON", False),
        ("late", "gave no answer within 1 s", False),
    ],
)
def test_who_can_be_asked_after_an_error(
    fakes, start, question: Path, name: str, message: str, usable: bool
) -> None:
    with start(fakes.kind(name)) as process:
        process.prepare(0, CASE, question)
        process.answer(0, CASE, rows=100)
        if name == "late":
            process.patience = StepTimeout(1.0)
        with pytest.raises(MeasurementError, match=message):
            process.time(0, CASE, warmup=0, runs=1, seconds=0)
        assert process.usable is usable
        process.patience = StepTimeout(PATIENCE)
        if usable:
            process.prepare(1, CASE, question)
        else:
            # An answer that comes late would be taken for this one's.
            with pytest.raises(MeasurementError, match="cannot be asked any more .* start it anew"):
                process.prepare(1, CASE, question)
        process.abandon()
        assert not process.usable


def test_the_end_of_standard_error_goes_with_the_error(fakes, start, question: Path) -> None:
    with pytest.raises(MeasurementError) as caught, start(fakes.kind("dies")) as process:
        process.prepare(0, CASE, question)
        process.answer(0, CASE, rows=100)
        process.time(0, CASE, warmup=0, runs=1, seconds=0)
    assert caught.value.__notes__ == ["standard error of dies:\nfirst words\nlast words of a fake"]


def test_a_contestant_that_hangs_is_ended(fakes, start, alive) -> None:
    kind = ContestantKind(name="hangs", description="", factory="bench_fakes:hangs_at_the_start")
    with pytest.raises(
        MeasurementError, match=r"hangs: its process, starting, gave no answer within 2 s; .*--timeout"
    ):
        start(kind, timeout=2.0).__enter__()
    for pid in fakes.pids():
        assert not alive(pid)


def test_a_contestant_that_is_none(fakes, start) -> None:
    for factory, message in (
        ("bench_fakes:absent", "there is no contestant 'bench_fakes:absent'"),
        ("bench_fakes:no_function", "expected 'module:function'"),
        ("bench_no_such_module:open", "No module named 'bench_no_such_module'"),
    ):
        kind = ContestantKind(name=factory.replace(":", "-"), description="", factory=factory)
        with pytest.raises(MeasurementError, match=message):
            start(kind).__enter__()


def test_an_ended_contestant_cannot_be_asked(fakes, start, question: Path) -> None:
    with start(fakes.kind("a")) as process:
        pass
    with pytest.raises(MeasurementError, match="has ended"):
        process.prepare(0, CASE, question)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_an_interruption_ends_the_worker(fakes, start, alive, interruption: type[BaseException]) -> None:
    with pytest.raises(interruption), start(fakes.kind("a")):
        (pid,) = fakes.pids()
        raise interruption
    assert not alive(pid)


def test_a_worker_without_a_parent_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "bertrt_bench.worker"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_requests_that_make_no_sense_are_answered() -> None:
    requests = b'{"op": "time", "index": 3}\n{"op": "prepare"}\n{}\nno JSON\n'
    done = subprocess.run(
        [sys.executable, "-P", "-m", "bertrt_bench.worker"],
        input=requests,
        capture_output=True,
        timeout=PATIENCE,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert len(lines) == 4
    assert all(line.startswith(b'{"error":') for line in lines)


def test_a_worker_is_not_led_astray_by_the_current_folder(
    fakes, start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONINSPECT", "1")
    with start(fakes.kind("a")) as process:
        assert process.versions
    assert Path.cwd() == Path(os.path.realpath(tmp_path))
