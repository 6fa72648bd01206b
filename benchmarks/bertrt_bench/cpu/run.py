"""A run: its steps in order, a command each, whose answers are kept as they come."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bertrt import machine
from bertrt.cli.command import EXIT_CHECK_FAILED, EXIT_OK
from bertrt.cli.console import note, write_atomically
from bertrt.folder import write_file
from bertrt_bench.cpu.abilities import Abilities, look
from bertrt_bench.cpu.children import run_bertrt
from bertrt_bench.cpu.mix import mix_name, write_mix
from bertrt_bench.cpu.options import CpuOptions
from bertrt_bench.cpu.plan import LENGTHS, EngineExport, Kind, Step, chosen, planned
from bertrt_bench.cpu.record import Record, Taken
from bertrt_bench.cpu.summary import render
from bertrt_bench.environment import recorded_environment
from bertrt_bench.report import FORMAT as BENCH_FORMAT
from bertrt_export.drift.report import FORMAT as DRIFT_FORMAT

_FORMATS: Final[Mapping[Kind, str]] = {"bench": BENCH_FORMAT, "drift": DRIFT_FORMAT}


def run(
    options: CpuOptions,
    *,
    abilities: Abilities | None = None,
    steps: Sequence[Step] | None = None,
    say: Callable[[str], None] = note,
) -> Record:
    """Carry out a run and keep its records.

    A step that cannot be taken or that fails is summed up with the reason, and the next one begins. An interrupted run
    leaves the records that it has, and a summary of them.

    Args:
        options: what is asked.
        abilities: of the machine; by default what is found.
        steps: what is done; by default all that is planned, as far as the options choose it.
        say: told of each step, a line.

    Raises:
        InputError, TextEncodingError: a record lies in the folder, an option does not suit, or no step is left.
        BackendUnavailableError: the kernels are not built.
        OSError: the disk is full or read-only.
    """
    abilities = abilities or look()
    plan = planned(options, abilities, lengths=mix_name(options.lengths_from)) if steps is None else steps
    record = Record(
        options=options,
        machine=machine.describe(),
        abilities=abilities,
        plan=plan,
        steps=chosen(plan, options.only),
        environment=recorded_environment(),
    )
    with tempfile.TemporaryDirectory(prefix="bertrt-cpu-") as folder:
        scratch = Path(folder)
        if any(step.name == LENGTHS for step in record.steps):
            write_mix(options.lengths_from, scratch)
        record.reserve()
        start = time.monotonic()
        engines: dict[EngineExport, str] = {}
        try:
            for step in record.steps:
                _save(record, start)
                say(f"{record.duration_seconds:5.0f} s  {step.name}")
                taken = _take(step, record.path(step), scratch, engines)
                record.taken.append(taken)
                if taken.outcome != "done":
                    say(f"{time.monotonic() - start:5.0f} s  {step.name} {taken.outcome}: {taken.reason}")
            record.state = "done"
        except BaseException:
            record.state = "interrupted"
            raise
        finally:
            _save(record, start)
    return record


def _save(record: Record, start: float) -> None:
    record.duration_seconds = time.monotonic() - start
    write_atomically(record.summary, render(record))


def _take(step: Step, path: Path, scratch: Path, engines: dict[EngineExport, str]) -> Taken:
    if step.problem:
        return Taken(step=step, outcome="skipped", reason=step.problem)
    start = time.monotonic()

    def failed(reason: str) -> Taken:
        return Taken(step=step, outcome="failed", reason=reason, seconds=time.monotonic() - start)

    if problem := _engine_problem(step.engine, scratch, engines):
        return failed(problem)
    # The time of a measurement is not that of an export, which happens once.
    start = time.monotonic()
    ended = run_bertrt(step.arguments, folder=scratch, isa=step.isa)
    # An engine that is over its drift budgets has been measured all the same.
    if ended.code not in ((EXIT_OK, EXIT_CHECK_FAILED) if step.kind == "drift" else (EXIT_OK,)):
        return failed(ended.obituary)
    value = _read(ended.answer, _FORMATS[step.kind])
    if value is None:
        return failed(f"its answer is no record; {ended.obituary}")
    write_file(path, ended.answer)
    return Taken(step=step, outcome="done", value=value, seconds=time.monotonic() - start)


def _engine_problem(engine: EngineExport, scratch: Path, engines: dict[EngineExport, str]) -> str:
    """Export an engine unless it was; why it cannot be, and an empty string if it is there."""
    if engine not in engines:
        ended = run_bertrt(engine.arguments, folder=scratch)
        engines[engine] = (
            "" if ended.code == EXIT_OK else f"{engine.name} cannot be exported: {ended.obituary}"
        )
    return engines[engine]


def _read(answer: bytes, form: str) -> dict[str, Any] | None:
    try:
        value = json.loads(answer)
    except ValueError:
        return None
    return value if isinstance(value, dict) and value.get("format") == form else None
