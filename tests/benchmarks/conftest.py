"""Contestants that the tests make up, and the logs of their runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from bertrt_bench.contestants import ContestantKind


@dataclass(frozen=True)
class Event:
    """A line of the fakes' log: who did what, in which process and when (monotonic nanoseconds)."""

    name: str
    what: str
    pid: int
    at: int


class Fakes:
    """Makes kinds of fake contestants, and reads what they logged."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def kind(self, name: str, **options: object) -> ContestantKind:
        return ContestantKind(
            name=name, description=f"fake {name}", factory=f"bench_fakes:open_{name}", **options
        )

    def events(self) -> list[Event]:
        if not self._log.exists():
            return []
        lines = [line.split() for line in self._log.read_text(encoding="utf-8").splitlines()]
        return [Event(name, what, int(pid), int(at)) for name, what, pid, at in lines]

    def pids(self) -> set[int]:
        return {event.pid for event in self.events()}


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """The fakes, importable by worker processes."""
    places = [str(Path(__file__).parent / "fakes"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))
    log = tmp_path / "fakes.log"
    monkeypatch.setenv("BENCH_FAKES_LOG", str(log))
    return Fakes(log)


@pytest.fixture
def alive() -> Callable[[int], bool]:
    """A function that says whether a process is there, a zombie included."""

    def check(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True

    return check


@pytest.fixture
def gone() -> Callable[[int], None]:
    """A function that waits until a process that is no child of ours has ended.

    Whoever collects orphans here may leave it a zombie; and it takes a moment to die.
    """

    def lives(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    def wait(pid: int) -> None:
        patience = time.monotonic() + 60
        while lives(pid):
            assert time.monotonic() < patience, f"process {pid} lives on"
            time.sleep(0.01)

    return wait
