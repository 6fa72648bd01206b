"""Texts that are too long: truncation and windows, against transformers; and texts that are not acceptable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import BertTokenizerFast

from bertrt.errors import (
    EmptyTextError,
    InputError,
    MaskNotFoundError,
    SequenceTooLongError,
    TextEncodingError,
)
from bertrt.tokenization import WordPieceTokenizer
from bertrt_export.demo import demo_folder


@pytest.fixture(scope="module")
def tokenizer() -> WordPieceTokenizer:
    return WordPieceTokenizer.from_folder(demo_folder())


@pytest.fixture(scope="module")
def reference() -> BertTokenizerFast:
    return BertTokenizerFast.from_pretrained(str(demo_folder()))


def words(count: int) -> str:
    """A text of this many tokens, no two neighbours alike."""
    return " ".join("abcdefghijklm"[index % 13] for index in range(count))


# Around the edges of one, two and more windows of 8 tokens with 6 of content.
@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 8, 10, 11, 12, 13, 18, 19, 100])
@pytest.mark.parametrize("stride", [0, 1, 3, 5])
def test_windows_are_those_of_transformers(
    tokenizer: WordPieceTokenizer, reference: BertTokenizerFast, count: int, stride: int
) -> None:
    expected = reference(
        words(count), max_length=8, truncation=True, stride=stride, return_overflowing_tokens=True
    )["input_ids"]
    [found] = tokenizer.encode([words(count)], max_length=8, overflow="window", stride=stride)
    assert [window.input_ids.tolist() for window in found] == expected
    content = reference(words(count), add_special_tokens=False)["input_ids"]
    for window in found:
        stop = window.start + window.content_length
        assert window.input_ids[1:-1].tolist() == content[window.start : stop]
        assert not window.token_type_ids.any()
    assert stop == count


@pytest.mark.parametrize("count", [1, 509, 510, 511, 512, 513, 1_000])
def test_truncation_is_that_of_transformers(
    tokenizer: WordPieceTokenizer, reference: BertTokenizerFast, count: int
) -> None:
    expected = reference(words(count), max_length=512, truncation=True)["input_ids"]
    [[found]] = tokenizer.encode([words(count)], max_length=512, overflow="truncate")
    assert found.input_ids.tolist() == expected
    assert found.content_length == min(count, 510)


@pytest.mark.parametrize("max_length", [5, 6, 7, 8, 12, 13])
def test_truncation_of_pairs_is_that_of_transformers(
    tokenizer: WordPieceTokenizer, reference: BertTokenizerFast, max_length: int
) -> None:
    sides = [(a, b) for a in range(1, 15) for b in range(1, 15)]
    first, second = [words(a) for a, _ in sides], [words(b)[::-1] for _, b in sides]
    expected = reference(first, second, max_length=max_length, truncation=True)
    found = tokenizer.encode_pairs(first, second, max_length=max_length, overflow="truncate")
    assert [encoded.input_ids.tolist() for encoded in found] == expected["input_ids"]
    assert [encoded.token_type_ids.tolist() for encoded in found] == expected["token_type_ids"]


def test_512_tokens_are_accepted_and_513_are_an_error(tokenizer: WordPieceTokenizer) -> None:
    [[full]] = tokenizer.encode([words(510)], max_length=512)
    assert full.input_ids.shape == (512,)
    with pytest.raises(SequenceTooLongError, match=r"text 1 has 513 tokens, the model has 512 positions; .*"):
        tokenizer.encode(["a", words(511)], max_length=512)


def test_pairs_of_512_tokens_are_accepted_and_of_513_are_an_error(tokenizer: WordPieceTokenizer) -> None:
    [full] = tokenizer.encode_pairs([words(9)], [words(500)], max_length=512, overflow="error")
    assert full.input_ids.shape == (512,)
    with pytest.raises(SequenceTooLongError, match="pair 1 has 513 tokens, the model has 512 positions"):
        tokenizer.encode_pairs(["a", words(9)], ["b", words(501)], max_length=512, overflow="error")


def test_a_mask_is_never_lost_to_truncation(tokenizer: WordPieceTokenizer) -> None:
    kept = words(5) + " [MASK] " + words(5)
    [[found]] = tokenizer.encode([kept], max_length=8, overflow="truncate", keep_masks=True)
    assert found.input_ids[6] == tokenizer.mask_id
    lost = words(6) + " [MASK] " + words(5) + "[MASK]"
    with pytest.raises(MaskNotFoundError, match=r"text 1 to its first 6 tokens would lose 2 of its \[MASK\]"):
        tokenizer.encode([kept, lost], max_length=8, overflow="truncate", keep_masks=True)
    [[found]] = tokenizer.encode([lost], max_length=8, overflow="truncate")
    assert tokenizer.mask_id not in found.input_ids
    [windows] = tokenizer.encode([lost], max_length=8, overflow="window", keep_masks=True)
    assert sum(int((window.input_ids == tokenizer.mask_id).sum()) for window in windows) == 2


@pytest.mark.parametrize("empty", ["", " ", "\t\r\n", "\0", "\x01\u200b\ufeff", "\u00a0\u3000", "\u200d"])
def test_a_text_without_a_token_is_an_error(
    tokenizer: WordPieceTokenizer, reference: BertTokenizerFast, empty: str
) -> None:
    assert reference(empty, add_special_tokens=False)["input_ids"] == []
    with pytest.raises(EmptyTextError, match="text 2 has no token"):
        tokenizer.encode(["a", "b", empty], max_length=8)
    with pytest.raises(EmptyTextError, match="the first text of pair 0 has no token"):
        tokenizer.encode_pairs([empty], ["a"], max_length=8, overflow="error")
    with pytest.raises(EmptyTextError, match="the second text of pair 1 has no token"):
        tokenizer.encode_pairs(["a", "a"], ["a", empty], max_length=8, overflow="error")


def test_no_texts_give_no_answers(tokenizer: WordPieceTokenizer) -> None:
    assert tokenizer.encode([], max_length=8) == []
    assert tokenizer.encode_pairs([], [], max_length=8, overflow="error") == []
    assert tokenizer.decode([], skip_special_tokens=True) == ""


@pytest.mark.parametrize("others", [1, 10])
@pytest.mark.parametrize(
    ("text", "name", "position"),
    [
        ("\ud800", "D800", 0),
        ("héllo \udfff x", "DFFF", 6),
        ("😀\ud83d", "D83D", 1),
        ("x" * 300_000 + "\udc80", "DC80", 300_000),
    ],
)
def test_a_lone_surrogate_is_an_error_that_says_where(
    tokenizer: WordPieceTokenizer, text: str, name: str, position: int, others: int
) -> None:
    expected = rf"text {others} has the lone surrogate U\+{name} at position {position}\b"
    for overflow in ("error", "truncate", "window"):
        with pytest.raises(TextEncodingError, match=expected):
            tokenizer.encode([*"a" * others, text], max_length=8, overflow=overflow)
    with pytest.raises(TextEncodingError, match="the second text of pair 0"):
        tokenizer.encode_pairs(["a"], [text], max_length=8, overflow="truncate")


@pytest.mark.parametrize(
    ("value", "kind"), [(b"a", "bytes"), (None, "NoneType"), (["a"], "list"), (3, "int")]
)
def test_what_is_not_a_text_is_an_error_that_says_which(
    tokenizer: WordPieceTokenizer, value: Any, kind: str
) -> None:
    with pytest.raises(InputError, match=rf"texts\[1\] is {kind}, expected str"):
        tokenizer.encode(["a", value], max_length=8)
    with pytest.raises(InputError, match=rf"a\[0\] is {kind}, expected str"):
        tokenizer.encode_pairs([value], ["a"], max_length=8, overflow="error")


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("a", "is a single str"),
        (b"a", "is bytes"),
        (None, "must be .* got NoneType"),
        (3, "must be .* got int"),
        (np.array("a"), "must be .* got ndarray"),
        ({"a": "b"}, "must be .* got dict"),
    ],
)
def test_a_single_text_is_not_a_list_of_texts(tokenizer: WordPieceTokenizer, value: Any, what: str) -> None:
    with pytest.raises(InputError, match=f"texts {what}"):
        tokenizer.encode(value, max_length=8)
    with pytest.raises(InputError, match=f"b {what}"):
        tokenizer.encode_pairs(["a"], value, max_length=8, overflow="error")


def test_arguments_out_of_range_are_errors(tokenizer: WordPieceTokenizer) -> None:
    with pytest.raises(InputError, match="max_length must be at least 3"):
        tokenizer.encode(["a"], max_length=2)
    with pytest.raises(InputError, match="max_length must be at least 5"):
        tokenizer.encode_pairs(["a"], ["a"], max_length=4, overflow="error")
    for stride in (-1, 6):
        with pytest.raises(InputError, match="stride must be from 0 to 5"):
            tokenizer.encode(["a"], max_length=8, overflow="window", stride=stride)
    overflow: Any = "cut"
    with pytest.raises(InputError, match="overflow must be one of 'error', 'truncate', 'window', got 'cut'"):
        tokenizer.encode(["a"], max_length=8, overflow=overflow)
    overflow = "window"
    with pytest.raises(InputError, match="overflow must be one of 'error', 'truncate', got 'window'"):
        tokenizer.encode_pairs(["a"], ["a"], max_length=8, overflow=overflow)
    with pytest.raises(InputError, match="2 first texts and 1 second texts"):
        tokenizer.encode_pairs(["a", "b"], ["a"], max_length=8, overflow="error")


def test_ids_out_of_range_are_errors(tokenizer: WordPieceTokenizer) -> None:
    for index in (-1, tokenizer.vocab_size, 1 << 40):
        with pytest.raises(InputError, match=f"no token has the id {index}"):
            tokenizer.id_to_token(index)
    for ids in ([3, -1], [1 << 32]):
        with pytest.raises(InputError, match="token ids go from 0"):
            tokenizer.decode(ids, skip_special_tokens=True)


def test_every_answer_has_arrays_of_its_own(tokenizer: WordPieceTokenizer) -> None:
    [windows] = tokenizer.encode([words(20)], max_length=8, overflow="window", stride=2)
    before = [window.input_ids.copy() for window in windows]
    windows[1].input_ids[:] = 0
    windows[1].token_type_ids[:] = 1
    assert np.array_equal(windows[0].input_ids, before[0])
    assert np.array_equal(windows[2].input_ids, before[2])
    assert not windows[0].token_type_ids.any()
