"""Tokens per paragraph of a text."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from bertrt.errors import InputError, TextEncodingError
from bertrt.tokenization import TokenizerSettings, WordPieceTokenizer
from bertrt_bench.lengths import paragraphs, read_lengths

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three", "##s"]
LONG = "one " * 40


@pytest.fixture(scope="module")
def tokenizer() -> WordPieceTokenizer:
    return WordPieceTokenizer.from_vocab(WORDS, TokenizerSettings(lowercase=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Wrapped: blank lines part.
        ("one\ntwo\n\nthree\n", ["one\ntwo", "three"]),
        ("\n\none\r\ntwo\r\n \t\r\n\r\nthree", ["one\ntwo", "three"]),
        # No blank line: each line.
        ("one\ntwo\nthree", ["one", "two", "three"]),
        ("\n one \ntwo\n\n", ["one", "two"]),
        # Lines too long to be wrapped ones: each line, whatever the blank lines mean.
        (f"{LONG}\ntwo\n\nthree", [LONG.strip(), "two", "three"]),
        ("", []),
        (" \n\n \n", []),
    ],
)
def test_paragraphs(text: str, expected: list[str]) -> None:
    assert paragraphs(text) == expected


def test_lengths_are_of_the_first_paragraphs(tokenizer: WordPieceTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    # Soft hyphens alone are nothing to a tokenizer.
    text = "one\n\n\N{SOFT HYPHEN}\n\ntwos two\n\none two three one two three\n\nthree\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = read_lengths(path, tokenizer, most=3, max_length=7)
    # With [CLS] and [SEP]; six words and those two do not fit into seven.
    assert found.tokens == (3, 5, 7)
    assert found.cut == 1
    assert found.name == "book.txt"
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_lengths(path, tokenizer, most=100, max_length=8).tokens == (3, 5, 8, 3)
    assert read_lengths(path, tokenizer, most=100, max_length=8).cut == 0


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", InputError, "no paragraph with a token"),
        ("\N{SOFT HYPHEN}".encode(), InputError, "no paragraph with a token"),
        (b"one\xff", TextEncodingError, "byte 3 is not"),
    ],
)
def test_texts_that_are_none(
    tokenizer: WordPieceTokenizer, tmp_path: Path, content: bytes, error: type[Exception], message: str
) -> None:
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        read_lengths(path, tokenizer, most=1, max_length=8)


def test_no_file(tokenizer: WordPieceTokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the text"):
        read_lengths(tmp_path / "absent", tokenizer, most=1, max_length=8)
