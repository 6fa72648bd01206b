"""Jobs of a run: other processes that answer once. None outlives the time of its step.

What uses the GPU or takes long never happens in the process that keeps the record: a GPU fault ends the process that it
happens in, and only a process can be stopped at a deadline.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from bertrt.errors import MeasurementError
from bertrt_bench.child import Child
from bertrt_bench.environment import worker_environment
from bertrt_bench.gpu.clock import Share

# Whatever is larger is no result.
_LARGEST_RESULT: Final = 16 << 20


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
    result, asked = folder / "result.json", folder / "request.json"
    asked.write_text(json.dumps(request), encoding="utf-8")
    seconds = share.seconds(0.0)
    with (
        asked.open("rb") as stdin,
        Child(
            "bertrt_bench.gpu.jobs",
            name,
            str(result),
            environment=worker_environment(os.environ, threads, folder),
            errors=folder / "stderr.txt",
            stdin=stdin,
        ) as job,
    ):
        code = job.wait(seconds)
        if code is None:
            raise MeasurementError(f"{name} was not done after {seconds:.0f} s; {share.advice}")
        answer = _read(result)
        if answer is None:
            raise MeasurementError(f"{name} left no result: it {job.obituary(code)}")
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
