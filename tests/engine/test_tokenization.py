"""Token ids and decoded texts, against transformers' BertTokenizerFast and BertTokenizer."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer, BertTokenizerFast

from bertrt.tokenization import TokenizerSettings, WordPieceTokenizer
from bertrt_export.demo import demo_folder

# Settings of ours, and what transformers calls them.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cased": ({"lowercase": False}, {"do_lower_case": False}),
    "uncased": ({}, {}),
    "uncased with accents": ({"strip_accents": False}, {"strip_accents": False}),
    "cased without accents": (
        {"lowercase": False, "strip_accents": True},
        {"do_lower_case": False, "strip_accents": True},
    ),
    "cased without CJK": (
        {"lowercase": False, "tokenize_chinese_chars": False},
        {"do_lower_case": False, "tokenize_chinese_chars": False},
    ),
    "uncased without CJK": ({"tokenize_chinese_chars": False}, {"tokenize_chinese_chars": False}),
}

AWKWARD = {
    "emoji": "I 😀 you 👍🏽 !",
    "zero-width joiner": "family 👨\u200d👩\u200d👧 here",
    "flags": "🇫🇷 🇩🇪",
    "variation selector": "❤\ufe0f heart",
    "combining": "e\u0301 a\u0308\u0301 n\u0303o \u0301start a\u0316\u0301 a\u0301\u0316",
    "precomposed": "é ä\u0301 ño Ångström ǆ Ǆ",
    "hangul": "한국어 \u1112\u1161\u11ab",
    "CJK": "我爱北京abc天安门。,!",
    "CJK extension": "\U00020000\U0002a6d6x\U0002f800",
    "compatibility": "\uf900豈 ﬁne ½ Ⅷ",
    "kana": "ひらがなカタカナﾊﾝｶｸ",
    "Arabic": "السَّلَامُ عَلَيْكُم ورحمة",
    "Hebrew": "שָׁלוֹם",
    "Thai": "ภาษาไทย",
    "Devanagari": "हिन्दी क्षि",
    "bidirectional": "a\u202eb\u202c c\u200f",
    "control": "a\x01b\x7fc\x85d\x9fe\x1bf",
    "every C0 control": "x" + "".join(map(chr, range(32))),
    "NUL": "a\0b \0 c",
    "white space": "a\u00a0b\u2003c\u3000d\u2028e\u2029f\u200bg\ufeffh\u180ei\x0bj\x0ck",
    "line ends": "\t a\r\nb\n\nc ",
    "10,000 letters": "a" * 10_000,
    "as long as a word may be": "b" * 100,
    "one letter longer": "b" * 101,
    "300 ideographs": "中" * 300,
    "long when decomposed": "é" * 101 + " " + "e\u0301" * 51,
    "punctuation": "!!!...?!—–“quoted”‘’…«»¿¡",
    "ASCII symbols": "a+b=c^d`e|f~g$h<i>j",
    "mathematics": "∑∫√≠∞ ×÷ ©®™ 𝐁𝐨𝐥𝐝 𝓈𝒸𝓇",
    "currency": "€5 £6 ¥7 ₹8",
    "apostrophes": "don't it's o'clock rock'n'roll we've they're I'm isn 't",
    "Turkish": "İstanbul ıI ğĞ",
    "sharp s": "Straße STRASSE ẞ",
    "Greek": "ΟΔΥΣΣΕΥΣ ς σ Ά \u037e",
    "ligatures": "ﬀﬁﬂ ŉ ǰ",
    "special tokens": "[MASK] [CLS] [SEP] [PAD] [UNK]",
    "special tokens in words": "un[MASK]able[SEP]x[mask][ MASK ]",
    "almost special tokens": "[[MASK]] [MASK [M ASK] [MASK\u0301] [MA\0SK]",
    "continuations": "##ing # ## ###a",
    "private use": "x\ue000\uf8ff \U000f0000",
    "noncharacters": "\ufffe\uffff \U0010ffff",
    "unassigned": "\u0378 \U000e0080",
    "tags": "x\U000e0061\U000e007f",
    "soft hyphen": "co\u00adop \u2060 \u034f",
    "superscripts": "x² H₂O 1ª",
    "numbers": "3.14159 1,000,000 ٣٤ ௧",
    "address": "https://a.b/c?d=e&f#g foo@bar.com",
    "replacement": "x\ufffd\ufffd",
    "600 words": "the " * 600,
}

# Where transformers' two tokenizers differ. We follow the fast one, which pipelines use. It does not compose
# letters and marks (the slow one brings text to NFC first, where it does not strip the accents); it keeps
# characters that Unicode has not assigned (to the slow one they are control characters); and it looks for special
# tokens before it drops control characters, not after it as well.
COMPOSED = {"cased", "uncased with accents", "cased without CJK"}
SLOW_DIFFERS = {
    "combining": COMPOSED,
    "long when decomposed": COMPOSED,
    "Greek": COMPOSED,
    "noncharacters": set(VARIANTS),
    "unassigned": set(VARIANTS),
    "almost special tokens": {variant for variant in VARIANTS if variant.startswith("cased")},
}

# The same examples on every machine and in every run, however slow.
FIXED = settings(max_examples=200, deadline=None, derandomize=True, database=None)
texts = st.lists(
    st.one_of(st.text(max_size=20), st.sampled_from([*AWKWARD.values(), " ", "word", "[MASK]", "\u0301"])),
    min_size=1,
    max_size=6,
).map("".join)


@functools.cache
def ours(variant: str) -> WordPieceTokenizer:
    return WordPieceTokenizer.from_vocab(
        demo_folder() / "vocab.txt", TokenizerSettings(**VARIANTS[variant][0])
    )


@functools.cache
def fast(variant: str) -> BertTokenizerFast:
    return BertTokenizerFast(str(demo_folder() / "vocab.txt"), **VARIANTS[variant][1])


@functools.cache
def slow(variant: str) -> BertTokenizer:
    return BertTokenizer(str(demo_folder() / "vocab.txt"), **VARIANTS[variant][1])


def ids_of(variant: str, text: str) -> list[int]:
    [[encoded]] = ours(variant).encode([text], max_length=1 << 20)
    assert encoded.input_ids.dtype == encoded.token_type_ids.dtype == np.int32
    assert encoded.input_ids.shape == encoded.token_type_ids.shape
    assert not encoded.token_type_ids.any()
    assert (encoded.start, encoded.content_length) == (0, encoded.input_ids.shape[0] - 2)
    ids: list[int] = encoded.input_ids.tolist()
    return ids


@pytest.mark.parametrize("variant", VARIANTS)
def test_awkward_texts_have_the_ids_of_the_fast_tokenizer(variant: str) -> None:
    reference = fast(variant)
    for name, text in AWKWARD.items():
        expected = reference(text)["input_ids"]
        assert len(expected) > 2, f"{name}: nothing is left of it, choose another example"
        assert ids_of(variant, text) == expected, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_awkward_texts_have_the_ids_of_the_slow_tokenizer_too_with_known_exceptions(variant: str) -> None:
    reference = slow(variant)
    different = {
        name for name, text in AWKWARD.items() if ids_of(variant, text) != reference(text)["input_ids"]
    }
    assert different == {name for name, variants in SLOW_DIFFERS.items() if variant in variants}


@pytest.mark.parametrize("variant", VARIANTS)
@FIXED
@given(text=texts)
def test_generated_texts_have_the_ids_of_the_fast_tokenizer(variant: str, text: str) -> None:
    expected = fast(variant)(text)["input_ids"]
    if len(expected) > 2:
        assert ids_of(variant, text) == expected


@pytest.mark.parametrize("variant", ["cased", "uncased"])
@FIXED
@given(a=texts, b=texts)
def test_generated_pairs_are_those_of_the_fast_tokenizer(variant: str, a: str, b: str) -> None:
    # The x makes sure that neither is empty.
    expected = fast(variant)("x" + a, b + "x")
    [encoded] = ours(variant).encode_pairs(["x" + a], [b + "x"], max_length=1 << 20, overflow="error")
    assert encoded.input_ids.tolist() == expected["input_ids"]
    assert encoded.token_type_ids.tolist() == expected["token_type_ids"]
    assert encoded.content_length == len(expected["input_ids"]) - 3


@pytest.mark.parametrize("variant", ["cased", "uncased"])
@FIXED
@given(text=texts)
def test_one_call_for_many_texts_gives_what_many_calls_give(variant: str, text: str) -> None:
    # Few short texts and many or longer ones take different ways through the library.
    many = ["a b c", "x" + text, "d", "x" + text, "e!", "f" * 700]
    batch = ours(variant).encode(many, max_length=1 << 20)
    assert [encoded.input_ids.tolist() for [encoded] in batch] == [ids_of(variant, one) for one in many]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("variant", ["cased", "uncased"])
def test_decoding_gives_back_what_transformers_gives_back(variant: str, skip: bool) -> None:
    for name, text in AWKWARD.items():
        ids = ids_of(variant, text)
        expected = fast(variant).decode(ids, skip_special_tokens=skip)
        assert ours(variant).decode(ids, skip_special_tokens=skip) == expected, name


@pytest.mark.parametrize("clean_up", [True, False])
def test_decoding_any_ids_gives_what_transformers_gives(clean_up: bool) -> None:
    tokenizer, reference = decoders(demo_folder() / "vocab.txt", clean_up)

    # The vocabulary ends at 8,191: a model may have rows to spare, for which there is no text.
    @FIXED
    @given(ids=st.lists(st.integers(0, 8_300), max_size=40), skip=st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        expected = reference.decode(ids, skip_special_tokens=skip)
        assert tokenizer.decode(ids, skip_special_tokens=skip) == expected
        assert tokenizer.decode(np.array(ids, np.int32), skip_special_tokens=skip) == expected

    check()


@pytest.mark.parametrize("clean_up", [True, False])
def test_decoding_cleans_up_as_transformers_does(tmp_path: Path, clean_up: bool) -> None:
    # A vocabulary of little but what the clean-up looks for.
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b", "##'", "'", "s", "m", "n't", *".,?!"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    tokenizer, reference = decoders(tmp_path / "vocab.txt", clean_up)

    @FIXED
    @given(ids=st.lists(st.integers(0, len(words) - 1), max_size=40), skip=st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        expected = reference.decode(ids, skip_special_tokens=skip)
        assert tokenizer.decode(ids, skip_special_tokens=skip) == expected

    check()


def decoders(path: Path, clean_up: bool) -> tuple[WordPieceTokenizer, BertTokenizerFast]:
    options = TokenizerSettings(clean_up_tokenization_spaces=clean_up)
    reference = BertTokenizerFast(str(path), clean_up_tokenization_spaces=clean_up)
    return WordPieceTokenizer.from_vocab(path, options), reference


def test_special_tokens_have_the_ids_of_their_vocabulary() -> None:
    # Another order than any published model's, so that an assumed id shows.
    words = ["a", "[MASK]", "##b", "[SEP]", "[UNK]", "c", "[PAD]", "[CLS]"]
    tokenizer = WordPieceTokenizer.from_vocab(words, TokenizerSettings())
    roles = (tokenizer.mask_id, tokenizer.sep_id, tokenizer.unk_id, tokenizer.pad_id, tokenizer.cls_id)
    assert roles == (1, 3, 4, 6, 7)
    assert tokenizer.vocab_size == 8
    assert tokenizer.mask_token == words[1]
    [[encoded]] = tokenizer.encode(["ab[MASK] zebra C"], max_length=10)
    assert encoded.input_ids.tolist() == [7, 0, 2, 1, 4, 5, 3]
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == "ab c"
    assert [tokenizer.id_to_token(index) for index in range(8)] == words
    assert [tokenizer.token_to_id(word) for word in words] == list(range(8))
    assert tokenizer.token_to_id("zebra") is None


def test_special_tokens_may_have_other_names() -> None:
    words = ["<s>", "</s>", "<pad>", "<mask>", "<unk>", "a"]
    names = {
        "cls_token": "<s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
        "unk_token": "<unk>",
    }
    tokenizer = WordPieceTokenizer.from_vocab(words, TokenizerSettings(**names))
    [[encoded]] = tokenizer.encode(["a<mask> [MASK]"], max_length=10)
    assert encoded.input_ids.tolist() == [0, 5, 3, 4, 4, 4, 1]


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        TokenizerSettings().lowercase = False  # type: ignore[misc]  # the point of the test
