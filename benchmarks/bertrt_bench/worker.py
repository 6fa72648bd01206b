"""The process of one contestant: ``python -m bertrt_bench.worker``, driven by `bertrt_bench.process`."""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

from bertrt_bench import protocol
from bertrt_bench.cases import Case, Question
from bertrt_bench.contestants import Answer, Contestant, Run, Setup, load_factory

# A turn ends here whatever was asked for: its times must fit into one line of the protocol.
_MOST_RUNS: Final = 500_000

# Seconds over which the process must have used less than this share of one processor to be at rest, and the
# longest wait for it.
_REST_WINDOW: Final = 0.01
_REST_SHARE: Final = 0.1
_LONGEST_REST: Final = 1.0


def time_runs(run: Callable[[], object], *, warmup: int, runs: int, seconds: float) -> list[int]:
    """Time a function again and again.

    Args:
        run: the function. What it returns is dropped within the time measured, as a caller would drop it.
        warmup: calls before the first one that is timed.
        runs: timed calls at least.
        seconds: go on until this much time has passed.

    Returns:
        Nanoseconds of each timed call, in order.
    """
    clock = time.perf_counter_ns
    for _ in range(warmup):
        run()
    times: list[int] = []
    gc.collect()
    # The collector would strike single runs at random.
    gc.disable()
    try:
        end = clock() + int(seconds * 1e9)
        while (len(times) < runs or clock() < end) and len(times) < _MOST_RUNS:
            start = clock()
            run()
            times.append(clock() - start)
    finally:
        gc.enable()
    return times


def come_to_rest() -> bool:
    """Wait until the threads of this process are idle; false if they would not be.

    Thread pools spin for a while when their work is done (those of ONNX Runtime and OpenMP for tens of
    milliseconds, Intel's OpenMP for 200), which would take processors from the contestant whose turn comes
    next. A pool that never rests is waited for no longer than `_LONGEST_REST`.
    """
    end = time.monotonic() + _LONGEST_REST
    while time.monotonic() < end:
        before = time.process_time()
        time.sleep(_REST_WINDOW)
        if time.process_time() - before < _REST_SHARE * _REST_WINDOW:
            return True
    return False


class Worker:
    """Answers the requests that `bertrt_bench.protocol` lists."""

    def __init__(self) -> None:
        self._contestant: Contestant | None = None
        self._runs: dict[int, Run] = {}
        # Processor time and the clock when a turn was over.
        self._at_rest: tuple[float, float] | None = None

    def handle(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Do what is asked and return the answer's fields."""
        operation = request["op"]
        if operation == "time":
            return self._time(request)
        # Processor time between two turns is the contestant's idling only if nothing else was asked
        # meanwhile.
        self._at_rest = None
        if operation == "open":
            self._contestant = load_factory(request["factory"])(Setup(**request["setup"]))
            return {"versions": dict(self._contestant.versions), **_told_by(self._contestant)}
        if self._contestant is None:
            raise RuntimeError(f"{operation!r} before 'open'")
        if operation == "prepare":
            question = Question.load(Path(request["folder"]), Case.from_json(request["case"]))
            self._runs[request["index"]] = self._contestant.prepare(question)
            return {**_told_by(self._contestant), "rested": come_to_rest()}
        if operation == "peak":
            # Not every contestant knows one.
            peak = getattr(self._contestant, "peak", lambda: None)()
            return {"operations_per_second": peak, "rested": come_to_rest()}
        if operation == "answer":
            answer: Answer = self._runs[request["index"]]()
            rested = come_to_rest()
            names = protocol.save_arrays(Path(request["folder"]), answer, rows=request["rows"])
            return {"arrays": names, "rested": rested}
        raise ValueError(f"unknown operation {operation!r}")

    def _time(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        idle = None
        if self._at_rest is not None:
            cpu, clock = self._at_rest
            idle = {"cpu_seconds": time.process_time() - cpu, "seconds": time.monotonic() - clock}
        nanoseconds = time_runs(
            self._runs[request["index"]],
            warmup=request["warmup"],
            runs=request["runs"],
            seconds=request["seconds"],
        )
        rested = come_to_rest()
        self._at_rest = time.process_time(), time.monotonic()
        return {"nanoseconds": nanoseconds, "idle": idle, "rested": rested}


def _told_by(contestant: Contestant) -> dict[str, Any]:
    return {"details": dict(contestant.details), "threads": contestant.threads}


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    worker = Worker()
    for line in requests:
        try:
            answer = worker.handle(protocol.decode(line))
        except Exception as error:  # whatever a contestant raises is an answer too
            traceback.print_exc()
            answer = {"error": str(error) or type(error).__name__}
        answers.write(protocol.encode(answer))
        answers.flush()


def main() -> int:
    """Serve on standard input and output; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with answers:
        serve(sys.stdin.buffer, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
