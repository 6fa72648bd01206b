"""Pretrain the small cased BERT that BertRT ships as its demo: masked tokens and next sentences.

Run from the root of the repository: ``python -m tools.pretrain_demo CORPUS OUT`` (see tools/README.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bertrt.errors import BertRTError, InputError
from bertrt.folder import write_folder

from . import corpus as corpora
from .examples import ExampleSource
from .model import ModelShape, load_model, new_model, round_weights, save_model
from .training import CONTINUED, FINAL, FROM_SCRATCH, Figures, Recipe, Run, evaluate, train

_EXAMPLE = """\
the demo model, on two cores in some 80 and 20 minutes:
  python -m tools.pretrain_demo books.txt first
  python -m tools.pretrain_demo books.txt demo --resume first
"""
_SHAPE_OPTIONS = ("layers", "hidden", "vocabulary")
_RECIPE_OPTIONS = (
    "steps",
    "minutes",
    "learning_rate",
    "batch",
    "warmup_steps",
    "seed",
    "report_every",
    "evaluate_every",
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    shape, recipe = ModelShape(), Recipe(phase=FROM_SCRATCH)
    parser = argparse.ArgumentParser(
        prog="pretrain_demo",
        description="Pretrain a small cased BERT with masked tokens and next sentences, and write it for "
        "transformers' from_pretrained. The last line of the output gives the figures as JSON.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # An option that is not given takes its default from Recipe or ModelShape.
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "corpus", type=Path, help="UTF-8 text: a paragraph a line, a blank line between chapters"
    )
    parser.add_argument("out", type=Path, help="folder to write; it must not exist")
    parser.add_argument(
        "--resume", type=Path, default=None, metavar="FOLDER", help="train the model of this folder further"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--steps",
        type=int,
        help=f"length of the run (default {FROM_SCRATCH.steps}; with --resume {CONTINUED.steps})",
    )
    length.add_argument(
        "--minutes", type=float, help="length of the run by the clock; such a run cannot be repeated exactly"
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        help=f"peak (default {FROM_SCRATCH.learning_rate}; with --resume {CONTINUED.learning_rate})",
    )
    parser.add_argument(
        "--warmup-steps", type=int, help=f"steps up to the peak (default {recipe.warmup_steps})"
    )
    parser.add_argument(
        "--batch",
        type=int,
        help=f"sequences of 64 tokens in a step; longer ones are fewer (default {recipe.batch})",
    )
    parser.add_argument("--seed", type=int, help=f"of weights and examples (default {recipe.seed})")
    parser.add_argument(
        "--threads", type=int, default=None, help="CPU threads (default: PyTorch's own choice)"
    )
    parser.add_argument("--layers", type=int, help=f"of a new model (default {shape.layers})")
    parser.add_argument(
        "--hidden", type=int, help=f"of a new model, a multiple of 64 (default {shape.hidden})"
    )
    parser.add_argument(
        "--vocabulary", type=int, help=f"WordPieces of a new model (default {shape.vocabulary})"
    )
    parser.add_argument(
        "--report-every", type=int, help=f"steps between progress lines (default {recipe.report_every})"
    )
    parser.add_argument(
        "--evaluate-every",
        type=int,
        help=f"steps between measurements on held-out text (default {recipe.evaluate_every})",
    )
    return parser


def pretrain(options: argparse.Namespace) -> tuple[Run, list[Figures]]:
    """Read the corpus, train, measure, and write the folder, whole or not at all.

    Raises:
        InputError: the corpus or an option will not do, or the folder to write exists.
        CheckpointError: the folder to train further is not a model of this program.
        NonFiniteWeightsError: training diverged.
        ExportError: the folder cannot be written.
    """
    given = vars(options)
    resume: Path | None = options.resume
    if options.out.exists() or options.out.is_symlink():
        raise InputError(f"{str(options.out)!r} exists; remove it or choose another place")
    shape = {name: given[name] for name in _SHAPE_OPTIONS if name in given}
    if resume is not None and shape:
        raise InputError(f"--{', --'.join(shape)} cannot be chosen with --resume: the folder decides")
    recipe = Recipe(
        phase=FROM_SCRATCH if resume is None else CONTINUED,
        **{name: given[name] for name in _RECIPE_OPTIONS if name in given},
    )
    if options.threads is not None:
        if options.threads < 1:
            raise InputError(f"threads is {options.threads}; expected at least 1")
        torch.set_num_threads(options.threads)
    if resume is None:
        size = ModelShape(**shape)
        documents = corpora.read_documents(options.corpus)
        vocabulary = corpora.train_vocabulary(documents, size.vocabulary)
        model = new_model(size, seed=recipe.seed)
    else:
        model, vocabulary = load_model(resume)
        documents = corpora.read_documents(options.corpus)
    training, held_out = corpora.hold_out(corpora.tokenize(documents, vocabulary))
    _report(
        f"{len(training)} documents of {len(training.tokens)} tokens to learn from, "
        f"{len(held_out)} documents held out, {len(vocabulary)} WordPieces"
    )
    held_out_examples = ExampleSource(held_out, vocabulary)
    # Opened before the training, so that a place that cannot be written is known at once.
    with write_folder(options.out) as folder:
        run = train(model, ExampleSource(training, vocabulary), held_out_examples, recipe, _report)
        round_weights(model)
        figures = [evaluate(model, held_out_examples, measurement) for measurement in FINAL]
        save_model(model, vocabulary, folder)
    return run, figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0 when done, 2 for bad input, 130 when interrupted."""
    options = build_parser().parse_args(arguments)
    try:
        run, figures = pretrain(options)
    except BertRTError as error:
        print(f"pretrain_demo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pretrain_demo: interrupted; nothing was written", file=sys.stderr)
        return 130
    for each in figures:
        _report(str(each))
    summary = {
        "out": str(options.out),
        **dataclasses.asdict(run),
        "threads": torch.get_num_threads(),
        "held_out": [dataclasses.asdict(each) for each in figures],
    }
    print(json.dumps(summary))
    return 0


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
