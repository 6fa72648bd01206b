"""Processes of ours: waited for, told of, and ended with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bertrt_bench.child import Child, last_words, obituary

PATIENCE = 60.0


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Child]:
    """A function that starts a module of this code."""

    def make(code: str, **options: object) -> Child:
        (tmp_path / "program.py").write_text(code, encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return Child("program", environment=environment, errors=tmp_path / "errors", **options)

    return make


def pid_of(child: Child) -> int:
    """What it writes on standard output."""
    return int(child.stdout.readline())


SLEEPER = "import os, signal, subprocess\nprint(subprocess.Popen(['sleep', '600']).pid, flush=True)\n"


@pytest.mark.parametrize(
    ("ending", "code"), [("os._exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", -9), ("", 0)]
)
def test_what_one_that_has_ended_left_running_is_ended(
    start, alive: Callable[[int], bool], gone: Callable[[int], None], ending: str, code: int
) -> None:
    with start(SLEEPER + ending, stdout=subprocess.PIPE) as child:
        sleeper = pid_of(child)
        assert child.wait(PATIENCE) == code
        # As often as one likes, and without an end too.
        assert (child.wait(0), child.join()) == (code, code)
        assert alive(sleeper)
    gone(sleeper)
    child.end()
    assert child.wait(0) == code


def test_one_that_runs_is_ended_with_what_it_started(start, gone: Callable[[int], None]) -> None:
    with start(SLEEPER + "signal.pause()", stdout=subprocess.PIPE) as child:
        sleeper = pid_of(child)
        assert child.wait(0.01) is None
    gone(sleeper)
    assert child.wait(0) == -signal.SIGKILL


def test_one_that_is_asked_to_end(start) -> None:
    polite = (
        "import signal, sys\nsignal.signal(15, lambda *_: sys.exit(4))\nprint(1, flush=True)\nsignal.pause()"
    )
    with start(polite, stdout=subprocess.PIPE) as child:
        assert pid_of(child) == 1
        child.ask_to_end(PATIENCE)
        assert child.wait(0) == 4
        # It is no more.
        child.ask_to_end(PATIENCE)


def test_what_it_wrote(start) -> None:
    with start("import sys\nprint('out')\nsys.exit('first\\nlast words ')") as child:
        assert child.join() == 1
        assert child.tail().splitlines() == ["out", "first", "last words"]
        assert child.obituary(1) == "ended with exit code 1 (its last line: last words)"


def test_a_pipe_that_is_not_there(start) -> None:
    with (
        start("") as child,
        pytest.raises(ValueError, match="without this pipe; start it with subprocess.PIPE"),
    ):
        child.stdin.write(b"")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (None, "closed its output without ending"),
        (0, "ended with exit code 0"),
        (-11, "was ended by SIGSEGV"),
        (-9, "was ended by SIGKILL; the machine may have run out of memory"),
        (-99, "was ended by signal 99"),
    ],
)
def test_how_one_ended(code: int | None, text: str) -> None:
    assert obituary(code) == text


def test_one_that_wrote_nothing_has_no_last_words() -> None:
    assert (last_words("\n "), last_words(" a\nb \n")) == ("", " (its last line: b)")
