"""A run: its steps in order, each within its time, the record written after each."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from bertrt import machine
from bertrt.cli.console import note
from bertrt.errors import BackendUnavailableError, BertRTError, InputError, MeasurementError
from bertrt_bench.gpu.bench import Bench
from bertrt_bench.gpu.clock import Clock
from bertrt_bench.gpu.device import Gpu
from bertrt_bench.gpu.jobs import libraries_of, versions
from bertrt_bench.gpu.lineup import TORCH, Step, chosen, gpu_steps, rehearsal_steps, scaled
from bertrt_bench.gpu.options import GpuOptions
from bertrt_bench.gpu.processes import run_job
from bertrt_bench.gpu.record import Record, StepRecord
from bertrt_bench.gpu.subject import open_subject

# Each library is looked for in a process of its own, which imports it: one that crashes or hangs is its own problem.
_PROBE_SECONDS: Final = 60.0


def run(
    options: GpuOptions,
    *,
    gpu: Gpu | None,
    steps: Sequence[Step] | None = None,
    clock: Clock | None = None,
    say: Callable[[str], None] = note,
) -> Record:
    """Carry out a run and keep its record.

    A step that cannot be taken, for which no time is left, or that fails is recorded with the reason, and the next one
    begins.
    An interrupted run leaves its record with all that was measured until then.

    Args:
        options: what is asked.
        gpu: ``None`` in a rehearsal.
        steps: what is done; by default the lineup of the device.
        clock: the time that there is; by default the options' minutes, from now.
        say: told of each step, a line.

    Raises:
        InputError: a record lies in the folder, an option does not suit, or no step is left.
        CheckpointError: the checkpoint cannot be opened.
    """
    clock = clock or Clock(seconds=options.minutes * 60)
    if steps is None:
        lineup = rehearsal_steps() if options.rehearsal else gpu_steps()
        steps = chosen(scaled(lineup, options.minutes), options.only)
        if not any(step.kind != "turns" for step in steps):
            raise InputError(
                f"no step's name holds {' or '.join(options.only)}; leave --only out to see them all"
            )
    record = Record(options=options, machine=machine.describe(), gpu=None if gpu is None else gpu.facts)
    record.reserve()
    with tempfile.TemporaryDirectory(prefix="bertrt-gpu-") as folder:
        scratch = Path(folder)
        record.probed = _probe(options, clock, scratch)
        record.subject = open_subject(options, scratch)
        libraries = record.probed["libraries"]
        with Bench(options, record.subject, libraries, gpu=gpu, scratch=scratch) as bench:
            record.bench = bench
            try:
                _take_all(steps, record, bench, clock, say)
                record.state = "done"
            except BaseException:
                record.state = "interrupted"
                raise
            finally:
                record.duration_seconds = clock.spent
                record.save()
    return record


def _take_all(
    steps: Sequence[Step], record: Record, bench: Bench, clock: Clock, say: Callable[[str], None]
) -> None:
    # What has been prepared must still take its turn.
    record.save()
    last = next((step for step in reversed(steps) if step.kind == "turns"), None)
    for step in steps:
        say(f"{clock.spent:5.0f} s  {step.name}")
        kept = 0.0 if last is None or step is last else last.seconds
        taken = _take(step, bench, clock, kept)
        record.steps.append(taken)
        if taken.outcome != "done":
            say(f"{clock.spent:5.0f} s  {step.name} {taken.outcome}: {taken.reason}")
        record.duration_seconds = clock.spent
        record.save()


def _take(step: Step, bench: Bench, clock: Clock, kept: float) -> StepRecord:
    share = clock.share(step.seconds, kept=kept)
    if share is None:
        reason = f"no time is left for it: {clock.left:.0f} s until the end"
        if kept:
            reason += f", of which {kept:.0f} are for the last turns"
        return StepRecord(step=step, outcome="skipped", seconds=0.0, reason=reason)
    began = time.monotonic()
    try:
        found = bench.take(step, share)
    except BackendUnavailableError as error:
        return StepRecord(step=step, outcome="skipped", seconds=time.monotonic() - began, reason=str(error))
    except Exception as error:  # whatever it is, the next step may well succeed
        kind = "" if isinstance(error, BertRTError) else f"{type(error).__name__}: "
        return StepRecord(
            step=step, outcome="failed", seconds=time.monotonic() - began, reason=f"{kind}{error}"
        )
    return StepRecord(step=step, outcome="done", seconds=time.monotonic() - began, found=found)


def _probe(options: GpuOptions, clock: Clock, scratch: Path) -> dict[str, Any]:
    """Look for all libraries.

    Returns:
        ``libraries``: by name, ``version`` and ``problem`` (``None``: it can be used here); ``versions`` of others;
        ``torch``: what PyTorch was built with.
    """
    if clock.share(_PROBE_SECONDS) is None:
        raise InputError(f"{options.minutes:g} minutes are too few to begin; raise --minutes")
    libraries: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(libraries_of(options.device)):
        share = clock.share(_PROBE_SECONDS)
        folder = scratch / f"probe-{number}"
        folder.mkdir()
        request = {"library": name, "device": options.device}
        try:
            if share is None:
                raise MeasurementError("no time was left to look for it; raise --minutes")
            found = run_job("probe", request, folder=folder, threads=options.threads, share=share)
        except MeasurementError as error:
            found = {"version": None, "problem": f"{name} cannot be used: {error}"}
        libraries[name] = found
    return {
        "libraries": {
            name: {"version": found["version"], "problem": found["problem"]}
            for name, found in libraries.items()
        },
        "torch": libraries[TORCH].get("built", {}),
        "versions": versions(),
    }
