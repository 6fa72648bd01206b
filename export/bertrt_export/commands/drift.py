"""``bertrt drift``: how far an engine is from PyTorch float32, and whether that is too far."""

from __future__ import annotations

import argparse
from pathlib import Path

from bertrt.builtin import resolve
from bertrt.cli.command import EXIT_CHECK_FAILED, EXIT_OK, Command
from bertrt.cli.console import Progress, emit, note, table
from bertrt.cli.engines import add_engine_arguments, natural_number, whole_number
from bertrt.folder import EngineFolder
from bertrt_export.checkpoints import reopen
from bertrt_export.demo import evaluation_text
from bertrt_export.drift.budgets import BOUNDED, parse_budgets, write_limit
from bertrt_export.drift.compare import DEFAULT_EXAMPLES, DEFAULT_SEED, DriftOptions, measure_drift
from bertrt_export.drift.figures import FIGURES
from bertrt_export.drift.keep import HTML_NAME, check_writable, keep_in_engine, keep_in_folder
from bertrt_export.drift.report import DriftReport


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    parser.add_argument(
        "--reference",
        metavar="CHECKPOINT",
        help="the checkpoint that the engine was exported from: a folder, 'demo' or a name on the hub "
        "(default: what the engine names; an engine from a local folder needs it)",
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 to make examples from: paragraphs one a line, a blank line between documents "
        "(default: a public-domain novel)",
    )
    parser.add_argument(
        "--examples",
        type=whole_number,
        default=DEFAULT_EXAMPLES,
        metavar="N",
        help=f"pairs of spans that are compared (default {DEFAULT_EXAMPLES})",
    )
    parser.add_argument(
        "--seed",
        type=natural_number,
        default=DEFAULT_SEED,
        metavar="N",
        help=f"of the examples (default {DEFAULT_SEED})",
    )
    parser.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a budget, or lift it with NAME=off; may be repeated. Names, as in the JSON report: "
        + ", ".join(BOUNDED),
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--out-dir", type=Path, metavar="DIR", help="keep the report there, not in the engine's folder"
    )
    place.add_argument("--no-save", action="store_true", help="print the result only")


def _run(args: argparse.Namespace) -> int:
    options = DriftOptions(
        examples=args.examples,
        seed=args.seed,
        budgets=parse_budgets(args.budget),
        backend=args.backend,
        threads=args.threads,
        provider=args.provider,
        devices=args.devices or (),
    )
    verify = not args.no_verify
    folder = EngineFolder.open(resolve(args.engine, verify=verify), verify=verify)
    if not args.no_save:
        check_writable(args.out_dir or folder.path)
    if folder.manifest.latency_only:
        note("the weights are random, so are the predictions; budgets are made for trained ones")
    with (
        reopen(folder.manifest.source, args.reference) as checkpoint,
        Progress("examples", total=options.examples) as progress,
    ):
        report = measure_drift(
            folder, checkpoint, args.text or evaluation_text(), options=options, progress=progress.advance
        )
    kept = None
    if args.out_dir is not None:
        keep_in_folder(args.out_dir, report)
        kept = args.out_dir / HTML_NAME
    elif not args.no_save:
        keep_in_engine(folder, report)
        kept = folder.path / HTML_NAME
    emit(report.to_json() if args.json else _describe(report, kept), as_json=args.json)
    return EXIT_OK if report.passed else EXIT_CHECK_FAILED


def _describe(report: DriftReport, kept: Path | None) -> str:
    over = {violation.figure for violation in report.violations}
    rows = [
        (
            figure.title,
            figure.write(report.figures[name]),
            write_limit(name, report.budgets[name]) if name in report.budgets else "",
            "OVER" if name in over else "",
        )
        for name, figure in FIGURES.items()
        if name in report.figures
    ]
    examples = report.examples
    computed = report.engine.backend + (f", {report.engine.isa}" if report.engine.isa else "")
    lines = [
        f"{report.engine.name} ({report.engine.precision}; {computed}) against PyTorch float32: "
        f"{examples.examples:,} examples, {examples.masked:,} masked positions, {report.seconds:.0f} s",
        table([("", "measured", "budget", ""), *rows], align="<>><"),
        *(f"left out: {part}: {why}" for part, why in report.left_out.items()),
        *(f"over budget: {violation.message}" for violation in report.violations),
    ]
    if report.passed:
        lines.append("within budget")
    if kept is not None:
        lines.append(f"report: {kept}")
    return "\n".join(lines)


COMMAND = Command(
    name="drift",
    help="compare an engine with PyTorch float32 on real text",
    example="bertrt drift demo-engine\n"
    "bertrt drift engine --reference ./my-bert --text prose.txt --budget top1_agreement=0.98\n"
    "bertrt drift demo-engine --json --no-save",
    add_arguments=_add_arguments,
    run=_run,
)
