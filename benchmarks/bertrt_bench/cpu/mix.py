"""Real lengths for an engine whose vocabulary is made up."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from bertrt.tokenization import WordPieceTokenizer
from bertrt_bench.cpu.options import BASE, DEMO
from bertrt_bench.lengths import read_lengths
from bertrt_bench.options import BenchOptions
from bertrt_export.checkpoints import RANDOM_MODELS
from bertrt_export.demo import demo_folder, evaluation_text

# One token in every vocabulary of BERT's, the made-up ones included.
_WORD: Final = "a"
_SPECIAL_TOKENS: Final = 2


def write_mix(text: Path | None, folder: Path) -> str:
    """Write a text whose paragraphs have, in any vocabulary, as many tokens as another's have in the demo's.

    The made-up vocabulary of random weights knows few words: a real text is half as long again in it as in one that was
    learnt from texts.

    Args:
        text: the other one; ``None`` for the built-in one.
        folder: where it is written.

    Returns:
        The file's name.

    Raises:
        InputError: the text cannot be read, or has no paragraph with a token.
        TextEncodingError: it is not UTF-8.
    """
    text = text or evaluation_text()
    lengths = read_lengths(
        text,
        WordPieceTokenizer.from_folder(demo_folder()),
        most=BenchOptions(engine=DEMO).paragraphs,
        # The demo model has as many positions.
        max_length=RANDOM_MODELS[BASE].max_position_embeddings,
    )
    lines = (" ".join([_WORD] * (length - _SPECIAL_TOKENS)) for length in lengths.tokens)
    path = folder / mix_name(text)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path.name


def mix_name(text: Path | None) -> str:
    """The name of what `write_mix` writes."""
    return f"lengths-of-{(text or evaluation_text()).name}"
