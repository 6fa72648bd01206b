"""Tokenizer files: what transformers reads from a folder, we read; what is wrong with one is said."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.models.bert.tokenization_bert import load_vocab

from bertrt.errors import TokenizerError
from bertrt.tokenization import TokenizerSettings, WordPieceTokenizer, files
from bertrt_export.demo import demo_folder

# Case, accents, ideographs, special tokens, clean-up of blanks, a word that some tests add.
TEXTS = ["Hello [MASK] it 's Café , THE [mask]", "don't [MASK][UNK]. 中国 Ünï İstanbul ß", "zyzzyx zyzzyxs"]
NAMES = {"mask_token": "<mask>"}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer_json() -> dict[str, Any]:
    value: dict[str, Any] = json.loads((demo_folder() / "tokenizer.json").read_text(encoding="utf-8"))
    return value


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A function that writes a folder with tokenizer files, beside the demo's config.json."""

    def write(vocab: bool = False, **contents: Any) -> Path:
        for name, content in contents.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        if vocab:
            (tmp_path / "vocab.txt").write_bytes((demo_folder() / "vocab.txt").read_bytes())
        (tmp_path / "config.json").write_bytes((demo_folder() / "config.json").read_bytes())
        return tmp_path

    return write


def check_same(folder: Path) -> WordPieceTokenizer:
    """Compare with what transformers makes of the same folder."""
    found, expected = WordPieceTokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert expected.is_fast
    for text in TEXTS:
        ids = expected(text, padding=False, truncation=False)["input_ids"]
        [[encoded]] = found.encode([text], max_length=1_000)
        assert encoded.input_ids.tolist() == ids
        for skip in (False, True):
            assert found.decode(ids, skip_special_tokens=skip) == expected.decode(
                ids, skip_special_tokens=skip
            )
    assert found.vocab_size == len(expected)
    assert found.cls_id == expected.cls_token_id
    assert found.sep_id == expected.sep_token_id
    assert found.pad_id == expected.pad_token_id
    assert found.unk_id == expected.unk_token_id
    assert found.mask_id == expected.mask_token_id
    assert found.mask_token == expected.mask_token
    limit = expected.model_max_length
    assert found.settings.model_max_length == (limit if limit < 1e9 else None)
    return found


def added(content: str, **flags: bool) -> dict[str, Any]:
    """An added token as transformers writes it into a configuration."""
    names = ("lstrip", "rstrip", "normalized", "single_word")
    return {"__type": "AddedToken", "content": content} | dict.fromkeys(names, False) | flags


CONFIGS: list[dict[str, Any]] = [
    {},
    {"do_lower_case": False},
    {"do_lower_case": True, "strip_accents": False},
    {"do_lower_case": False, "strip_accents": True},
    {"do_lower_case": False, "tokenize_chinese_chars": False},
    {"do_lower_case": False, "clean_up_tokenization_spaces": True},
    {"do_lower_case": False, "clean_up_tokenization_spaces": False},
    {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "model_max_length": 512},
    {"tokenizer_class": "DistilBertTokenizer", "model_max_length": int(1e30)},
    {"tokenizer_class": "ElectraTokenizerFast", "model_max_length": 1e30},
    {"mask_token": "the", "do_lower_case": False},
    {"mask_token": added("[MASK]", lstrip=True)},
    {"do_lower_case": False, "additional_special_tokens": ["zyzzyx", added("it")], "bos_token": "<s>"},
]


@pytest.mark.parametrize("config", CONFIGS, ids=json.dumps)
def test_vocab_txt_is_read_as_transformers_reads_it(make: Make, config: dict[str, Any]) -> None:
    check_same(make(vocab=True, tokenizer_config=config))


@pytest.mark.parametrize("config", CONFIGS, ids=json.dumps)
def test_tokenizer_json_is_read_as_transformers_reads_it(
    make: Make, config: dict[str, Any], tokenizer_json: dict[str, Any]
) -> None:
    check_same(make(tokenizer=tokenizer_json, tokenizer_config=config))


def test_vocab_txt_alone_is_uncased_as_in_transformers(make: Make) -> None:
    assert check_same(make(vocab=True)).settings == TokenizerSettings()


def test_the_demo_is_read_as_transformers_reads_it() -> None:
    assert check_same(demo_folder()).settings.model_max_length == 512


