"""Turns with CUDA: many run, or one captures.

What a thread must not do while another holds the gate shows in the order in which they came through.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from bertrt.backends.onnxruntime.captures import CaptureGate


class Visitor:
    """A thread that goes through a gate, notes it, and stays until it is told to leave."""

    def __init__(self, name: str, log: list[str], way: Callable[[], AbstractContextManager[Any]]) -> None:
        self.inside, self.leave = threading.Event(), threading.Event()
        self.granted: object = None

        def visit() -> None:
            with way() as self.granted:
                log.append(name)
                self.inside.set()
                assert self.leave.wait(60)
                log.append(f"{name} left")

        self._thread = threading.Thread(target=visit)
        self._thread.start()

    def came(self) -> Visitor:
        assert self.inside.wait(60)
        return self

    def left(self) -> None:
        self.leave.set()
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture
def gate() -> CaptureGate:
    return CaptureGate()


@pytest.fixture
def log() -> list[str]:
    return []


def until_waiting(gate: CaptureGate) -> None:
    """Until a thread waits to capture."""
    for _ in range(60_000):
        with gate._changed:
            if gate._waiting:
                return
        time.sleep(0.001)
    pytest.fail("nobody waits")


def test_many_run_at_once(gate: CaptureGate, log: list[str]) -> None:
    visitors = [Visitor(str(index), log, gate.running).came() for index in range(3)]
    assert {visitor.granted for visitor in visitors} == {False}
    for visitor in visitors:
        visitor.left()


def test_a_capture_waits_for_all_runs_and_all_others_for_it(gate: CaptureGate, log: list[str]) -> None:
    first, second = Visitor("first", log, gate.running).came(), Visitor("second", log, gate.running).came()
    capture = Visitor("capture", log, lambda: gate.running(capture=True))
    until_waiting(gate)
    # Comes later, and goes later: or there would always be one more.
    late = Visitor("late", log, gate.running)
    first.left()
    second.left()
    capture.came()
    assert capture.granted is True
    load = Visitor("load", log, gate.loading)
    assert not late.inside.wait(0.05)
    assert not load.inside.wait(0.05)
    capture.left()
    late.came().left()
    load.came().left()
    assert log.index("capture") == 4
    assert set(log[:4]) == {"first", "second", "first left", "second left"}
    assert log[5] == "capture left"


def test_captures_are_one_at_a_time(gate: CaptureGate, log: list[str]) -> None:
    one = Visitor("one", log, lambda: gate.running(capture=True)).came()
    other = Visitor("other", log, lambda: gate.running(capture=True))
    until_waiting(gate)
    one.left()
    other.came().left()
    assert one.granted is other.granted is True
    assert log == ["one", "one left", "other", "other left"]


def test_no_capture_while_something_is_loaded(gate: CaptureGate, log: list[str]) -> None:
    """That can take minutes: the run goes on without, beside others."""
    run, load = Visitor("run", log, gate.running).came(), Visitor("load", log, gate.loading).came()
    capture = Visitor("capture", log, lambda: gate.running(capture=True)).came()
    assert capture.granted is False
    for visitor in (capture, run, load):
        visitor.left()
    with gate.running(capture=True) as alone:
        assert alone


def test_what_begins_to_load_ends_a_wait(gate: CaptureGate, log: list[str]) -> None:
    run = Visitor("run", log, gate.running).came()
    capture = Visitor("capture", log, lambda: gate.running(capture=True))
    until_waiting(gate)
    load = Visitor("load", log, gate.loading).came()
    assert capture.came().granted is False
    for visitor in (capture, run, load):
        visitor.left()


@pytest.mark.parametrize("way", ["run", "capture", "load"])
def test_an_error_opens_the_gate_again(way: str, gate: CaptureGate) -> None:
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "run": gate.running,
        "capture": lambda: gate.running(capture=True),
        "load": gate.loading,
    }
    with pytest.raises(RuntimeError, match="broken"), ways[way]():
        raise RuntimeError("broken")
    with gate.running(capture=True) as alone:
        assert alone
