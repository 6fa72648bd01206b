"""``python -m bertrt_bench.cpu``: the command line of a run."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, get_args

from bertrt.cli.command import EXIT_BAD_INPUT, EXIT_CHECK_FAILED, EXIT_OK
from bertrt.cli.console import note, printable
from bertrt.cli.engines import whole_number
from bertrt.errors import BertRTError
from bertrt_bench.cpu.options import BASE, DEFAULT_SECONDS, CpuOptions, Model
from bertrt_bench.cpu.run import run
from bertrt_bench.cpu.summary import failures
from bertrt_bench.signals import ENDED_BY_SIGNAL, signals_raise

_PROGRAM: Final = "python -m bertrt_bench.cpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0 done, 1 a step failed, an engine drifted over its budgets or a bar that applies was missed,
        2 bad input or no kernels, 128 + n when signal n ended it.
    """
    try:
        record = run(_options(_parser().parse_args(argv)))
    except KeyboardInterrupt:
        return _fail("interrupted; the records hold what was measured", ENDED_BY_SIGNAL + signal.SIGINT)
    except BertRTError as error:
        return _fail(str(error), EXIT_BAD_INPUT)
    except OSError as error:
        return _fail(f"{error.strerror or error} ({error.filename})", EXIT_BAD_INPUT)
    failed = failures(record)
    for line in failed:
        note(f"failed: {line}")
    note(f"wrote {record.summary}, and beside it what it sums up")
    return EXIT_CHECK_FAILED if failed else EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Measure everything that is claimed about the native backend on a processor, in one run: speed "
        "beside its rivals, every instruction set, drift. What is not there is skipped by name.",
        epilog="exit codes: 0 done, 1 something failed or missed its bar, 2 bad input",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for the records, a JSON file each, and their summary, cpu.md",
    )
    parser.add_argument(
        "--model",
        choices=get_args(Model),
        default=BASE,
        help="demo tries the run with a small model, and the summary says so (default %(default)s, random weights)",
    )
    parser.add_argument(
        "--threads",
        type=whole_number,
        metavar="N",
        help="of everyone (default: the processors that this process may use)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=DEFAULT_SECONDS,
        metavar="S",
        help="timed, of each contestant in each case, where no number of runs is fixed (default %(default)s)",
    )
    parser.add_argument(
        "--only", default="", metavar="WORD[,...]", help="take the steps whose names hold one of these words"
    )
    parser.add_argument(
        "--lengths-from",
        type=Path,
        metavar="FILE",
        help="run sequences as long as the paragraphs of this text (default: a public-domain novel)",
    )
    return parser


def _options(args: argparse.Namespace) -> CpuOptions:
    return CpuOptions(
        out=args.out,
        model=args.model,
        threads=args.threads,
        seconds=args.seconds,
        only=tuple(args.only.split(",")) if args.only else (),
        lengths_from=args.lengths_from,
    )


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"{_PROGRAM}: error: {printable(' '.join(message.split()))}\n")
    return code


if __name__ == "__main__":
    with signals_raise():
        sys.exit(main())
