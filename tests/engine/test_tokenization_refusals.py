"""Tokenizer files that are wrong: each is refused with an error that says what is wrong with it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bertrt.errors import TokenizerError
from bertrt.tokenization import TokenizerSettings, WordPieceTokenizer
from bertrt_export.demo import demo_folder

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

Make = Callable[..., Path]


@pytest.fixture
def tokenizer_json() -> dict[str, Any]:
    value: dict[str, Any] = json.loads((demo_folder() / "tokenizer.json").read_text(encoding="utf-8"))
    return value


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A function that writes a folder with JSON files and, if asked to, the demo's vocabulary."""

    def write(vocab: bool = False, **contents: Any) -> Path:
        for name, content in contents.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        if vocab:
            (tmp_path / "vocab.txt").write_bytes((demo_folder() / "vocab.txt").read_bytes())
        return tmp_path

    return write


def test_every_special_token_that_is_missing_is_named(make: Make) -> None:
    with pytest.raises(
        TokenizerError, match=r"3 tokens lacks the special tokens '\[UNK\]' \(unk_token\), .*'\[MASK\]'"
    ):
        WordPieceTokenizer.from_vocab(["[CLS]", "[SEP]", "[PAD]"], TokenizerSettings())
    with pytest.raises(
        TokenizerError, match=r"lacks the special tokens '<mask>' \(mask_token\); use the model's"
    ):
        WordPieceTokenizer.from_folder(make(vocab=True, tokenizer_config={"mask_token": "<mask>"}))


def test_a_token_that_is_there_twice_is_named() -> None:
    with pytest.raises(TokenizerError, match="'a' is there twice, on lines 6 and 8"):
        WordPieceTokenizer.from_vocab([*SPECIAL, "a", "b", "a"], TokenizerSettings())
    words: list[Any] = [*SPECIAL, None]
    with pytest.raises(TokenizerError, match="entry 5 must be a text, got NoneType"):
        WordPieceTokenizer.from_vocab(words, TokenizerSettings())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lowercase": "yes"}, "lowercase must be True or False, got 'yes'"),
        ({"lowercase": None}, "lowercase must be True or False, got None"),
        ({"strip_accents": 1}, "strip_accents must be True or False, got 1"),
        ({"mask_token": ""}, "mask_token must be a text that is not empty, got ''"),
        ({"cls_token": None}, "cls_token must be a text that is not empty, got None"),
        ({"model_max_length": 0}, "model_max_length must be a whole number of at least 1, or None, got 0"),
        ({"sep_token": "[CLS]"}, "two roles of the tokenizer share a special token"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        TokenizerSettings(**settings)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_lower_case": "no"}, "lowercase must be True or False, got 'no'"),
        ({"model_max_length": "512"}, "model_max_length must be a number of at least 1, got '512'"),
        ({"model_max_length": float("nan")}, "model_max_length must be a number of at least 1, got nan"),
        ({"mask_token": 4}, "the token 'mask_token' must be a text, or an object with 'content'"),
        (
            {"mask_token": {"content": ""}},
            "the token 'mask_token' must be a text, or an object with 'content'",
        ),
        (
            {"mask_token": {"content": "x", "lstrip": 1}},
            "the token 'mask_token' must be a text, or an object",
        ),
        ({"additional_special_tokens": [None]}, "the token 'additional_special_tokens' must be a text"),
        (
            {"tokenizer_class": "BertJapaneseTokenizer"},
            "tokenizer_class='BertJapaneseTokenizer', which is not BERT's",
        ),
        ({"split_special_tokens": True}, "split_special_tokens, which is not implemented"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder must be a JSON object, got list"),
        ({"added_tokens_decoder": {"x": {"content": "x"}}}, "id must be a whole number, got 'x'"),
        (
            {"added_tokens_decoder": {"8192": {}}},
            "the token '8192' must be a text, or an object with 'content'",
        ),
        (
            {"added_tokens_decoder": {"9000": {"content": "x y"}}},
            "'x y' has id 9000, but the vocabulary leaves it 8192",
        ),
        (
            {"added_tokens_decoder": {"3": {"content": "[MASK]"}}},
            "'.MASK.' has id 3, but the vocabulary leaves it 4",
        ),
    ],
)
@pytest.mark.parametrize("source", ["vocab.txt", "tokenizer.json"])
def test_a_bad_configuration_is_refused(
    make: Make, source: str, config: dict[str, Any], message: str, tokenizer_json: dict[str, Any]
) -> None:
    contents = {"tokenizer": tokenizer_json | {"added_tokens": []}} if source == "tokenizer.json" else {}
    folder = make(vocab=source == "vocab.txt", tokenizer_config=config, **contents)
    with pytest.raises(TokenizerError, match=message):
        WordPieceTokenizer.from_folder(folder)


