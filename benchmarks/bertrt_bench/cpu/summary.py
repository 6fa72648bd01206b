"""A run as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import bertrt
from bertrt.cli.console import human_bytes
from bertrt_bench.cpu.bars import judge, violations
from bertrt_bench.cpu.options import BASE, DEMO
from bertrt_bench.cpu.plan import (
    DRIFT_PRECISIONS,
    LENGTHS,
    ONNXRUNTIME,
    OPENVINO,
    TORCH,
    EngineExport,
    command_line,
)
from bertrt_bench.cpu.record import Record, Taken
from bertrt_bench.markdown import cell, number, table
from bertrt_export.drift.figures import FIGURES

_Json = Mapping[str, Any]
_NONE: Final = "-"
_RIVALS: Final = {OPENVINO: "OpenVINO", ONNXRUNTIME: "ONNX Runtime", TORCH: "PyTorch"}


def failures(record: Record) -> list[str]:
    """What failed, a line each: steps, drift over its budgets, bars that apply and were missed."""
    lines = []
    for taken in record.taken:
        if taken.outcome == "failed":
            lines.append(f"{taken.step.name}: {taken.reason}")
        elif taken.outcome == "done" and taken.step.kind == "drift":
            lines += [f"{taken.step.name}: {violation}" for violation in violations(taken.value)]
    lines += [
        f"{verdict.title}: {verdict.outcome}, must be {verdict.bound}"
        for verdict in judge(record)
        if verdict.missed
    ]
    return lines


def render(record: Record) -> str:
    """The run for people."""
    lines = [f"# CPU run: {cell(record.machine.cpu)}", "", *_notices(record), *_facts(record), ""]
    lines += _speed(record) + _bars(record) + _drift(record) + _records(record) + _rest(record)
    return "\n".join(lines).rstrip() + "\n"


def _notices(record: Record) -> list[str]:
    lines = []
    if record.options.model != BASE:
        lines += [
            f"**A trial with the {record.options.model} model**: no bar of speed applies to it.",
            "",
        ]
    if record.state != "done":
        lines += [
            f"**Not finished**: the run is {record.state}; what it has measured so far is below.",
            "",
        ]
    if failed := failures(record):
        lines += ["**Failed:**", "", *(f"- {cell(line)}" for line in failed), ""]
    return lines


def _facts(record: Record) -> list[str]:
    machine, options = record.machine, record.options
    memory = _NONE if machine.memory_bytes is None else human_bytes(machine.memory_bytes)
    lines = [
        f"- command: `{cell(options.command)}`, {record.started.isoformat(timespec='seconds')}, "
        f"{record.duration_seconds:.0f} s",
        f"- processor: {cell(machine.cpu)} ({machine.architecture}), {machine.usable_cpus} usable CPUs of "
        f"{machine.logical_cpus}, {memory}; {options.thread_count} threads for everyone",
        f"- its instructions: {', '.join(machine.instruction_sets) or 'unknown'}",
        "- instruction sets, best first: "
        + ", ".join(
            f"{isa.name} ({cell(isa.reason)})" if isa.reason else isa.name for isa in record.abilities.sets
        ),
        f"- system: {cell(machine.os)}, {machine.python}",
        f"- software: {', '.join(f'{name} {version}' for name, version in _versions(record).items())}",
    ]
    if record.environment:
        pairs = (f"{name}={value}" for name, value in record.environment.items())
        lines.append(f"- environment: `{cell(' '.join(pairs))}`")
    if options.model != DEMO:
        lines.append(f"- model: {options.model}'s shape with random weights, whose answers mean nothing")
    if found := record.done(LENGTHS):
        mix = found.value["settings"]["lengths"]
        lines.append(
            f"- real lengths: {mix['paragraphs']} paragraphs of {mix['least']} to {mix['most']} tokens, together "
            f"{mix['tokens']:,}, counted by the demo's tokeniser; `{cell(mix['name'])}` has a line of as many words "
            "of one token for each"
        )
    lines.append(
        "- a time is a median; beside a rival's stands how many times as long as ours it is; all take turns, each in "
        "a process of its own"
    )
    return lines


def _versions(record: Record) -> dict[str, str]:
    found = {"bertrt": bertrt.__version__}
    for taken in record.taken:
        if taken.step.kind == "drift":
            found |= taken.value.get("versions", {})
        for contestant in taken.value.get("contestants", [])[1:]:
            found |= contestant["versions"]
    return found


def _speed(record: Record) -> list[str]:
    rows, others = [], []
    for taken in record.taken:
        if taken.outcome != "done" or taken.step.kind != "bench":
            continue
        ours, *rivals = taken.value["contestants"]
        for case in taken.value["cases"]:
            shape = f"a mix of {case['batch']}" if case["mix"] else f"{case['batch']}x{case['sequence']}"
            share = case["share_of_peak"]
            rows.append(
                (
                    taken.step.name,
                    f"{case['task']}, {shape}",
                    ours["details"].get("instruction_set", _NONE),
                    number(case["timings"][ours["name"]]["p50_ms"]),
                    _NONE if share is None else f"{100 * share:.0f} %",
                    *(_beside(case, rival) for rival in _RIVALS),
                )
            )
            if case["over_features"] is not None:
                median = case["over_features"]["median"]
                others.append(
                    f"- {taken.step.name}: {case['task']} at {shape} takes {median:.2f} times as long as the same "
                    "text's features"
                )
        others += [
            f"- {taken.step.name}: {rival['name']} computes in {cell(rival['details']['precision'])}"
            for rival in rivals
            if "precision" in rival["details"]
        ]
    if not rows:
        return []
    heading = ("record", "case", "instruction set", "BertRT ms", "of peak", *_RIVALS.values())
    lines = ["## Speed", "", *table(heading, rows, right=range(3, len(heading))), ""]
    return [*lines, *others, ""] if others else lines


def _beside(case: _Json, rival: str) -> str:
    if rival not in case["timings"]:
        return _NONE
    milliseconds, median = case["timings"][rival]["p50_ms"], case["comparisons"][rival]["speedup"]["median"]
    return f"{number(milliseconds)} ({median:.2f})"


def _bars(record: Record) -> list[str]:
    rows = [
        (verdict.title, verdict.bound, verdict.measured or _NONE, verdict.outcome)
        for verdict in judge(record)
    ]
    heading = ("", "bar", "measured", "outcome")
    return ["## Bars", "", *table(heading, rows, right=(2,)), ""]


def _drift(record: Record) -> list[str]:
    lines: list[str] = []
    for precision in DRIFT_PRECISIONS:
        found = [
            taken
            for taken in record.taken
            if taken.step.kind == "drift"
            and taken.step.engine.precision == precision
            and taken.outcome == "done"
        ]
        if found:
            examples = found[0].value["examples"]
            lines += [
                f"## Drift of {precision}",
                "",
                f"The demo checkpoint against PyTorch float32: {examples['examples']:,} examples of "
                f"{cell(examples['text'])}, {examples['masked']:,} masked positions.",
                "",
                *table(("", *(taken.step.isa or _NONE for taken in found)), _figures(found)),
                "",
            ]
    return lines


def _figures(found: Sequence[Taken]) -> list[tuple[str, ...]]:
    rows = []
    for name, figure in FIGURES.items():
        cells = []
        for taken in found:
            if name not in taken.value["figures"]:
                cells.append(_NONE)
                continue
            written = figure.write(taken.value["figures"][name])
            over = any(violation["figure"] == name for violation in taken.value["violations"])
            cells.append(f"**{written}** over budget" if over else written)
        if any(written != _NONE for written in cells):
            rows.append((figure.title, *cells))
    return rows


def _records(record: Record) -> list[str]:
    done = [taken for taken in record.taken if taken.outcome == "done"]
    if not done:
        return []
    engines = dict.fromkeys(taken.step.engine for taken in done)
    rows = [
        (taken.step.name, f"`{taken.step.command}`", f"{taken.seconds:.0f}", _load(taken.value))
        for taken in done
    ]
    return [
        "## Records",
        "",
        "Each is what the command wrote, unchanged. The engines:",
        "",
        "```console",
        *(f"$ {_export(engine)}" for engine in engines),
        "```",
        "",
        *table(("file", "command", "s", "load before"), rows, right=(2, 3)),
        "",
    ]


def _export(engine: EngineExport) -> str:
    return command_line(engine.arguments)


def _load(value: _Json) -> str:
    load = value["machine"].get("load_average")
    return _NONE if load is None else f"{load:.2f}"


def _rest(record: Record) -> list[str]:
    done = {taken.step.name for taken in record.taken if taken.outcome == "done"}
    lines = [
        f"- {step.name}: {cell(record.why_not(step.name))}" for step in record.plan if step.name not in done
    ]
    lines += [
        f"- {taken.step.name}, without {rival}: {cell(problem)}"
        for taken in record.taken
        if taken.outcome == "done"
        for rival, problem in taken.step.left_out
    ]
    return ["## Not done", "", *lines, ""] if lines else []
