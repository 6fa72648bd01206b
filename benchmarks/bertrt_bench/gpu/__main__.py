"""``python -m bertrt_bench.gpu``: the command line of a run."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, get_args

from bertrt.cli.command import EXIT_BAD_INPUT, EXIT_CHECK_FAILED, EXIT_OK
from bertrt.cli.console import note, printable
from bertrt.cli.engines import natural_number
from bertrt.errors import BertRTError
from bertrt_bench.gpu.device import Gpu
from bertrt_bench.gpu.options import DEFAULT_MINUTES, Device, GpuOptions
from bertrt_bench.gpu.run import run
from bertrt_bench.signals import ENDED_BY_SIGNAL, signals_raise

_PROGRAM: Final = "python -m bertrt_bench.gpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0 done, 1 a step, a check of answers or a drift budget failed, 2 bad input or no GPU, 128 + n
        when signal n ended it.
    """
    try:
        options = _options(_parser().parse_args(argv))
        with contextlib.ExitStack() as stack:
            gpu = None if options.rehearsal else stack.enter_context(Gpu())
            if gpu is not None:
                stack.enter_context(_variables(gpu.environment))
            record = run(options, gpu=gpu)
    except KeyboardInterrupt:
        return _fail("interrupted; the record holds what was measured", ENDED_BY_SIGNAL + signal.SIGINT)
    except BertRTError as error:
        return _fail(str(error), EXIT_BAD_INPUT)
    except OSError as error:
        return _fail(f"{error.strerror or error} ({error.filename})", EXIT_BAD_INPUT)
    for line in record.failed:
        note(f"failed: {line}")
    note(f"wrote {' and '.join(map(str, record.paths()))}")
    return EXIT_CHECK_FAILED if record.failed else EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Measure everything on a GPU in one run: engines exported and built, drift checked, latency beside "
        "PyTorch's. What is not installed is skipped by name.",
        epilog="exit codes: 0 done, 1 something failed, 2 bad input or no GPU",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the record: gpu.json and gpu.md"
    )
    parser.add_argument(
        "--device",
        choices=get_args(Device),
        default="cuda",
        help="cpu rehearses the script with a small model, and its record (rehearsal.json) says so",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=DEFAULT_MINUTES,
        metavar="N",
        help="that the run may take (default %(default)s); steps that find no time left are skipped by name",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="CHECKPOINT",
        help="a folder, 'demo' or a name on the hub (default: random weights in bert-base-cased's shape for the speed, "
        "the demo checkpoint for the drift)",
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="for the drift check: UTF-8, paragraphs one a line (default: a public-domain novel)",
    )
    parser.add_argument(
        "--lengths-from",
        type=Path,
        metavar="FILE",
        help="run sequences as long as the paragraphs of this text (default: the same novel)",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="WORD[,...]",
        help="take the steps whose names hold one of these words, and the turns",
    )
    parser.add_argument(
        "--seed", type=natural_number, default=0, metavar="N", help="of the token ids (default %(default)s)"
    )
    return parser


def _options(args: argparse.Namespace) -> GpuOptions:
    return GpuOptions(
        out=args.out,
        device=args.device,
        minutes=args.minutes,
        checkpoint=args.checkpoint,
        text=args.text,
        lengths_from=args.lengths_from,
        only=tuple(args.only.split(",")) if args.only else (),
        seed=args.seed,
    )


@contextlib.contextmanager
def _variables(changes: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment, which the processes of the run inherit."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"{_PROGRAM}: error: {printable(' '.join(message.split()))}\n")
    return code


if __name__ == "__main__":
    with signals_raise():
        sys.exit(main())
