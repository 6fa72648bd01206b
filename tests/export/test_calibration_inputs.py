"""What calibration makes of a text: windows, masks, segments, and what it refuses."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from bertrt.errors import BertRTError, CalibrationError, EmptyTextError, InputError, TextEncodingError
from bertrt_export.calibration import inputs
from bertrt_export.calibration.inputs import (
    DEFAULT_TEXTS,
    FEWEST_TEXTS,
    RANDOM_TEXTS,
    CalibrationInputs,
    default_text,
    make_inputs,
)
from bertrt_export.checkpoints import Checkpoint, open_checkpoint
from bertrt_export.checkpoints.random_weights import RANDOM_MODELS
from bertrt_export.demo import evaluation_text

LINES = [f"number {letter} of them" for letter in "abcdefghijklmnopqrst"]


@pytest.fixture(scope="module")
def demo() -> Iterator[Checkpoint]:
    with open_checkpoint("demo") as checkpoint:
        yield checkpoint


def inputs_of(checkpoint: Checkpoint, text: Path | str | None, **options: Any) -> CalibrationInputs:
    options = {"max_texts": DEFAULT_TEXTS, "max_tokens": 128, "seed": 0} | options
    return make_inputs(checkpoint, text, **options)


def plain(checkpoint: Checkpoint, text: str) -> list[int]:
    [[encoded]] = checkpoint.tokenizer.encode([text], max_length=512)
    return encoded.input_ids.tolist()


def test_texts_come_plain_and_masked_alone_and_as_pairs(demo: Checkpoint) -> None:
    found = inputs_of(demo, "\n".join(LINES), max_texts=len(LINES))
    tokenizer = demo.tokenizer
    assert (found.texts, len(found.sequences)) == (len(LINES), len(LINES))
    for number, (sequence, line) in enumerate(zip(found.sequences, LINES, strict=True)):
        ids, segments = sequence.input_ids, sequence.token_type_ids
        content = plain(demo, line)[1:-1]
        assert (ids[0], ids[-1]) == (tokenizer.cls_id, tokenizer.sep_id)
        if number % 4 > 1:
            separator = int(np.flatnonzero(ids == tokenizer.sep_id)[0])
            assert segments.tolist() == [0] * (separator + 1) + [1] * (len(ids) - separator - 1)
            assert separator == 1 + len(content) // 2
            shown = np.delete(ids, separator)[1:-1]
        else:
            assert not segments.any()
            shown = ids[1:-1]
        masked = shown == tokenizer.mask_id
        assert masked.any() == (number % 2 == 1)
        assert shown[~masked].tolist() == np.array(content)[~masked].tolist()


def test_a_short_text_is_run_in_every_way_and_never_more_often(demo: Checkpoint) -> None:
    text = "\n".join(LINES)
    for max_texts, rounds in ((20, 1), (39, 1), (40, 2), (79, 3), (1000, 4)):
        found = inputs_of(demo, text, max_texts=max_texts)
        assert (found.texts, len(found.sequences)) == (20, 20 * rounds)
    # Each text then has all four.
    for start in range(20):
        kinds = {
            (bool(sequence.token_type_ids.any()), bool((sequence.input_ids == demo.tokenizer.mask_id).any()))
            for sequence in found.sequences[start::20]
        }
        assert len(kinds) == 4


def test_the_first_texts_are_taken(demo: Checkpoint) -> None:
    found = inputs_of(demo, "\n".join(LINES), max_texts=9)
    assert found.texts == 9
    assert found.sequences[8].input_ids.tolist() == plain(demo, LINES[8])


def test_about_a_seventh_of_the_tokens_is_masked(demo: Checkpoint) -> None:
    found = inputs_of(demo, evaluation_text(), max_texts=400)
    masked = [sequence.input_ids for sequence in found.sequences[1::2]]
    shares = np.concatenate([ids == demo.tokenizer.mask_id for ids in masked])
    # 15 % of some 16,000 tokens: 0.3 points of deviation, and one more mask in each text.
    assert 0.13 < shares.mean() < 0.19
    again = inputs_of(demo, evaluation_text(), max_texts=400)
    other = inputs_of(demo, evaluation_text(), max_texts=400, seed=1)
    same = [
        [
            np.array_equal(a.input_ids, b.input_ids)
            for a, b in zip(found.sequences, more.sequences, strict=True)
        ]
        for more in (again, other)
    ]
    assert all(same[0])
    assert not all(same[1])


@pytest.mark.parametrize("max_tokens", [128, 16])
def test_a_long_text_becomes_windows_and_loses_nothing(demo: Checkpoint, max_tokens: int) -> None:
    words = " ".join(f"word{number}" for number in range(300))
    found = inputs_of(demo, words, max_tokens=max_tokens, max_texts=1000)
    content = plain_content(demo, words)
    assert max(len(sequence.input_ids) for sequence in found.sequences) == max_tokens
    size = max_tokens - 2
    assert found.texts == -(-len(content) // size)
    # In four rounds each window is run once as it is.
    rounds = len(found.sequences) // found.texts
    assert rounds == 4
    for window in range(found.texts):
        turn = -window % 4
        ids = found.sequences[turn * found.texts + window].input_ids
        assert ids[1:-1].tolist() == content[window * size : (window + 1) * size]


def plain_content(checkpoint: Checkpoint, text: str) -> list[int]:
    [windows] = checkpoint.tokenizer.encode([text], max_length=512, overflow="window")
    return [token for window in windows for token in window.input_ids[1:-1].tolist()]


def test_a_model_bounds_its_sequences(small_bert: Any, save_checkpoint: Any) -> None:
    folder = save_checkpoint(small_bert(type_vocab_size=1))
    with open_checkpoint(folder) as checkpoint:
        found = inputs_of(checkpoint, "\n".join(["a b c " * 60] * 10))
    # 50 positions, one segment.
    assert max(len(sequence.input_ids) for sequence in found.sequences) == 50
    assert not any(sequence.token_type_ids.any() for sequence in found.sequences)


def test_no_masks_without_their_head(save_checkpoint: Any, small_bert: Any) -> None:
    model = small_bert()
    encoder = transformers.BertModel(model.config).eval()
    encoder.load_state_dict(model.bert.state_dict())
    with open_checkpoint(save_checkpoint(encoder)) as checkpoint:
        assert not checkpoint.heads.mlm
        found = inputs_of(checkpoint, "\n".join("abcdefghij"))
        mask_id = checkpoint.tokenizer.mask_id
    assert not any((sequence.input_ids == mask_id).any() for sequence in found.sequences)


def test_a_file_its_name_and_its_hash(demo: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "my texts.txt"
    data = b"\xef\xbb\xbf" + "\r\n\n  \n".join(LINES).encode() + b"\n" + b"tail " * 100_000
    path.write_bytes(data)
    found = inputs_of(demo, path, max_texts=len(LINES))
    # The hash is that of the whole file, though its end was not needed.
    assert (found.name, found.sha256) == ("my texts.txt", hashlib.sha256(data).hexdigest())
    assert found.sequences[0].input_ids.tolist() == plain(demo, LINES[0])
    text = "\n".join(LINES)
    given = inputs_of(demo, text, max_texts=len(LINES))
    assert (given.name, given.sha256) == ("text", hashlib.sha256(text.encode()).hexdigest())
    assert all(
        np.array_equal(a.input_ids, b.input_ids)
        for a, b in zip(found.sequences, given.sequences, strict=True)
    )


def test_lines_of_which_the_tokenizer_keeps_nothing_are_passed_over(demo: Checkpoint) -> None:
    found = inputs_of(demo, "\n".join(["\x00\x01", *LINES, "\ufffd"]), max_texts=len(LINES))
    assert found.texts == len(LINES)
    assert found.sequences[0].input_ids.tolist() == plain(demo, LINES[0])


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, InputError, r"cannot read '.*texts\.txt': No such file or directory; give a file"),
        (b"", EmptyTextError, r"there is no text in '.*texts\.txt'"),
        (b"\n \n\r\n", EmptyTextError, r"there is no text in '.*texts\.txt'"),
        (
            b"a\n" * 9 + b"\xff\n",
            TextEncodingError,
            r"line 10 of '.*texts\.txt' is not UTF-8: byte 0xff at offset 18",
        ),
        (
            b"a\n" * (FEWEST_TEXTS - 1),
            CalibrationError,
            "holds 7 texts, calibration needs 8.*give more, one a line",
        ),
        (b"\x01\n" * 20, CalibrationError, "holds 0 texts, calibration needs 8"),
        (b"a" * (1 << 21), InputError, "is longer than 1,048,576 bytes; expected one text a line"),
    ],
)
def test_texts_that_cannot_be_used(
    demo: Checkpoint, tmp_path: Path, content: bytes | None, error: type[BertRTError], message: str
) -> None:
    path = tmp_path / "texts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message) as raised:
        inputs_of(demo, path)
    assert type(raised.value) is error


def test_a_folder_and_a_lone_surrogate(demo: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Is a directory"):
        inputs_of(demo, tmp_path)
    with pytest.raises(TextEncodingError, match="line 2 of the text is not UTF-8"):
        inputs_of(demo, "a\n\ud800")
    with pytest.raises(InputError, match="null"):
        inputs_of(demo, Path("a\0b"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_texts": 0}, "max_texts must be from 1 to 100,000, got 0"),
        ({"max_texts": 100_001}, "max_texts must be from 1 to 100,000"),
        ({"max_tokens": 3}, "calibration needs sequences of 4 tokens, got max_tokens 3"),
        ({"seed": -1}, "the seed must be 0 or more, got -1"),
    ],
)
def test_options_out_of_range(demo: Checkpoint, options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        inputs_of(demo, "\n".join(LINES), **options)


def test_random_weights_take_random_tokens_and_others_a_text(
    demo: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CalibrationError, match="calibration of 'demo' needs a text, got none; pass a file"):
        inputs_of(demo, None)
    assert default_text(demo) == evaluation_text()
    with open_checkpoint("bert-base-cased", random=True) as checkpoint:
        assert default_text(checkpoint) is None
        found, again = (inputs_of(checkpoint, None, seed=5) for _ in range(2))
        vocab = RANDOM_MODELS["bert-base-cased"].vocab_size
    assert (found.name, found.sha256, found.texts) == ("random tokens", None, 0)
    assert len(found.sequences) == RANDOM_TEXTS
    ids = np.concatenate([sequence.input_ids for sequence in found.sequences])
    assert found.tokens == len(ids) == RANDOM_TEXTS * 128
    assert 0 <= ids.min() <= ids.max() < vocab
    # 2,000 draws from 28,996 seldom repeat one.
    assert len(np.unique(ids)) > 1_500
    assert all(
        np.array_equal(a.input_ids, b.input_ids)
        for a, b in zip(found.sequences, again.sequences, strict=True)
    )


@pytest.mark.parametrize(("most", "sequences"), [(1, 1), (4, 4), (15, 15), (16, 16), (1000, 16)])
def test_random_tokens_are_no_more_than_asked_for(most: int, sequences: int) -> None:
    with open_checkpoint("bert-base-cased", random=True) as checkpoint:
        found = inputs_of(checkpoint, None, max_texts=most)
    assert len(found.sequences) == sequences


def test_a_disk_that_fails_behind_the_last_text(
    demo: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All texts are there; what is left of the file is read for its hash."""
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(LINES))
    real = inputs._HashedStream.read1

    def fail(self: Any, size: int = -1, /) -> bytes:
        if size == inputs._READ_AT_ONCE:
            raise OSError(5, "Input/output error")
        return real(self, size)

    monkeypatch.setattr(inputs, "_READ_AT_ONCE", 4321)
    monkeypatch.setattr(inputs._HashedStream, "read1", fail)
    with pytest.raises(
        InputError, match=r"cannot read '.*texts\.txt': Input/output error; give a file of UTF-8"
    ):
        inputs_of(demo, path, max_texts=len(LINES))
