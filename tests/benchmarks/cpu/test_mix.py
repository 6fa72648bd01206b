"""Real lengths in a vocabulary that is made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from bertrt.errors import TextEncodingError
from bertrt.tokenization import WordPieceTokenizer
from bertrt_bench.cpu.mix import mix_name, write_mix
from bertrt_bench.lengths import read_lengths
from bertrt_export.checkpoints.random_weights import random_model
from bertrt_export.demo import demo_folder, evaluation_text


@pytest.mark.parametrize("own", [False, True])
def test_as_many_tokens_in_every_vocabulary(tmp_path: Path, own: bool) -> None:
    text = None
    if own:
        text = tmp_path / "prose.txt"
        # A paragraph of one token, and one that no model has the positions for.
        text.write_text("Why?\n\nNo\n\n" + "It was late. " * 400 + "\n", encoding="utf-8")
    folder = tmp_path / "run"
    folder.mkdir()
    assert write_mix(text, folder) == mix_name(text)
    demo = WordPieceTokenizer.from_folder(demo_folder())
    _, random = random_model("bert-base-cased")
    real = read_lengths(text or evaluation_text(), demo, most=512, max_length=512)
    for tokenizer in (demo, random):
        mix = read_lengths(folder / mix_name(text), tokenizer, most=512, max_length=512)
        assert mix.tokens == real.tokens
        assert mix.cut == 0


def test_a_text_that_is_not_utf8(tmp_path: Path) -> None:
    text = tmp_path / "prose.txt"
    text.write_bytes(b"\xff\xfe")
    with pytest.raises(TextEncodingError, match="is not UTF-8"):
        write_mix(text, tmp_path)
