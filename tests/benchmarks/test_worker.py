"""What a worker measures, on a clock that the tests drive."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bertrt_bench import worker as module
from bertrt_bench.cases import Case, SpecialIds, make_question
from bertrt_bench.worker import Worker, come_to_rest, time_runs

CASE = Case(task="features", batch=1, sequence=4)


class Machine:
    """Stands for `time`: the clock goes on when something runs or sleeps; other threads spin until ``spins_until``."""

    def __init__(self) -> None:
        self.now = 100.0
        self.cpu = 0.0
        self.spins_until = 0.0

    def run(self, seconds: float) -> None:
        self.now += seconds
        self.cpu += seconds

    def sleep(self, seconds: float) -> None:
        self.cpu += max(0.0, min(seconds, self.spins_until - self.now))
        self.now += seconds

    def monotonic(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.cpu

    def perf_counter_ns(self) -> int:
        return round(self.now * 1e9)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    monkeypatch.setattr(module, "time", found)
    return found


@pytest.mark.parametrize(
    ("runs", "seconds", "timed"), [(1, 0.1, 10), (3, 0.0, 3), (20, 0.1, 20), (1, 0.095, 10), (1, 0.0, 1)]
)
def test_runs_go_on_until_there_are_enough_and_the_time_is_over(
    machine: Machine, runs: int, seconds: float, timed: int
) -> None:
    calls: list[None] = []

    def run() -> None:
        calls.append(None)
        machine.run(0.01)

    assert time_runs(run, warmup=2, runs=runs, seconds=seconds) == [10_000_000] * timed
    assert len(calls) == 2 + timed


def test_a_turn_has_an_end_whatever_was_asked_for(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_RUNS", 5)
    assert len(time_runs(lambda: machine.run(1e-6), warmup=0, runs=1, seconds=60.0)) == 5


def test_nothing_is_collected_meanwhile(machine: Machine) -> None:
    seen = []
    time_runs(lambda: seen.append(gc.isenabled()), warmup=1, runs=2, seconds=0.0)
    # Not while it warms up, which is not timed.
    assert seen == [True, False, False]
    assert gc.isenabled()

    def fail() -> None:
        raise RuntimeError("out of paper")

    with pytest.raises(RuntimeError):
        time_runs(fail, warmup=0, runs=1, seconds=0.0)
    assert gc.isenabled()


@pytest.mark.parametrize("spins", [0.0, 0.2, 0.9])
def test_threads_that_spin_are_waited_for(machine: Machine, spins: float) -> None:
    start = machine.now
    machine.spins_until = start + spins
    assert come_to_rest()
    assert spins < machine.now - start < spins + 0.03


def test_threads_that_never_rest_are_not_waited_for_for_ever(machine: Machine) -> None:
    start = machine.now
    machine.spins_until = float("inf")
    assert not come_to_rest()
    assert machine.now - start == pytest.approx(1.0, abs=0.02)


@pytest.fixture
def worker(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Worker:
    """One whose contestant has prepared a case; a run takes 10 ms."""

    def run() -> dict[str, np.ndarray]:
        machine.run(0.01)
        return {"hidden_states": np.zeros((4, 2), np.float32)}

    contestant = SimpleNamespace(versions={}, details={}, threads=2, prepare=lambda question: run)
    monkeypatch.setattr(module, "load_factory", lambda name: lambda setup: contestant)
    question = make_question(CASE, special=SpecialIds(cls=0, sep=1, pad=2, mask=3, unk=4), vocab_size=9)
    question.save(tmp_path)
    found = Worker()
    told = found.handle({"op": "open", "factory": "any", "setup": {"engine": "", "threads": 2}})
    assert told == {"versions": {}, "details": {}, "threads": 2}
    prepared = {"op": "prepare", "index": 0, "case": CASE.to_json(), "folder": str(tmp_path)}
    assert found.handle(prepared) == {"details": {}, "threads": 2, "rested": True}
    return found


TURN = {"op": "time", "index": 0, "warmup": 0, "runs": 2, "seconds": 0.0}


def test_the_idle_time_is_that_of_others_turns(worker: Worker, machine: Machine, tmp_path: Path) -> None:
    # Before the first turn it was asked other things.
    assert worker.handle(TURN) == {"nanoseconds": [10_000_000] * 2, "idle": None, "rested": True}
    machine.spins_until = machine.now + 0.5
    machine.sleep(4.0)
    idle = worker.handle(TURN)["idle"]
    assert (idle["cpu_seconds"], idle["seconds"]) == pytest.approx((0.5, 4.0))
    assert worker.handle(TURN)["idle"] == pytest.approx({"cpu_seconds": 0.0, "seconds": 0.0})
    # An answer is no idling.
    answered = worker.handle({"op": "answer", "index": 0, "folder": str(tmp_path), "rows": 9})
    assert answered == {"arrays": ["hidden_states"], "rested": True}
    assert worker.handle(TURN)["idle"] is None


@pytest.mark.parametrize("ask", [lambda: TURN, lambda: {"op": "peak"}], ids=["time", "peak"])
def test_a_worker_that_does_not_come_to_rest_says_so(
    worker: Worker, machine: Machine, ask: Callable[[], dict]
) -> None:
    machine.spins_until = float("inf")
    assert worker.handle(ask())["rested"] is False
