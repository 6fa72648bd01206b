"""A record as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from bertrt.cli.console import human_bytes
from bertrt_bench.markdown import cell, number, table
from bertrt_bench.timings import Speedup
from bertrt_export.drift.figures import FIGURES

_Json = Mapping[str, Any]
_NONE: Final = "-"


def render(record: _Json) -> str:
    """The record's value (see `bertrt_bench.gpu.record.Record.to_json`) for people."""
    title = "Rehearsal on a CPU" if record["rehearsal"] else f"GPU run: {record['gpu']['name']}"
    lines = [f"# {title}", "", *_notices(record), *_facts(record), ""]
    lines += (
        _latency(record)
        + _contestants(record)
        + _engines(record)
        + _drift(record)
        + _turns(record)
        + _rest(record)
    )
    return "\n".join(lines).rstrip() + "\n"


def _notices(record: _Json) -> list[str]:
    lines = []
    if record["rehearsal"]:
        lines += [
            "**Nothing here was measured on a GPU.** The run rehearses the script with a small model.",
            "",
        ]
    if record["state"] != "done":
        lines += [
            f"**Not finished**: the run is {record['state']}; what it has measured so far is below.",
            "",
        ]
    if record["failed"]:
        lines += ["**Failed:**", "", *(f"- {cell(line)}" for line in record["failed"]), ""]
    return lines


def _facts(record: _Json) -> list[str]:
    machine, gpu, subject = record["machine"], record["gpu"], record["subject"]
    lines = [f"- command: `{record['command']}`, {record['started']}, {record['duration_seconds']:.0f} s"]
    if gpu is not None:
        power = "" if gpu["power_limit_w"] is None else f", at most {gpu['power_limit_w']:.0f} W"
        lines.append(
            f"- GPU: {cell(gpu['name'])}, compute capability {gpu['compute_capability']}, "
            f"{human_bytes(gpu['memory_bytes'])} ({human_bytes(gpu['used_bytes'])} in use before the run){power}; "
            f"driver {gpu['driver']}, CUDA up to {gpu['cuda']}"
        )
    lines.append(
        f"- host: {cell(machine['cpu'])}, {machine['usable_cpus']} usable CPUs, {cell(machine['os'])}, "
        f"{machine['python']}"
    )
    libraries = record["libraries"].get("libraries", {})
    versions = {name: found["version"] for name, found in libraries.items() if found["version"]}
    versions |= record["libraries"].get("versions", {})
    named = [f"{name} {version}" for name, version in versions.items()]
    built = [f"{name} {version}" for name, version in record["libraries"].get("torch", {}).items() if version]
    lines.append(f"- software: bertrt {record['bertrt']}, {', '.join(named) or 'nothing else'}")
    if built:
        lines.append(f"- PyTorch was built with {', '.join(built)}")
    if subject is not None:
        weights = ": random weights, whose answers mean nothing" if subject["kind"] == "random" else ""
        mix = subject["mix"]
        lines += [
            f"- model: {cell(subject['name'])}{weights}",
            f"- mix: {mix['paragraphs']} paragraphs of {cell(mix['name'])}, {mix['least']} to {mix['most']} tokens, "
            f"together {mix['tokens']:,}; all are one run, sorted by length, in blocks of each one's best size",
        ]
        lines += [f"- left out: {cell(case)}: {cell(reason)}" for case, reason in subject["left_out"].items()]
    settings = record["settings"]
    if settings["environment"]:
        pairs = " ".join(f"{name}={value}" for name, value in settings["environment"].items())
        lines.append(f"- environment: `{cell(pairs)}`")
    lines += [
        f"- a time is {settings['included']}",
        "- contestants take turns, each in a process of its own; figures are over all rounds in which one took part; "
        f"'faster' is {record['baseline']}'s median over the contestant's in their common rounds, with the lowest and "
        "the highest round",
        f"- device memory: {settings['device_memory']}",
    ]
    return lines


def _latency(record: _Json) -> list[str]:
    lines = []
    for case in record["cases"]:
        rows = []
        for name, found in case["contestants"].items():
            timings = found["timings"]
            if timings is None:
                continue
            faster = found["faster"]
            rows.append(
                (
                    name,
                    *(_known(timings[figure]) for figure in ("p50_ms", "p90_ms", "p99_ms")),
                    number(timings["sequences_per_second"]),
                    f"{timings['tokens_per_second']:,.0f}",
                    f"{found['operations_per_second'] / 1e12:,.2f}",
                    _NONE if faster is None else str(Speedup(**faster)),
                    f"{timings['runs']} in {len(found['rounds'])}",
                    f"{found['agreement']['error']:.1e}" if "error" in found["agreement"] else "reference",
                )
            )
        if not rows:
            continue
        heading = (
            "",
            "p50 ms",
            "p90",
            "p99",
            "seq/s",
            "tokens/s",
            "TFLOP/s",
            "faster",
            "runs in rounds",
            "error",
        )
        lines += [f"## {_title(case)}", "", *table(heading, rows), ""]
    return lines


