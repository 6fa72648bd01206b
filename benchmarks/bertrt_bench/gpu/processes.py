"""Other processes of a run: contestants, and jobs that answer once. None outlives the time of its step.

What uses the GPU or takes long never happens in the process that keeps the record: a GPU fault ends the process that it
happens in, and only a process can be stopped at a deadline.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from bertrt.errors import MeasurementError
from bertrt_bench.contestants import ContestantKind, Setup
from bertrt_bench.gpu.clock import Share
from bertrt_bench.process import ContestantProcess, worker_environment

# How much of a failed job's standard error is looked at, and the largest result that is one.
_TAIL_BYTES: Final = 4096
_LARGEST_RESULT: Final = 16 << 20


class Entrant(ContestantProcess):
    """A contestant whose every request ends with the time of the step that makes it.

    Attributes:
        share: the time of the step at work; each step sets its own.
        usable: false once it has died, or did not answer in time and may do so at any moment.

    Args:
        kind: who takes part.
        setup: what it is told.
        folder: a private folder for its answers; must exist.
        share: the time of the step that starts it.
    """

    def __init__(self, kind: ContestantKind, setup: Setup, folder: Path, *, share: Share) -> None:
        super().__init__(kind, setup, folder, timeout=share.left)
        self.share = share
        self.usable = True

    def abandon(self) -> None:
        """End its process now."""
        self.usable = False
        self._kill()

    def _ask(self, doing: str, request: Mapping[str, Any], *, extra_seconds: float = 0.0) -> dict[str, Any]:
        # The share is all the time there is, what is asked to be measured included.
        self._timeout = max(0.0, self.share.left - extra_seconds)
        try:
            return super()._ask(doing, request, extra_seconds=extra_seconds)
        except MeasurementError as error:
            late = self.share.left <= 0
            self.usable = self._process is not None and self._process.poll() is None and not late
            if not late:
                raise
            raise MeasurementError(
                f"{self.kind.name}: {doing} was not done when the time of its step was used up; "
                "raise --minutes, or name fewer steps with --only"
            ) from error


def run_job(
    name: str, request: Mapping[str, Any], *, folder: Path, threads: int, share: Share
) -> dict[str, Any]:
    """Run a function of `bertrt_bench.gpu.jobs` in a process of its own and return its result.

    Args:
        name: of the job.
        request: its argument; a JSON object.
        folder: for what the job writes; must exist.
        threads: that its numeric libraries may use.
        share: the job ends with it.

    Raises:
        MeasurementError: the job failed, died, or was not done in time.
    """
    result, errors = folder / "result.json", folder / "stderr.txt"
    with errors.open("wb") as sink:
        process = subprocess.Popen(  # noqa: S603 - this very package
            # -P: what lies in the current folder must not stand in for a module.
            [sys.executable, "-P", "-X", "utf8", "-m", "bertrt_bench.gpu.jobs", name, str(result)],
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=sink,
            env=worker_environment(os.environ, threads, folder),
            # Ctrl-C at the terminal reaches the parent alone, which then ends its jobs.
            start_new_session=True,
        )
    seconds = share.left
    try:
        process.communicate(json.dumps(request).encode(), timeout=max(0.0, seconds))
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(
            f"{name} was not done after {seconds:.0f} s, the time of its step; raise --minutes, or name "
            "fewer steps with --only"
        ) from error
    finally:
        # With whatever it started. Once it has been collected its number may belong to another.
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    answer = _read(result)
    if answer is None:
        lines = errors.read_bytes()[-_TAIL_BYTES:].decode("utf-8", "backslashreplace").strip().splitlines()
        last = f" (its last line: {lines[-1]})" if lines else ""
        raise MeasurementError(f"{name} ended with code {process.returncode} and no result{last}")
    if "error" in answer:
        raise MeasurementError(f"{name} failed: {answer['error']}")
    found: dict[str, Any] = answer["result"]
    return found


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file() or path.stat().st_size > _LARGEST_RESULT:
        return None
    try:
        answer = json.loads(path.read_bytes())
    except ValueError:
        return None
    return answer if isinstance(answer, dict) and ("error" in answer or "result" in answer) else None
