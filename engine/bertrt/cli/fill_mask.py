"""``bertrt fill-mask``: the likeliest tokens for each mask of a text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Final, cast, get_args

from bertrt.cli.answers import CHUNK, in_order
from bertrt.cli.command import EXIT_OK, Command
from bertrt.cli.console import Progress, emit, printable, table
from bertrt.cli.engines import add_engine_arguments, natural_number, open_engine, whole_number
from bertrt.cli.texts import Line, add_text_arguments, open_lines
from bertrt.tasks.fill_mask import DEFAULT_MAX_MASKS, DEFAULT_TOP_K, MaskPrediction, TextPredictions
from bertrt.tokenization import Overflow

# Predictions for the texts of one call; each holds its text filled in.
_MOST_PREDICTIONS: Final = 1 << 16


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    add_text_arguments(parser)
    parser.add_argument(
        "--top-k",
        type=whole_number,
        default=DEFAULT_TOP_K,
        metavar="K",
        help="answers for each mask (default: %(default)s)",
    )
    parser.add_argument(
        "--targets",
        action="append",
        metavar="TOKEN",
        help="rank this token; may be repeated, and then only these are ranked",
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
        help="tokens by which windows overlap (default: half a window)",
    )
    parser.add_argument(
        "--max-masks",
        type=whole_number,
        default=DEFAULT_MAX_MASKS,
        metavar="N",
        help="refuse a text with more masks than this (default: %(default)s)",
    )


def _run(args: argparse.Namespace) -> int:
    with open_lines(args) as lines, open_engine(args) as engine:

        def ask(chunk: Sequence[Line]) -> list[TextPredictions]:
            return engine.fill_mask(
                [line.text for line in chunk],
                top_k=args.top_k,
                targets=args.targets,
                overflow=args.overflow,
                stride=args.stride,
                max_masks=args.max_masks,
            )

        size = max(1, min(CHUNK, _MOST_PREDICTIONS // args.top_k))
        with Progress("texts", beside_output=True) as progress:
            for chunk, answers in in_order(lines, ask, size=size):
                for line, answer in zip(chunk, answers, strict=True):
                    emit(answer if args.json else _shown(line.text, answer), as_json=args.json)
                progress.advance(len(chunk))
    return EXIT_OK


def _shown(text: str, answer: TextPredictions) -> str:
    """A text and, below it, a table for each of its masks."""
    several = isinstance(answer[0], list)
    masks = cast(list[list[MaskPrediction]], answer if several else [answer])
    parts = [printable(text)]
    for number, predictions in enumerate(masks, start=1):
        if several:
            parts.append(f"  mask {number}")
        rows = [(_score(found["score"]), found["token_str"], found["sequence"]) for found in predictions]
        parts.append(table([("score", "token", "sequence"), *rows], align=">"))
    return "\n".join(parts) + "\n"


def _score(score: float) -> str:
    # Four places, and for what they cannot show, an exponent.
    return f"{score:.4f}" if score >= 0.0001 else f"{score:.0e}"


COMMAND = Command(
    name="fill-mask",
    help="the likeliest words for each [MASK] of a text",
    example="""
bertrt fill-mask demo "He opened the [MASK] and went into the house."
bertrt fill-mask demo --top-k 3 --json --file texts.txt > answers.jsonl
bertrt fill-mask demo "The [MASK] worked all day." --targets man --targets woman
""",
    add_arguments=_add_arguments,
    run=_run,
)
