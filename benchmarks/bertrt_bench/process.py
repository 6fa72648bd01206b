"""A contestant in a process of its own: started, asked, and always reaped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final

from bertrt.errors import MeasurementError
from bertrt_bench import protocol
from bertrt_bench.cases import Case
from bertrt_bench.contestants import Answer, ContestantKind, Setup

# How long a worker that was told to end may take to do so.
_GRACE_SECONDS: Final = 5.0
# How much of a dead worker's standard error is kept.
_TAIL_BYTES: Final = 4096

# Each of these sizes the thread pool of some numeric library.
_THREAD_VARIABLES: Final = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "RAYON_NUM_THREADS",
)
# Where Python finds its modules. All other PYTHON* variables change how the interpreter starts, ends or
# reports.
_PYTHON_VARIABLES: Final = frozenset(
    {
        "PYTHONPATH",
        "PYTHONHOME",
        "PYTHONPLATLIBDIR",
        "PYTHONNOUSERSITE",
        "PYTHONUSERBASE",
        "PYTHONPYCACHEPREFIX",
        "PYTHONDONTWRITEBYTECODE",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a contestant measured in one turn.

    Attributes:
        nanoseconds: of each timed run.
        idle_cpu_seconds: processor time that its threads used while it was another's turn, since its last.
    """

    nanoseconds: list[int]
    idle_cpu_seconds: float


def worker_environment(base: Mapping[str, str], threads: int, scratch: Path) -> dict[str, str]:
    """The environment of a worker.

    As many threads everywhere, no network, an undisturbed interpreter, and temporary files of libraries in a
    folder that is removed with the benchmark's.
    """
    environment = {
        name: value
        for name, value in base.items()
        if not name.startswith("PYTHON") or name in _PYTHON_VARIABLES
    }
    environment.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    environment.update(
        TMPDIR=str(scratch),
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        TRANSFORMERS_VERBOSITY="error",
    )
    return environment


class ContestantProcess:
    """Starts a worker for a contestant; the process ends with the ``with`` block, however that ends.

    Attributes:
        kind: see below.
        versions: of the packages that do its work.
        details: what else decides its speed.
        threads: that its library says it runs with; ``None`` until that is known.
        idle_cpu_seconds: processor time that it used while it was another's turn.

    Args:
        kind: who takes part.
        setup: what it is told.
        folder: a private folder for its answers and its standard error; must exist.
        timeout: seconds that any one step may take, beyond the time that it is asked to measure.
    """

    def __init__(self, kind: ContestantKind, setup: Setup, folder: Path, *, timeout: float) -> None:
        self.kind = kind
        self.versions: Mapping[str, str] = {}
        self.details: Mapping[str, str] = {}
        self.threads: int | None = None
        self.idle_cpu_seconds = 0.0
        self._setup = setup
        self._folder = folder
        self._timeout = timeout
        self._errors = folder / "stderr.txt"
        self._process: subprocess.Popen[bytes] | None = None
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
            self._kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._end()
        self._kill()

    @property
    def pid(self) -> int | None:
        """The worker's process id, ``None`` before the start and after the end."""
        return None if self._process is None else self._process.pid

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

    def time(self, index: int, case: Case, *, warmup: int, runs: int, seconds: float) -> Turn:
        """Time the prepared case, and come to rest after it.

        Args:
            index: of the prepared case.
            case: what it is.
            warmup: runs before the first timed one.
            runs: timed runs at least.
            seconds: go on until this much time has passed.
        """
        request = {"op": "time", "index": index, "warmup": warmup, "runs": runs, "seconds": seconds}
        answer = self._ask(f"timing {case}", request, extra_seconds=seconds)
        times, idle = answer.get("nanoseconds"), answer.get("idle_cpu_seconds")
        if not isinstance(times, list) or not all(type(value) is int for value in times):
            raise MeasurementError(f"{self.kind.name}: its worker reported no list of whole nanoseconds")
        if not isinstance(idle, int | float):
            raise MeasurementError(f"{self.kind.name}: its worker reported no idle time")
        self.idle_cpu_seconds += max(0.0, idle)
        return Turn(nanoseconds=times, idle_cpu_seconds=float(idle))

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
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                # -P: what lies in the current folder must not stand in for a module.
                [sys.executable, "-P", "-X", "utf8", "-m", "bertrt_bench.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=worker_environment(os.environ, self._setup.threads, self._folder),
                # Ctrl-C at the terminal reaches the parent alone, which then ends its workers.
                start_new_session=True,
            )
        self._reader = protocol.LineReader(_pipe(self._process.stdout).fileno())

    def _ask(self, doing: str, request: Mapping[str, Any], *, extra_seconds: float = 0.0) -> dict[str, Any]:
        process, reader = self._process, self._reader
        if process is None or reader is None:
            raise MeasurementError(f"{self.kind.name}: its worker process has ended")
        limit = self._timeout + extra_seconds
        try:
            stdin = _pipe(process.stdin)
            stdin.write(protocol.encode(request))
            stdin.flush()
            answer = protocol.decode(reader.read(limit))
        except TimeoutError:
            problem = f"gave no answer within {limit:.0f} s; measure smaller shapes or raise --timeout"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            problem = _obituary(self._reap())
            # An error that the worker reports itself says it all; one that it died of may be here only.
            if lines := self._tail().splitlines():
                problem += f" (its last line: {lines[-1]})"
        else:
            if "error" not in answer:
                return answer
            raise self._failure(doing, f"failed: {answer['error']}")
        raise self._failure(doing, problem)

    def _failure(self, doing: str, problem: str) -> MeasurementError:
        error = MeasurementError(f"{self.kind.name}: its process, {doing}, {problem}")
        if tail := self._tail():
            error.add_note(f"standard error of {self.kind.name}:\n{tail}")
        return error

    def _tail(self) -> str:
        with self._errors.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            return file.read().decode("utf-8", "backslashreplace").strip()

    def _end(self) -> None:
        """Close the worker's input, at which it ends, and give it a moment."""
        if self._process is None:
            return
        with contextlib.suppress(OSError):
            _pipe(self._process.stdin).close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_SECONDS)

    def _reap(self) -> int | None:
        """The exit code of a worker that closed its output; ``None`` if it lives on."""
        if self._process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(_GRACE_SECONDS)
        return None

    def _kill(self) -> None:
        """End the worker and whatever it started, and collect it."""
        process, self._process, self._reader = self._process, None, None
        if process is None:
            return
        # The worker leads a group of its own. Once it has been collected its number may belong to another.
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                _pipe(pipe).close()


def _obituary(code: int | None) -> str:
    if code is None:
        return "closed its output without ending"
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            memory = "; the machine may have run out of memory" if name == "SIGKILL" else ""
            return f"was ended by {name}{memory}"
    return f"ended with exit code {code}"


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:  # Popen was told to make it
        raise MeasurementError("a worker was started without its pipes")
    return pipe


def _strings(value: object) -> dict[str, str]:
    return {str(name): str(text) for name, text in value.items()} if isinstance(value, dict) else {}
