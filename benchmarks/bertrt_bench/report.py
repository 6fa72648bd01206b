"""The outcome of a benchmark, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Final

import bertrt
from bertrt.cli.console import table
from bertrt.machine import Machine
from bertrt.manifest import Manifest
from bertrt_bench.agreement import MEASURES, Agreement
from bertrt_bench.cases import TOP_K, Case
from bertrt_bench.lengths import Lengths
from bertrt_bench.markdown import number
from bertrt_bench.options import BenchOptions
from bertrt_bench.process import ContestantProcess
from bertrt_bench.timings import Speedup, Timings

FORMAT: Final = "bertrt-bench"
# 2: figures that too few runs do not tell are null.
FORMAT_VERSION: Final = 2
# Of a processor, used while it was another's turn: above it a contestant is told to have disturbed the others.
_MOST_IDLE_SHARE: Final = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class ContestantRecord:
    """Who took part.

    Attributes:
        name: as after ``--against``; the engine's is ``engine``.
        description: one line.
        threads: that one run used, as its library says; ``None`` if it does not.
        versions: of the packages that did its work.
        details: what else decides its speed.
        idle_cpu_seconds: processor time that it used while it was another's turn; near 0, or it disturbed
            them; ``None`` if that was never measured.
        idle_seconds: how long others' turns were.
        restless_turns: after which its threads did not come to rest.
    """

    name: str
    description: str
    threads: int | None
    versions: Mapping[str, str]
    details: Mapping[str, str]
    idle_cpu_seconds: float | None = None
    idle_seconds: float | None = None
    restless_turns: int = 0

    @classmethod
    def of(cls, contestant: ContestantProcess) -> ContestantRecord:
        """The record of a contestant at the end of its turns."""
        return cls(
            name=contestant.kind.name,
            description=contestant.kind.description,
            threads=contestant.threads,
            versions=contestant.versions,
            details=contestant.details,
            idle_cpu_seconds=None if contestant.idle is None else contestant.idle.cpu_seconds,
            idle_seconds=None if contestant.idle is None else contestant.idle.seconds,
            restless_turns=contestant.restless,
        )

    @property
    def warnings(self) -> list[str]:
        """How it disturbed the others, a sentence each."""
        found = []
        if self.idle_cpu_seconds is not None and self.idle_seconds:
            share = self.idle_cpu_seconds / self.idle_seconds
            if share > _MOST_IDLE_SHARE:
                found.append(f"{self.name} used {share:.0%} of a processor while it was another's turn")
        if self.restless_turns:
            turns = f"{self.restless_turns} turn{'' if self.restless_turns == 1 else 's'}"
            found.append(f"the threads of {self.name} did not come to rest after {turns}")
        return [f"warning: {sentence}; the others' times are too long" for sentence in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The engine beside one rival in one case."""

    speedup: Speedup
    agreement: Agreement


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """All the figures of one case.

    Attributes:
        case: what it is.
        timings: by contestant.
        comparisons: by rival.
        share_of_peak: of what the engine's threads could compute at `Report.peak`, the encoder's products in
            the median time; features on the native backend only.
        over_features: how many times as long as the features of the same text the engine took from a text on,
            if both were measured.
    """

    case: Case
    timings: Mapping[str, Timings]
    comparisons: Mapping[str, Comparison]
    share_of_peak: float | None = None
    over_features: Speedup | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A benchmark's outcome.

    Attributes:
        options: what was asked.
        manifest: of the engine.
        machine: where it ran.
        load_average: the system's load over the minute before the start; well above 0, others were at work.
        started: time of the start, UTC.
        duration_seconds: of the whole benchmark.
        contestants: the engine first.
        results: by case, in the order that was asked for.
        lengths: the mix of lengths, if there was one.
        peak: operations per second that one core reached with the engine's instruction set and precision in
            this run; the native backend only.
        environment: the variables that change figures, see `bertrt_bench.environment.recorded_environment`.
    """

    options: BenchOptions
    manifest: Manifest
    machine: Machine
    load_average: float
    started: datetime
    duration_seconds: float
    contestants: Sequence[ContestantRecord]
    results: Sequence[CaseResult]
    lengths: Lengths | None = None
    peak: float | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON value; times in milliseconds, unless a name says otherwise."""
        source, options = self.manifest.source, self.options
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "started": self.started.isoformat(timespec="seconds"),
            "duration_seconds": self.duration_seconds,
            "bertrt": bertrt.__version__,
            "machine": {**self.machine.to_json(), "load_average": self.load_average},
            "engine": {
                "name": source.name,
                "kind": source.kind,
                "weights_sha256": source.weights_sha256,
                "seed": source.seed,
                "precision": self.manifest.precision,
                "dialect": self.manifest.dialect,
                "latency_only": self.manifest.latency_only,
                "architecture": self.manifest.architecture.to_json(),
                "versions": dict(self.manifest.versions),
            },
            "settings": {
                "threads": options.thread_count,
                "warmup": options.warmup,
                "rounds": options.round_count,
                "repeats": options.repeats,
                "seconds": None if options.repeats is not None else options.seconds,
                "seed": options.seed,
                "top_k": TOP_K,
                "lengths": None if self.lengths is None else self.lengths.to_json(),
                "environment": dict(self.environment),
            },
            "peak_operations_per_second": self.peak,
            "contestants": [
                {**asdict(record), "versions": dict(record.versions), "details": dict(record.details)}
                for record in self.contestants
            ],
            "cases": [
                {
                    "task": result.case.task,
                    "batch": result.case.batch,
                    "sequence": result.case.sequence,
                    # Those of a mix are told once, above.
                    "mix": result.case.lengths is not None,
                    "tokens": result.case.tokens,
                    "share_of_peak": result.share_of_peak,
                    "over_features": None if result.over_features is None else asdict(result.over_features),
                    "timings": {
                        name: {**asdict(timings), "round_p50_ms": list(timings.round_p50_ms)}
                        for name, timings in result.timings.items()
                    },
                    "comparisons": {
                        name: {
                            "speedup": asdict(comparison.speedup),
                            "agreement": {
                                **asdict(comparison.agreement),
                                "measure": MEASURES[result.case.task],
                            },
                        }
                        for name, comparison in result.comparisons.items()
                    },
                }
                for result in self.results
            ],
        }

    def to_json_text(self) -> str:
        """The report as the text of a JSON file."""
        return json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_text(self) -> str:
        """The report for people."""
        return "\n".join([*self._head(), "", self._table(), *self._foot()])

    def _head(self) -> list[str]:
        source, machine = self.manifest.source, self.machine
        instructions = " ".join(machine.instruction_sets)
        weights = ", random weights: its answers mean nothing" if self.manifest.latency_only else ""
        lines = [
            f"{source.name}, {self.manifest.precision}{weights}",
            f"{machine.cpu}, {machine.usable_cpus} usable CPUs, {instructions or machine.architecture}",
            f"{machine.os}; {machine.python}; bertrt {bertrt.__version__}; "
            f"load {self.load_average:.1f} before the start",
        ]
        if self.environment:
            lines.append(
                f"environment: {' '.join(f'{name}={value}' for name, value in self.environment.items())}"
            )
        for record in self.contestants:
            facts = [f"{name} {version}" for name, version in record.versions.items()]
            facts += [f"{name} {value}" for name, value in record.details.items()]
            if record.threads is not None:
                facts.append(f"{record.threads} thread{'' if record.threads == 1 else 's'}")
            lines += [f"{record.name}: {record.description}", f"  {', '.join(facts)}"]
        if self.lengths is not None:
            mix = self.lengths.to_json()
            lines.append(
                f"mix: {mix['paragraphs']} paragraphs of {mix['name']}, {mix['least']} to {mix['most']} tokens, "
                f"median {mix['median']:g}, together {mix['tokens']:,}; padded rivals sort them by length"
            )
        if self.peak is not None:
            lines.append(f"peak: {self.peak / 1e12:.2f} T operations/s on one core, measured in this run")
        return lines

    def _table(self) -> str:
        rivals = [record.name for record in self.contestants[1:]]
        rows = [
            ["task", "batch", "seq", "", "p50 ms", "p90", "p99", "mean", "± sd", "seq/s", "tokens/s", "runs"]
        ]
        if self.peak is not None:
            rows[0].append("of peak")
        if rivals:
            rows[0].append("engine is faster by (rounds)")
        for result in self.results:
            case = result.case
            for name, timings in result.timings.items():
                first = name == self.contestants[0].name
                length = str(case.sequence) if case.lengths is None else "mix"
                shape = [case.task, str(case.batch), length] if first else ["", "", ""]
                milliseconds = (
                    timings.p50_ms,
                    timings.p90_ms,
                    timings.p99_ms,
                    timings.mean_ms,
                    timings.std_ms,
                )
                row = [*shape, name, *map(_known, milliseconds)]
                row += [
                    number(timings.sequences_per_second),
                    f"{timings.tokens_per_second:,.0f}",
                    str(timings.runs),
                ]
                if self.peak is not None:
                    share = result.share_of_peak if first else None
                    row.append("" if share is None else f"{share:.0%}")
                if rivals:
                    row.append(str(result.comparisons[name].speedup) if name in result.comparisons else "")
                rows.append(row)
        align = "<>><>>>>>>>>" + (">" if self.peak is not None else "") + (">" if rivals else "")
        return table(rows, align=align, indent="")

    def _foot(self) -> list[str]:
        lines = [
            f"{result.case}: {result.over_features} the time of the same text's features"
            for result in self.results
            if result.over_features is not None
        ]
        lines += [warning for record in self.contestants for warning in record.warnings]
        for record in self.contestants[1:]:
            worst: dict[str, Agreement] = {}
            for result in self.results:
                found = result.comparisons[record.name].agreement
                if result.case.task not in worst or found.error > worst[result.case.task].error:
                    worst[result.case.task] = found
            outcomes = [
                f"{task} {found.error:.2g} (tolerance {found.tolerance:g})" for task, found in worst.items()
            ]
            lines += [
                f"answers agree with {record.name}; largest relative error:",
                f"  {', '.join(outcomes)}",
            ]
        return ["", *lines] if lines else []


def _known(value: float | None) -> str:
    return "" if value is None else number(value)
