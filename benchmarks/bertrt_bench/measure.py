"""Runs a benchmark: check the answers, then turns in rounds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from bertrt import machine
from bertrt.builtin import resolve
from bertrt.folder import EngineFolder
from bertrt.tokenization import WordPieceTokenizer
from bertrt_bench.arena import Arena
from bertrt_bench.cases import Case
from bertrt_bench.contestants import ENGINE, RIVALS, ContestantKind
from bertrt_bench.environment import recorded_environment
from bertrt_bench.lengths import Lengths, read_lengths
from bertrt_bench.options import BenchOptions, check_fits
from bertrt_bench.report import CaseResult, Comparison, ContestantRecord, Report
from bertrt_bench.timings import Speedup, Timings, speedup, summarise
from bertrt_bench.turns import order_of_round
from bertrt_bench.work import encoder_operations


def measure(
    options: BenchOptions,
    *,
    on_step: Callable[[], None] = lambda: None,
    registry: Mapping[str, ContestantKind] = RIVALS,
    engine: ContestantKind = ENGINE,
) -> Report:
    """Run a benchmark.

    All contestants answer every case once and must agree before anything is timed. Then come rounds; in each
    round every case is run by the engine and by each rival, so that what changes on the machine meanwhile
    meets all; the order is another in each.

    Args:
        options: what to measure.
        on_step: called after each of the steps that `count_steps` counts.
        registry: the rivals that ``options.against`` names.
        engine: how the engine itself takes part.

    Raises:
        InputError, MissingHeadError: the options do not fit the engine.
        EngineFolderError: the engine cannot be opened.
        AnswersDisagreeError: the contestants do not answer the same; nothing was timed.
        MeasurementError: a contestant cannot run, died or hung.
    """
    rivals = options.kinds(registry)
    folder = EngineFolder.open(resolve(options.engine, verify=options.verify), verify=options.verify)
    lengths = _lengths(options, folder)
    cases = options.cases(None if lengths is None else lengths.tokens)
    check_fits(cases, folder.manifest)
    started, start = datetime.now(UTC), time.monotonic()
    load = os.getloadavg()[0]
    with Arena(
        folder,
        cases,
        rivals=rivals,
        threads=options.thread_count,
        backend=options.backend,
        reference=options.reference,
        seed=options.seed,
        timeout=options.timeout,
        engine=engine,
    ) as arena:
        checks = {}
        for case in cases:
            checks[case] = {check.rival: check.agreement for check in arena.check(case)}
            on_step()
        # Before and after, as a processor's clock drifts: the better is nearer to what it can do.
        peaks = [arena.peak()]
        times = take_turns(arena, cases, options, on_step=on_step)
        peaks.append(arena.peak())
        records = [ContestantRecord.of(contestant) for contestant in arena.contestants]
    peak = max((value for value in peaks if value is not None), default=None)
    figures = {
        case: {record.name: summarise(times[case, record.name], case) for record in records} for case in cases
    }
    results = []
    for case in cases:
        timings = figures[case]
        comparisons = {
            rival.name: Comparison(
                speedup=speedup(timings[engine.name], timings[rival.name]), agreement=checks[case][rival.name]
            )
            for rival in rivals
        }
        share = None
        if peak is not None and case.task == "features":
            operations = encoder_operations(case, folder.manifest.architecture)
            seconds = timings[engine.name].p50_ms / 1000
            share = operations / seconds / (peak * options.thread_count)
        results.append(
            CaseResult(
                case=case,
                timings=timings,
                comparisons=comparisons,
                share_of_peak=share,
                over_features=_over_features(case, figures, engine.name),
            )
        )
    return Report(
        options=options,
        manifest=folder.manifest,
        machine=machine.describe(),
        load_average=load,
        started=started,
        duration_seconds=time.monotonic() - start,
        contestants=records,
        results=results,
        lengths=lengths,
        peak=peak,
        environment=recorded_environment(),
    )


def take_turns(
    arena: Arena, cases: Sequence[Case], options: BenchOptions, *, on_step: Callable[[], None] = lambda: None
) -> dict[tuple[Case, str], list[list[int]]]:
    """Let the contestants run the cases in turns: in each round, for each case, one contestant after the other.

    Args:
        arena: the contestants.
        cases: some of the arena's.
        options: how many rounds, and how long a turn is.
        on_step: called after each turn.

    Returns:
        By case and contestant's name: for each round the nanoseconds of each timed run.
    """
    times: dict[tuple[Case, str], list[list[int]]] = {}
    for number in range(options.round_count):
        runs, seconds = options.runs_of_round(number)
        warmup = options.warmup if number == 0 else min(1, options.warmup)
        for case in cases:
            for contestant in order_of_round(arena.contestants, number):
                turn = arena.turn(contestant, case, warmup=warmup, runs=runs, seconds=seconds)
                times.setdefault((case, contestant.kind.name), []).append(turn)
                on_step()
    return times


def count_steps(options: BenchOptions) -> int:
    """Steps of `measure`: a check of each case, and a turn of each contestant in each case and round."""
    return options.case_count * (1 + options.round_count * (1 + len(options.against)))


def _lengths(options: BenchOptions, folder: EngineFolder) -> Lengths | None:
    if options.lengths_from is None:
        return None
    return read_lengths(
        Path(options.lengths_from),
        WordPieceTokenizer.from_folder(folder.path, folder.manifest.files),
        most=options.paragraphs,
        max_length=folder.manifest.architecture.max_position_embeddings,
    )


def _over_features(
    case: Case, figures: Mapping[Case, Mapping[str, Timings]], contestant: str
) -> Speedup | None:
    features = replace(case, task="features")
    if case.task != "fill-mask-text" or features not in figures:
        return None
    return speedup(figures[features][contestant], figures[case][contestant])
