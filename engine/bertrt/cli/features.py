"""``bertrt features``: vectors for texts, as JSON Lines or as a NumPy file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, get_args

import numpy as np

from bertrt.backends.base import Float32
from bertrt.cli.answers import CHUNK, in_order
from bertrt.cli.command import EXIT_OK, Command
from bertrt.cli.console import Progress, emit, printable
from bertrt.cli.engines import add_engine_arguments, natural_number, open_engine
from bertrt.cli.npy import NpyWriter
from bertrt.cli.texts import Line, Lines, add_text_arguments, open_lines
from bertrt.engine import Engine
from bertrt.errors import BackendRunError, InputError
from bertrt.tasks.features import Pooling
from bertrt.tokenization import Overflow

_SUFFIX: Final = ".npy"
# Of one call, where a text has not one vector but hundreds.
_MATRICES: Final = 8


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    add_text_arguments(parser)
    parser.add_argument(
        "--pooling",
        choices=get_args(Pooling),
        default="mean",
        help="one vector a text: the mean over its tokens, that of [CLS], or the pooler's output; or 'none': "
        "one vector for every token (default: %(default)s)",
    )
    parser.add_argument(
        "--overflow",
        choices=get_args(Overflow),
        default="error",
        help="of a text that is longer than the model allows: refuse it, cut it, or go over it in windows "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--stride",
        type=natural_number,
        metavar="N",
        help="tokens by which windows overlap (default: a quarter of a window)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.npy",
        help="write one float32 array [texts, hidden] there; without it, each vector is a line of JSON",
    )


def _run(args: argparse.Namespace) -> int:
    output: Path | None = args.output
    if output is not None and output.suffix != _SUFFIX:
        raise InputError(f"--output writes NumPy files, expected a name that ends in {_SUFFIX}, got {output}")
    if output is not None and args.pooling == "none":
        raise InputError("--output needs one vector a text; choose --pooling mean, cls or pooler")
    with open_lines(args) as lines, open_engine(args) as engine:
        if output is None:
            _write_json_lines(args, lines, engine)
        else:
            _write_array(args, lines, engine, output)
    return EXIT_OK


def _write_json_lines(args: argparse.Namespace, lines: Lines, engine: Engine) -> None:
    with Progress("texts", beside_output=True) as progress:
        size = _MATRICES if args.pooling == "none" else CHUNK
        for chunk, answers in in_order(lines, lambda chunk: _ask(args, engine, chunk), size=size):
            for answer in answers:
                _write_json(answer)
            sys.stdout.flush()
            progress.advance(len(chunk))


def _write_array(args: argparse.Namespace, lines: Lines, engine: Engine, output: Path) -> None:
    with NpyWriter(output) as writer, Progress("texts") as progress:
        for chunk, answers in in_order(lines, lambda chunk: _ask(args, engine, chunk)):
            writer.write(np.stack(answers))
            progress.advance(len(chunk))
    if args.json:
        shape = [writer.rows, writer.columns]
        emit(
            {"output": str(output), "shape": shape, "dtype": "float32", "pooling": args.pooling}, as_json=True
        )
    else:
        emit(
            f"{printable(str(output))}: float32 [{writer.rows}, {writer.columns}], pooling {args.pooling}",
            as_json=False,
        )


def _ask(args: argparse.Namespace, engine: Engine, chunk: Sequence[Line]) -> Sequence[Float32]:
    answers: Sequence[Float32] = list(
        engine.features(
            [line.text for line in chunk], pooling=args.pooling, overflow=args.overflow, stride=args.stride
        )
    )
    return answers


def _write_json(array: Float32) -> None:
    """Write a vector, or a matrix row by row, as a line of JSON; nine digits give back every float32."""
    if not np.isfinite(array).all():
        raise BackendRunError("a feature is NaN or infinite, which JSON cannot hold; export the engine again")
    if array.ndim == 1:
        sys.stdout.write(_vector(array) + "\n")
        return
    # A text in many windows has a row for each of its tokens: as one string they take gigabytes.
    for number, row in enumerate(array):
        sys.stdout.write((", " if number else "[") + _vector(row))
    sys.stdout.write("]\n")


def _vector(row: Float32) -> str:
    return "[" + ", ".join([f"{value:.9g}" for value in row.tolist()]) + "]"


COMMAND = Command(
    name="features",
    help="vectors for texts",
    example="""
bertrt features demo "Replace me by any text you'd like."
bertrt features demo --pooling cls --file texts.txt --output vectors.npy
bertrt features demo --pooling none "Every token gets a vector." > tokens.jsonl
""",
    add_arguments=_add_arguments,
    run=_run,
)
