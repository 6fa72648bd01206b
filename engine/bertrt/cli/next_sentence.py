"""``bertrt next-sentence``: the probability that text B follows text A."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import get_args

from bertrt.cli.answers import in_order
from bertrt.cli.command import EXIT_OK, Command
from bertrt.cli.console import Progress, emit, printable
from bertrt.cli.engines import add_engine_arguments, open_engine
from bertrt.cli.texts import Line, Lines, add_text_arguments, open_lines
from bertrt.errors import InputError
from bertrt.tasks.next_sentence import PairOverflow

_SEPARATOR = "\t"
# From here on B is said to follow A; the softmax over the head's two classes has its larger value there.
_FOLLOWS_FROM = 0.5


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    add_text_arguments(parser, pairs=True)
    parser.add_argument(
        "--overflow",
        choices=get_args(PairOverflow),
        default="error",
        help="of a pair that is longer than the model allows: refuse it, or cut the longer text "
        "(default: %(default)s)",
    )


def _run(args: argparse.Namespace) -> int:
    with _open_pairs(args) as lines, open_engine(args) as engine:

        def ask(chunk: Sequence[Line]) -> list[float]:
            a, b = zip(*(_split(line.text, index) for index, line in enumerate(chunk)), strict=True)
            return engine.next_sentence(a, b, overflow=args.overflow)

        with Progress("pairs", beside_output=True) as progress:
            for chunk, answers in in_order(lines, ask):
                for line, probability in zip(chunk, answers, strict=True):
                    if args.json:
                        follows = probability >= _FOLLOWS_FROM
                        emit({"probability": probability, "is_next": follows}, as_json=True)
                    else:
                        a, b = map(printable, _split(line.text, 0))
                        emit(f"{probability:.4f}  {a} -> {b}", as_json=False)
                progress.advance(len(chunk))
    return EXIT_OK


def _open_pairs(args: argparse.Namespace) -> Lines:
    """The lines with pairs; two arguments are one such line."""
    if not args.texts or args.texts == ["-"]:
        return open_lines(args)
    if len(args.texts) != 2:
        raise InputError(f"expected two texts, A and B, got {len(args.texts)}; quote each of them")
    texts = [line.text for line in open_lines(args)]
    for number, text in enumerate(texts, start=1):
        if _SEPARATOR in text:
            raise InputError(f"text {number} has a tab in it, which separates A from B; write a space")
    return Lines.of_arguments([_SEPARATOR.join(texts)], called="pair")


def _split(text: str, index: int) -> tuple[str, str]:
    """The two texts of a line; a message names it by its index in the call, as the engine's do."""
    parts = text.split(_SEPARATOR)
    if len(parts) != 2:
        raise InputError(
            f"pair {index} has {len(parts) - 1} tabs, expected one, between A and B; correct the line",
            index=index,
        )
    return parts[0], parts[1]


COMMAND = Command(
    name="next-sentence",
    help="the probability that text B follows text A",
    example="""
bertrt next-sentence demo "The rain had stopped." "He closed his umbrella."
bertrt next-sentence demo --json --file pairs.tsv > answers.jsonl
""",
    add_arguments=_add_arguments,
    run=_run,
)