def changed(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A function that sets what lies at a dotted path."""

    def change(target: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            target = target[parent]
        target[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("model.type", "BPE"), "model is of type 'BPE', BERT's is 'WordPiece'"),
        (changed("model", None), "model is of type None, BERT's is 'WordPiece'"),
        (
            changed("normalizer", {"type": "Lowercase"}),
            "normalizer is of type 'Lowercase', BERT's is 'BertNormalizer'",
        ),
        (changed("normalizer", None), "normalizer is of type None"),
        (changed("pre_tokenizer", {"type": "Whitespace"}), "pre_tokenizer is of type 'Whitespace'"),
        (changed("decoder", {"type": "Metaspace"}), "decoder is of type 'Metaspace'"),
        (changed("post_processor", None), "the post_processor must make"),
        (changed("post_processor.single", []), "the post_processor must make"),
        (changed("post_processor.special_tokens.[CLS].ids", [7]), "the post_processor must make"),
        (changed("normalizer.lowercase", "yes"), "lowercase must be True or False"),
        (changed("normalizer.clean_text", "yes"), "clean_text must be True or False"),
        (changed("model.vocab", ["a"]), "model.vocab must give each token an id"),
        (changed("model.vocab.the", -1), "model.vocab must give each token an id"),
        (changed("model.vocab.the", 1 << 30), "model.vocab must give each token an id"),
        (changed("model.vocab.the", 4.0), "model.vocab must give each token an id"),
        (changed("model.vocab.the", 4), "model.vocab gives the same id to two tokens"),
        (changed("model.unk_token", None), "unk_token must be of type str, got None"),
        (changed("model.max_input_chars_per_word", "x"), "max_input_chars_per_word must be of type int"),
        (changed("model.max_input_chars_per_word", -1), "the tokenizer cannot be built"),
        (changed("added_tokens", {}), "added_tokens must be of type list"),
        (changed("added_tokens", [3]), "an added token must have an id"),
        (changed("added_tokens", [{"id": 4}]), "the token 'added_tokens' must be a text, or an object"),
        (changed("added_tokens", [{"id": 9000, "content": "x y"}]), "'x y' has id 9000, but the vocabulary"),
    ],
)
def test_a_bad_tokenizer_json_is_refused(
    make: Make, change: Callable[[dict[str, Any]], None], message: str, tokenizer_json: dict[str, Any]
) -> None:
    change(tokenizer_json)
    folder = make(tokenizer=tokenizer_json)
    with pytest.raises(TokenizerError, match=message):
        WordPieceTokenizer.from_folder(folder)


def test_a_special_token_that_tokenizer_json_lacks_is_named(
    make: Make, tokenizer_json: dict[str, Any]
) -> None:
    value = tokenizer_json | {"added_tokens": []}
    value["model"]["vocab"]["mask"] = value["model"]["vocab"].pop("[MASK]")
    with pytest.raises(TokenizerError, match=r"lacks the special tokens '\[MASK\]' \(mask_token\)"):
        WordPieceTokenizer.from_folder(make(tokenizer=value))


def test_files_that_disagree_about_the_unknown_token_are_refused(
    make: Make, tokenizer_json: dict[str, Any]
) -> None:
    folder = make(tokenizer=tokenizer_json, tokenizer_config={"unk_token": "the"})
    with pytest.raises(
        TokenizerError, match=r"unknown token '\[UNK\]', tokenizer_config.json 'the'; make them agree"
    ):
        WordPieceTokenizer.from_folder(folder)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"]
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"version": "1.0", "trunc', "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "is not JSON"),
        (b"[1, 2]", "must be a JSON object, got list"),
        (b"", "is not JSON"),
        (b'{"a": "\xff"}', "is not UTF-8 .*byte 7"),
    ],
)
def test_a_corrupt_file_is_refused(make: Make, name: str, content: bytes, message: str) -> None:
    folder = make(vocab=True)
    (folder / name).write_bytes(content)
    if name == "vocab.txt" and "UTF-8" not in message:
        message = "lacks the special tokens"
    with pytest.raises(TokenizerError, match=message):
        WordPieceTokenizer.from_folder(folder)


def test_a_folder_without_tokenizer_files_is_refused(make: Make) -> None:
    with pytest.raises(TokenizerError, match=r"neither tokenizer.json nor vocab.txt in .*; copy the model's"):
        WordPieceTokenizer.from_folder(make())
    with pytest.raises(TokenizerError, match="neither tokenizer.json nor vocab.txt"):
        WordPieceTokenizer.from_folder(make() / "nowhere")
    with pytest.raises(TokenizerError, match=r"cannot read .*vocab.txt.: No such file"):
        WordPieceTokenizer.from_vocab(make() / "vocab.txt", TokenizerSettings())


def test_a_file_too_large_to_be_one_is_not_read(make: Make) -> None:
    folder = make(vocab=True)
    with (folder / "tokenizer.json").open("wb") as file:
        os.truncate(file.fileno(), (64 << 20) + 1)
    with pytest.raises(TokenizerError, match="is larger than 67108864 bytes"):
        WordPieceTokenizer.from_folder(folder)
