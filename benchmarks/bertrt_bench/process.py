"""A contestant in a process of its own: started, asked, and always reaped."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bertrt.errors import MeasurementError
from bertrt_bench import protocol
from bertrt_bench.cases import Case
from bertrt_bench.child import Child
from bertrt_bench.contestants import Answer, ContestantKind, Setup
from bertrt_bench.environment import worker_environment
from bertrt_bench.patience import Patience

# How long a worker that was told to end may take to do so.
_GRACE_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle:
    """What a contestant did while it was another's turn.

    Attributes:
        cpu_seconds: processor time that its threads used.
        seconds: how long that was.
    """

    cpu_seconds: float
    seconds: float


class ContestantProcess:
    """Starts a worker for a contestant; the process ends with the ``with`` block, however that ends.

    Attributes:
        kind: see below.
        versions: of the packages that do its work.
        details: what else decides its speed.
        threads: that its library says it runs with; ``None`` until that is known.
        idle: what it did in others' turns so far; ``None`` while none was measured.
        restless: turns after which its threads did not come to rest.
        patience: how long each request may take; may be changed between two of them.
        usable: whether it can be asked: false before its start, after its end, and once anything went wrong but an
            error that the worker itself reported. One that did not answer in time may do so at any moment, and its
            answer would be taken for that to the next question.

    Args:
        kind: who takes part.
        setup: what it is told.
        folder: a private folder for its answers and its standard error; must exist.
        patience: see above.
    """

    def __init__(self, kind: ContestantKind, setup: Setup, folder: Path, *, patience: Patience) -> None:
        self.kind = kind
        self.versions: Mapping[str, str] = {}
        self.details: Mapping[str, str] = {}
        self.threads: int | None = None
        self.idle: Idle | None = None
        self.restless = 0
        self.patience = patience
        self.usable = False
        self._setup = setup
        self._folder = folder
        self._child: Child | None = None
        self._reader: protocol.LineReader | None = None

    def __enter__(self) -> ContestantProcess:
        try:
            self._start()
            opened = self._ask(
                "starting", {"op": "open", "factory": self.kind.factory, "setup": self._setup.to_json()}
            )
            self.versions = _strings(opened.get("versions"))
            self._take_note(opened)
        except BaseException:
            self.abandon()
            raise
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is None:
            self._let_end()
        self.abandon()

    def abandon(self) -> None:
        """End its process now, with whatever that started; does nothing if that was done before."""
        self.usable = False
        child, self._child, self._reader = self._child, None, None
        if child is not None:
            child.end()

    def prepare(self, index: int, case: Case, folder: Path) -> None:
        """Have the question in ``folder`` (see `Question.save`) prepared under a number."""
        prepared = self._ask(
            f"preparing {case}",
            {"op": "prepare", "index": index, "case": case.to_json(), "folder": str(folder)},
        )
        self._take_note(prepared)

    def answer(self, index: int, case: Case, *, rows: int) -> Answer:
        """Run the prepared case once and return ``rows`` rows of its answer; see `protocol.sample_rows`."""
        folder = self._folder / f"answer-{index}"
        folder.mkdir(exist_ok=True)
        answer = self._ask(
            f"answering {case}", {"op": "answer", "index": index, "folder": str(folder), "rows": rows}
        )
        return protocol.load_arrays(folder, answer.get("arrays"))

    def time(self, index: int, case: Case, *, warmup: int, runs: int, seconds: float) -> list[int]:
        """Time the prepared case, and come to rest after it.

        Args:
            index: of the prepared case.
            case: what it is.
            warmup: runs before the first timed one.
            runs: timed runs at least.
            seconds: go on until this much time has passed.

        Returns:
            Nanoseconds of each timed run.
        """
        request = {"op": "time", "index": index, "warmup": warmup, "runs": runs, "seconds": seconds}
        answer = self._ask(f"timing {case}", request, measured=seconds)
        times, idle = answer.get("nanoseconds"), answer.get("idle")
        if not isinstance(times, list) or not all(type(value) is int for value in times):
            raise MeasurementError(f"{self.kind.name}: its worker reported no list of whole nanoseconds")
        if idle is not None:
            before = self.idle or Idle(cpu_seconds=0.0, seconds=0.0)
            self.idle = Idle(
                cpu_seconds=before.cpu_seconds + max(0.0, idle["cpu_seconds"]),
                seconds=before.seconds + idle["seconds"],
            )
        self.restless += answer.get("rested") is False
        return times

    def peak(self) -> float | None:
        """Operations per second that one core reaches at best, measured now, if the contestant can tell."""
        found = self._ask("measuring its peak", {"op": "peak"}).get("operations_per_second")
        if found is not None and not isinstance(found, int | float):
            raise MeasurementError(f"{self.kind.name}: its worker reported no peak")
        return found

    def _take_note(self, told: Mapping[str, Any]) -> None:
        """Keep what the worker tells of its contestant."""
        threads = told.get("threads")
        if threads is not None and type(threads) is not int:
            raise MeasurementError(f"{self.kind.name}: its worker reported no number of threads")
        self.details, self.threads = _strings(told.get("details")), threads

    def _start(self) -> None:
        child = self._child = Child(
            "bertrt_bench.worker",
            environment=worker_environment(os.environ, self._setup.threads, self._folder),
            errors=self._folder / "stderr.txt",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._reader = protocol.LineReader(child.stdout.fileno())
        self.usable = True

    def _ask(self, doing: str, request: Mapping[str, Any], *, measured: float = 0.0) -> dict[str, Any]:
        child, reader = self._child, self._reader
        if child is None or reader is None or not self.usable:
            raise MeasurementError(
                f"{self.kind.name}: its worker process has ended, or cannot be asked any more after what went wrong "
                "before; start it anew"
            )
        # Until there is an answer to this very request.
        self.usable = False
        seconds = self.patience.seconds(measured)
        try:
            child.stdin.write(protocol.encode(request))
            child.stdin.flush()
            answer = protocol.decode(reader.read(seconds))
        except TimeoutError:
            problem = f"gave no answer within {seconds:.0f} s; {self.patience.advice}"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            # An error that the worker reports itself says it all; one that it died of may be on its standard error
            # only.
            problem = child.obituary(child.wait(_GRACE_SECONDS))
        else:
            self.usable = True
            if "error" not in answer:
                return answer
            problem = f"failed: {answer['error']}"
        error = MeasurementError(f"{self.kind.name}: its process, {doing}, {problem}")
        if tail := child.tail():
            error.add_note(f"standard error of {self.kind.name}:\n{tail}")
        raise error

    def _let_end(self) -> None:
        """Close the worker's input, at which it ends, and give it a moment."""
        if self._child is not None:
            with contextlib.suppress(OSError):
                self._child.stdin.close()
            self._child.wait(_GRACE_SECONDS)


def _strings(value: object) -> dict[str, str]:
    return {str(name): str(text) for name, text in value.items()} if isinstance(value, dict) else {}