def _contestants(record: _Json) -> list[str]:
    rows = []
    for step in _done(record, "contestant"):
        found = step["found"]
        memory = found["device_memory_bytes"]
        facts = [f"{name} {value}" for name, value in {**found["versions"], **found["details"]}.items()]
        rows.append(
            (
                step["name"],
                found["description"],
                _NONE if memory is None else human_bytes(memory),
                f"{found['ready_seconds']:.1f}",
                "; ".join(facts),
            )
        )
    if not rows:
        return []
    return [
        "## Contestants",
        "",
        *table(("", "", "device memory", "ready after s", "how"), rows, right=(2, 3)),
        "",
    ]


def _engines(record: _Json) -> list[str]:
    rows = []
    for step in _done(record, "engine"):
        found = step["found"]
        plan = found.get("plan")
        rows.append(
            (
                step["precision"],
                human_bytes(found["engine_bytes"]),
                f"{found['export_seconds']:.1f}",
                _NONE if plan is None else f"{found['build_seconds']:.1f}",
                _NONE
                if plan is None
                else f"{plan['library']} {plan['version']}, {', '.join(plan['profiles'])}",
            )
        )
    if not rows:
        return []
    return [
        "## Engines",
        "",
        *table(("", "exported", "export s", "build s", "plan"), rows, right=(1, 2, 3)),
        "",
    ]


def _drift(record: _Json) -> list[str]:
    steps = _done(record, "drift")
    if not steps:
        return []
    first = steps[0]["found"]
    names = [name for name in FIGURES if any(name in step["found"]["figures"] for step in steps)]
    rows = []
    for name in names:
        cells = []
        for step in steps:
            found = step["found"]
            written = FIGURES[name].write(found["figures"][name]) if name in found["figures"] else _NONE
            over = any(violation.startswith(f"{name} ") for violation in found["violations"])
            cells.append(f"**{written}** over budget" if over else written)
        rows.append((FIGURES[name].title, *cells))
    told = [
        f"- {step['precision']}: {cell(step['found']['source'])}, {step['found']['backend']}, against "
        f"{cell(step['found']['reference'])}; {'over' if step['found']['violations'] else 'within'} its budgets"
        for step in steps
    ]
    return [
        "## Drift",
        "",
        f"{first['examples']:,} examples of {cell(first['text'])}, {first['masked']:,} masked positions.",
        "",
        *told,
        "",
        *table(("", *(step["precision"] for step in steps)), rows),
        "",
    ]


def _turns(record: _Json) -> list[str]:
    rows = []
    for step in _done(record, "turns"):
        found = step["found"]
        rounds = ", ".join(map(str, found["rounds"]))
        complete = "yes" if found["complete"] else "no: its time was used up"
        rows.append((step["name"], rounds, complete, _state(found["gpu_before"]), _state(found["gpu_after"])))
    if not rows:
        return []
    restless = [
        f"- {name}: its threads did not come to rest after {count} turns; the others' times are too long"
        for name, count in _done(record, "turns")[-1]["found"]["restless"].items()
    ]
    return [
        "## Turns",
        "",
        *table(("", "rounds", "complete", "GPU before", "GPU after"), rows, right=()),
        "",
        *restless,
        *([""] if restless else []),
    ]


def _rest(record: _Json) -> list[str]:
    lines = []
    for step in record["steps"]:
        if step["outcome"] != "done":
            lines.append(f"- {step['name']} {step['outcome']}: {cell(step['reason'])}")
        cases = step["found"].get("left_out", {})
        lines += [
            f"- {step['name']}, {cell(case)} left out: {cell(reason)}" for case, reason in cases.items()
        ]
    for case in record["cases"]:
        # Prepared and answered, and then it left, or the time was used up.
        lines += [
            f"- {cell(name)}, {_title(case)}: no turn came to it"
            for name, found in case["contestants"].items()
            if found["timings"] is None
        ]
    return ["## Not done", "", *lines, ""] if lines else []


def _title(case: _Json) -> str:
    shape = f"a mix of {case['batch']}" if case["mix"] else f"{case['batch']}x{case['sequence']}"
    return f"{case['task']}, {shape}"


def _known(value: float | None) -> str:
    return _NONE if value is None else number(value)


def _done(record: _Json, kind: str) -> list[_Json]:
    return [step for step in record["steps"] if step["kind"] == kind and step["outcome"] == "done"]


def _state(state: _Json | None) -> str:
    if state is None:
        return _NONE
    units = {"sm_mhz": "MHz", "memory_mhz": "MHz memory", "temperature_c": "°C", "power_w": "W"}
    return ", ".join(f"{state[name]:.0f} {unit}" for name, unit in units.items() if state[name] is not None)
