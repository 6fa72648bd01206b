"""Very long texts, many texts, many threads."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertrt.errors import EmptyTextError, InputError, MaskNotFoundError, SequenceTooLongError
from bertrt.tokenization import TokenizerSettings, WordPieceTokenizer, contents
from bertrt_export.demo import demo_folder, evaluation_text


@pytest.fixture(scope="module")
def tokenizer() -> WordPieceTokenizer:
    return WordPieceTokenizer.from_folder(demo_folder())


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every text of more than 8 characters cut into pieces of 4 and more."""
    monkeypatch.setattr(contents, "LONG_TEXT", 8)
    monkeypatch.setattr(contents, "_PIECE", 4)


# Everything that may sit beside a cut: marks that combine, joiners, controls, ideographs, parts of words and
# of special tokens.
BESIDE = [
    *" \t\n\r.,;:!?\u3001\u3002\uff01\uff0c\uff1f",
    *"aé中0'-#[İΣ한😀\0\x85\u2028\u3000\u037e\u0338\u0301\u0316\u200d\u11ab",
    *("the", "##", "MASK]", "[MASK]"),
]


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("lowercase", [True, False])
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(text=st.lists(st.sampled_from(BESIDE), min_size=3, max_size=40).map("".join))
def test_a_text_in_pieces_has_the_ids_of_the_whole(lowercase: bool, text: str) -> None:
    tokenizer = _of_vocab(lowercase)
    whole = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    if not whole:
        with pytest.raises(EmptyTextError):
            tokenizer.encode([text], max_length=1_000)
    else:
        [[found]] = tokenizer.encode([text], max_length=1_000)
        assert found.input_ids[1:-1].tolist() == whole


_OF_VOCAB: dict[bool, WordPieceTokenizer] = {}


def _of_vocab(lowercase: bool) -> WordPieceTokenizer:
    if lowercase not in _OF_VOCAB:
        _OF_VOCAB[lowercase] = WordPieceTokenizer.from_vocab(
            demo_folder() / "vocab.txt", TokenizerSettings(lowercase=lowercase)
        )
    return _OF_VOCAB[lowercase]


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("special", ["[THE MASK]", "a,b", "a\u037eb"])
def test_no_cut_falls_within_a_special_token(special: str) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", special, "a", "b", "the", "mask", "[", "]", ",", ";"]
    tokenizer = WordPieceTokenizer.from_vocab(words, TokenizerSettings(mask_token=special))
    text = f"b b b {special} a a.a.a.{special}a, b,a,a{special}.b;b;b"
    whole = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    assert whole.count(tokenizer.mask_id) == 3
    [[found]] = tokenizer.encode([text], max_length=1_000)
    assert found.input_ids[1:-1].tolist() == whole


def test_a_book_in_pieces_has_the_ids_of_the_whole(tokenizer: WordPieceTokenizer) -> None:
    text = evaluation_text().read_text(encoding="utf-8") * 2
    assert len(text) > contents.LONG_TEXT
    whole = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    [windows] = tokenizer.encode([text], max_length=512, overflow="window", stride=0)
    assert np.concatenate([window.input_ids[1:-1] for window in windows]).tolist() == whole
    [[first]] = tokenizer.encode([text], max_length=512, overflow="truncate")
    assert first.input_ids[1:-1].tolist() == whole[:510]
    with pytest.raises(SequenceTooLongError, match=r"text 1 has at least \d+ tokens"):
        tokenizer.encode(["a", text], max_length=512)
    with pytest.raises(SequenceTooLongError, match=r"pair 0 has at least \d+ tokens"):
        tokenizer.encode_pairs(["a"], [text], max_length=512, overflow="error")
    with pytest.raises(MaskNotFoundError, match="would lose 1 of its"):
        tokenizer.encode([text + "[MASK]"], max_length=512, overflow="truncate", keep_masks=True)


