"""``bertrt demo``: the main job from end to end, each step shown as the command that a user would type."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import shlex
from pathlib import Path
from typing import Any, get_args

from bertrt.cli import main
from bertrt.cli.command import EXIT_OK, Command
from bertrt.cli.console import emit, note
from bertrt.manifest import Precision
from bertrt_export.targets import TARGETS

_TEXTS = (
    "He sat down in the [MASK] and looked out of the window.",
    "The man worked as a [MASK].",
    "The woman worked as a [MASK].",
)
_FOLLOWS = ("She opened the door and looked out.", "There was nobody in the street.")
_RANDOM = ("She opened the door and looked out.", "The strata of the lower chalk contain no such fossils.")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-engine"),
        help="the engine folder to make (default demo-engine)",
    )
    parser.add_argument(
        "--precision",
        # The engine is made for CPUs.
        choices=[precision for precision in get_args(Precision) if TARGETS[precision]],
        default="int8",
        help="of the engine (default int8)",
    )


def _steps(out: str, precision: str) -> list[tuple[str, ...]]:
    return [
        ("export", "demo", out, "--precision", precision, "--overwrite"),
        ("info", out),
        ("fill-mask", out, *_TEXTS, "--top-k", "3"),
        ("next-sentence", out, *_FOLLOWS),
        ("next-sentence", out, *_RANDOM),
        ("features", out, "Replace me by any text you'd like.", "--pooling", "mean"),
        ("drift", out),
        ("bench", out, "--batch", "1,8", "--sequence", "16,128", "--against", "torch"),
    ]


def _run(args: argparse.Namespace) -> int:
    # The last two hold the engine against PyTorch.
    reference = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    answers, code = [], EXIT_OK
    for step in _steps(str(args.out), args.precision):
        if step[0] in {"drift", "bench"} and not reference:
            note(f'left out "bertrt {step[0]}": it needs pip install "bertrt[torch]"')
            continue
        if args.json:
            code, answer = _captured(step)
            answers.append({"command": ["bertrt", *step], "exit_code": code, "answer": answer})
        else:
            print(f"\n$ bertrt {shlex.join(step)}", flush=True)
            code = main(step)
        if code != EXIT_OK:
            break
    if args.json:
        emit(answers, as_json=True)
    return code


def _captured(step: tuple[str, ...]) -> tuple[int, list[Any]]:
    """Run a step with JSON on its standard output; its exit code and the values that it wrote."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        # bench takes the place of its JSON, and writes it over many lines.
        code = main([*step, "--json", *(["-"] if step[0] == "bench" else [])])
    text = output.getvalue()
    try:
        return code, [json.loads(text)]
    except ValueError:
        return code, [json.loads(line) for line in text.splitlines() if line]


COMMAND = Command(
    name="demo",
    help="export the demo model, ask it, measure its drift and its speed",
    example="bertrt demo\nbertrt demo --out my-engine --precision fp32",
    add_arguments=_add_arguments,
    run=_run,
)