def test_tokenizer_json_alone_is_taken_at_its_word(make: Make, tokenizer_json: dict[str, Any]) -> None:
    # transformers would override its normaliser with BertTokenizerFast's default and lower the case.
    folder = make(tokenizer=tokenizer_json)
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    [[encoded]] = WordPieceTokenizer.from_folder(folder).encode(TEXTS[:1], max_length=100)
    assert encoded.input_ids.tolist() == library.encode(TEXTS[0]).ids
    plain = make(tokenizer=tokenizer_json, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"})
    [[encoded]] = WordPieceTokenizer.from_folder(plain).encode(TEXTS[:1], max_length=100)
    assert encoded.input_ids.tolist() == AutoTokenizer.from_pretrained(plain)(TEXTS[0])["input_ids"]


@pytest.mark.parametrize(
    "change",
    [
        {"truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}},
        {
            "padding": {
                "strategy": {"Fixed": 40},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "[PAD]",
            }
        },
        {"post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}},
        {"added_tokens": []},
        {"decoder": None},
        {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_variants_of_tokenizer_json(
    make: Make, change: dict[str, Any], tokenizer_json: dict[str, Any]
) -> None:
    check_same(make(tokenizer=tokenizer_json | change, tokenizer_config={"do_lower_case": False}))


def test_what_the_configuration_cannot_say_is_kept(make: Make, tokenizer_json: dict[str, Any]) -> None:
    value = copy.deepcopy(tokenizer_json)
    value["normalizer"]["clean_text"] = False
    value["model"]["max_input_chars_per_word"] = 4
    folder = make(tokenizer=value, tokenizer_config={"do_lower_case": False})
    found = check_same(folder)
    [[encoded]] = found.encode(["a\x01b there"], max_length=10)
    assert encoded.input_ids.tolist() == [found.cls_id, found.unk_id, found.unk_id, found.sep_id]
    assert encoded.input_ids.tolist() == AutoTokenizer.from_pretrained(folder)("a\x01b there")["input_ids"]


@pytest.mark.parametrize("source", ["vocab.txt", "tokenizer.json"])
def test_companions_of_old_checkpoints(make: Make, source: str, tokenizer_json: dict[str, Any]) -> None:
    contents: dict[str, Any] = {
        "tokenizer_config": {"do_lower_case": False, "additional_special_tokens": ["<s>"]},
        "added_tokens": {"zyzzyx": 8_192, "<e1>": 8_193},
        "special_tokens_map": {"mask_token": "[MASK]", "additional_special_tokens": ["<e1>", "</s>"]},
    }
    if source == "tokenizer.json":
        contents["tokenizer"] = tokenizer_json
    found = check_same(make(vocab=source == "vocab.txt", **contents))
    assert [found.token_to_id(token) for token in ("zyzzyx", "<e1>", "<s>", "</s>")] == [
        8192,
        8193,
        8194,
        8195,
    ]


@pytest.mark.parametrize("source", ["vocab.txt", "tokenizer.json"])
def test_added_tokens_of_the_configuration(make: Make, source: str, tokenizer_json: dict[str, Any]) -> None:
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": True, "special": False}
    listed = {"4": {"content": "[MASK]", **flags, "special": True}, "8192": {"content": "zyzzyx", **flags}}
    contents = {"tokenizer": tokenizer_json} if source == "tokenizer.json" else {}
    config = {"do_lower_case": False, "added_tokens_decoder": listed}
    found = check_same(make(vocab=source == "vocab.txt", tokenizer_config=config, **contents))
    [[one], [several]] = found.encode(["zyzzyx", "zyzzyxs"], max_length=20)
    assert one.content_length == 1 < several.content_length


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("clean_up", [True, False])
def test_what_is_written_is_read_back_by_us_and_by_transformers(
    make: Make, lowercase: bool, clean_up: bool
) -> None:
    settings = TokenizerSettings(
        lowercase=lowercase,
        strip_accents=False,
        clean_up_tokenization_spaces=clean_up,
        model_max_length=77,
        **NAMES,
    )
    words = [*SPECIAL, "<mask>", *"abcdefghijklmnopqrstuvwxyzé,'", *(f"##{c}" for c in "abcdefgéhijklmno")]
    before = WordPieceTokenizer.from_vocab(words, settings)
    folder = make(tokenizer_config=settings.to_config())
    (folder / "tokenizer.json").write_text(before.to_json(), encoding="utf-8")
    after = check_same(folder)
    assert after.settings == settings
    assert after.to_json() == before.to_json()
    assert [after.id_to_token(index) for index in range(len(words))] == words
    bare = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert bare.truncation is None
    assert bare.padding is None
    [pair] = before.encode_pairs(["Abé"], ["c"], max_length=10)
    assert bare.encode("Abé", "c").ids == pair.input_ids.tolist()
    assert bare.encode("Abé", "c").type_ids == pair.token_type_ids.tolist()


def test_only_the_named_files_are_read(make: Make, tokenizer_json: dict[str, Any]) -> None:
    folder = make(
        vocab=True,
        tokenizer=tokenizer_json,
        tokenizer_config={"do_lower_case": True, "tokenizer_class": "BertTokenizer"},
        special_tokens_map={"additional_special_tokens": ["zyzzyx"]},
        added_tokens={"zyzzyxs": len(tokenizer_json["model"]["vocab"])},
    )
    own = WordPieceTokenizer.from_folder(folder, ["tokenizer.json"])
    assert not own.settings.lowercase  # as its own normaliser says
    assert own.token_to_id("zyzzyx") is own.token_to_id("zyzzyxs") is None
    every = WordPieceTokenizer.from_folder(folder)
    assert every.settings.lowercase
    assert None not in (every.token_to_id("zyzzyx"), every.token_to_id("zyzzyxs"))
    assert WordPieceTokenizer.from_folder(folder, ["vocab.txt"]).vocab_size == own.vocab_size
    with pytest.raises(TokenizerError, match="neither"):
        WordPieceTokenizer.from_folder(folder, ["tokenizer_config.json"])


def test_lines_of_vocab_txt_are_those_of_transformers(tmp_path: Path) -> None:
    # Characters at which str.splitlines would break, blanks, both line ends, and no end after the last line.
    path = tmp_path / "vocab.txt"
    path.write_bytes(
        "\n".join([*SPECIAL, "\u2028", "\u2029", "\x85", "\x1c", "\x0b", "a b", " ", "", "é"]).encode()
    )
    assert files.read_vocab(path) == list(load_vocab(path))
    assert len(files.read_vocab(path)) == 14
    path.write_bytes(b"a\r\nb\rc\n\nd\n")
    assert files.read_vocab(path) == list(load_vocab(path)) == ["a", "b", "c", "", "d"]
    path.write_bytes(b"")
    assert files.read_vocab(path) == []