def test_truncating_long_pairs_sees_both_to_their_ends(tokenizer: WordPieceTokenizer) -> None:
    shorter, longer = "a " * 140_000, "b " * 150_000
    for first, second in ((shorter, longer), (longer, shorter)):
        [found] = tokenizer.encode_pairs([first], [second], max_length=10, overflow="truncate")
        [same] = tokenizer.encode_pairs([first[:20]], [second[:24]], max_length=10, overflow="truncate")
        assert same.content_length == 7
        # Of seven places the longer text has four.
        ids = [tokenizer.token_to_id(text[0]) for text in (longer, shorter)]
        assert [int((found.input_ids == index).sum()) for index in ids] == [4, 3]


def test_a_stretch_that_cannot_be_cut_is_refused(tokenizer: WordPieceTokenizer) -> None:
    word = "a" * (1 << 20)
    [[found]] = tokenizer.encode([word], max_length=8)
    assert found.input_ids[1:-1].tolist() == [tokenizer.unk_id]
    with pytest.raises(InputError, match="text 1 has more than 1048576 characters in a row without"):
        tokenizer.encode(["a", word + "a"], max_length=8)


def test_memory_is_bounded() -> None:
    # 4 MB of text, 0.8 million tokens. The library alone takes some 120 bytes a character, 480 MB. In pieces it
    # takes 20 MB, to which come the text (8 MB with its copies), the ids and the windows (8 MB each).
    code = """
import json, resource
from bertrt.tokenization import WordPieceTokenizer
from bertrt_export.demo import demo_folder
tokenizer = WordPieceTokenizer.from_folder(demo_folder())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
[windows] = tokenizer.encode(["time and again " * 270_000], max_length=512, overflow="window")
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([len(windows), (after - before) * 1024]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    windows, grown = json.loads(done.stdout)
    assert windows == -(-270_000 * 3 // 510)
    assert grown < 100_000_000


def test_many_texts_are_answered_in_their_order(tokenizer: WordPieceTokenizer) -> None:
    lines = [line for line in evaluation_text().read_text(encoding="utf-8").splitlines() if line.strip()]
    texts = [f"{index} {lines[index % len(lines)][:60]}" for index in range(2_500)]
    expected = [tokenizer._tokenizer.encode(text).ids for text in texts]
    found = tokenizer.encode(texts, max_length=512)
    assert [encoded.input_ids.tolist() for [encoded] in found] == expected
    with pytest.raises(EmptyTextError, match="text 2101 has no token"):
        tokenizer.encode([*texts[:2_101], " ", *texts], max_length=512)


def test_a_long_text_among_short_ones_keeps_its_place(tokenizer: WordPieceTokenizer) -> None:
    long = "the " * 100_000
    texts = ["a", "b", long, "c", long, "d"]
    found = tokenizer.encode(texts, max_length=512, overflow="window")
    assert [len(windows) for windows in found] == [1, 1, 197, 1, 197, 1]
    singles = [tokenizer.token_to_id(text) for text in "abcd"]
    assert [int(windows[0].input_ids[1]) for windows in found if len(windows) == 1] == singles


def test_eight_threads_get_what_one_gets(tokenizer: WordPieceTokenizer) -> None:
    lines = [line for line in evaluation_text().read_text(encoding="utf-8").splitlines() if line.strip()][
        :200
    ]
    expected = [
        [w.input_ids.tolist() for w in t]
        for t in tokenizer.encode(lines, max_length=32, overflow="window", stride=4)
    ]

    def work(number: int) -> bool:
        if number % 2:
            found = tokenizer.encode(lines, max_length=32, overflow="window", stride=4)
        else:
            found = [
                tokenizer.encode([line], max_length=32, overflow="window", stride=4)[0] for line in lines
            ]
        return [[window.input_ids.tolist() for window in windows] for windows in found] == expected

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(24)))


@pytest.mark.parametrize("keep_masks", [False, True])
def test_a_text_to_be_refused_is_not_read_to_its_end(tokenizer: WordPieceTokenizer, keep_masks: bool) -> None:
    words = contents.LONG_TEXT
    with pytest.raises(SequenceTooLongError, match="text 0 has at least") as caught:
        tokenizer.encode(["a " * words], max_length=512, overflow="error", keep_masks=keep_masks)
    assert caught.value.index == 0
    assert int(str(caught.value).split()[5]) < words / 4
