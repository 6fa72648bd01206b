"""``bertrt bench``: measure an engine, beside its rivals."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bertrt.cli.command import EXIT_CHECK_FAILED, EXIT_OK, Command
from bertrt.cli.console import Progress, emit, note, write_atomically
from bertrt.cli.engines import add_engine_arguments, natural_number, whole_number
from bertrt.errors import AnswersDisagreeError, InputError
from bertrt_bench.cases import TASKS, Task
from bertrt_bench.contestants import RIVALS
from bertrt_bench.measure import count_steps, measure
from bertrt_bench.options import BenchOptions, parse_numbers

_DEFAULTS = BenchOptions(engine="demo")
_STANDARD_OUTPUT = "-"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    parser.add_argument(
        "--task",
        default=",".join(_DEFAULTS.tasks),
        metavar="TASK[,...]",
        help=f"of {', '.join(TASKS)} (default %(default)s)",
    )
    parser.add_argument(
        "--batch",
        metavar="N[,...]",
        help=f"sequences of one run (default {_join(_DEFAULTS.batches)}, or none with --lengths-from)",
    )
    parser.add_argument(
        "--sequence",
        metavar="N[,...]",
        help="tokens of a sequence, special ones included "
        f"(default {_join(_DEFAULTS.sequences)}, or none with --lengths-from)",
    )
    parser.add_argument(
        "--lengths-from",
        metavar="FILE",
        help="run sequences as long as the paragraphs of this text, all in one run; rivals get them sorted by "
        "length, in padded batches",
    )
    parser.add_argument(
        "--paragraphs",
        type=whole_number,
        default=_DEFAULTS.paragraphs,
        metavar="N",
        help="of --lengths-from, at most (default %(default)s)",
    )
    parser.add_argument(
        "--against",
        default="",
        metavar="RIVAL[,...]",
        help=f"measure beside it, in turns, and check that the answers agree: {', '.join(sorted(RIVALS))}",
    )
    parser.add_argument(
        "--reference",
        metavar="CHECKPOINT",
        help="the checkpoint that the engine was exported from, for the rivals: a folder, 'demo' or a name "
        "on the hub (default: what the engine names; an engine from a local folder needs it)",
    )
    parser.add_argument(
        "--warmup",
        type=natural_number,
        default=_DEFAULTS.warmup,
        metavar="N",
        help="runs before the first timed one (default %(default)s)",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--repeats", type=whole_number, metavar="N", help="timed runs of each contestant in each case"
    )
    length.add_argument(
        "--seconds",
        type=float,
        default=_DEFAULTS.seconds,
        metavar="S",
        help="or the time for them (default %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=whole_number,
        default=_DEFAULTS.rounds,
        metavar="N",
        help="how often each takes its turn (default %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=natural_number,
        default=_DEFAULTS.seed,
        metavar="N",
        help="of the token ids (default %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=_DEFAULTS.timeout,
        metavar="S",
        help="seconds that one step may take (default %(default)s)",
    )
    # A benchmark's JSON is a record to keep: unlike other commands', it goes to a file, beside the table.
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write all figures to a file too, or to standard output alone with '-'",
    )


def _run(args: argparse.Namespace) -> int:
    """Measure and report; exit code 1 when the contestants do not answer the same."""
    options = _options(args)
    target = args.json
    if target not in (None, _STANDARD_OUTPUT):
        _check_writable(Path(target))
    try:
        with Progress("turns", total=count_steps(options)) as progress:
            report = measure(options, on_step=progress.advance)
    except AnswersDisagreeError as error:
        note(f"check failed: {error}")
        return EXIT_CHECK_FAILED
    if target == _STANDARD_OUTPUT:
        sys.stdout.write(report.to_json_text())
        sys.stdout.flush()
        return EXIT_OK
    emit(report.to_text(), as_json=False)
    if target is not None:
        write_atomically(target, report.to_json_text())
        note(f"wrote {target}")
    return EXIT_OK


def _options(args: argparse.Namespace) -> BenchOptions:
    """The options that the arguments mean.

    Raises:
        InputError: one is not of its kind, or out of range.
    """
    tasks: list[Task] = []
    for name in args.task.split(","):
        if name not in TASKS:
            raise InputError(f"there is no task {name!r}; choose from {', '.join(TASKS)}")
        tasks.append(name)
    return BenchOptions(
        engine=args.engine,
        tasks=tuple(tasks),
        batches=_numbers(args, "batch", _DEFAULTS.batches),
        sequences=_numbers(args, "sequence", _DEFAULTS.sequences),
        lengths_from=args.lengths_from,
        paragraphs=args.paragraphs,
        threads=args.threads,
        against=tuple(args.against.split(",")) if args.against else (),
        reference=args.reference,
        backend=args.backend,
        verify=not args.no_verify,
        warmup=args.warmup,
        repeats=args.repeats,
        seconds=args.seconds,
        rounds=args.rounds,
        seed=args.seed,
        timeout=args.timeout,
    )


def _numbers(args: argparse.Namespace, option: str, default: Sequence[int]) -> Sequence[int]:
    given = getattr(args, option)
    if given is not None:
        return parse_numbers(option, given)
    # A mix alone is asked for, unless shapes are too.
    alone = args.lengths_from is not None and args.batch is None and args.sequence is None
    return () if alone else default


def _check_writable(path: Path) -> None:
    # Before the measurement, not after it.
    parent = path.absolute().parent
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(
            f"cannot write {str(path)!r}: it is a folder, or in a folder that is not there or read-only; "
            "name a file"
        )


def _join(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


COMMAND = Command(
    name="bench",
    help="measure an engine's speed, in turns with a rival",
    example="bertrt bench demo --batch 1,8 --sequence 16,128 --threads 2 --against torch\n"
    "bertrt bench engine --task fill-mask,mlm-all --batch 1 --sequence 128 --repeats 200 --json bench.json\n"
    "bertrt bench engine --lengths-from book.txt --against onnxruntime,openvino",
    add_arguments=_add_arguments,
    run=_run,
)
