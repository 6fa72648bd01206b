"""Tokenizer files: ``tokenizer.json``, ``vocab.txt``, ``tokenizer_config.json`` and their companions."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertrt.errors import TokenizerError
from bertrt.tokenization import definition as definitions
from bertrt.tokenization.added import AddedToken
from bertrt.tokenization.definition import Definition
from bertrt.tokenization.settings import ROLES, TokenizerSettings

_TOKENIZER = "tokenizer.json"
_VOCAB = "vocab.txt"
_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
_ADDED_TOKENS = "added_tokens.json"
# Every name that is read; nothing else of a folder is.
TOKENIZER_FILES = (_TOKENIZER, _VOCAB, _CONFIG, _SPECIAL_TOKENS, _ADDED_TOKENS)

# The largest vocabularies in use take about 10 MB; a larger file is not read into memory.
_LARGEST_FILE = 64 << 20

# The classes that tokenize as BertTokenizerFast does, and those that take tokenizer.json as it is.
_BERT_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
_PLAIN_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")

# Fields of the configuration that name special tokens without a role in BERT, one or several.
_OTHER_SPECIALS = ("bos_token", "eos_token", "additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True, slots=True)
class _Files:
    """A folder, of which only some files may exist for the reader."""

    folder: Path
    names: Collection[str] | None

    def has(self, name: str) -> bool:
        return (self.names is None or name in self.names) and (self.folder / name).is_file()

    def read(self, name: str) -> dict[str, Any]:
        """The object in a JSON file, empty if there is no such file."""
        return _read_json(self.folder / name) if self.has(name) else {}


def read_folder(folder: Path, names: Collection[str] | None = None) -> Definition:
    """Read ``tokenizer.json`` if there is one, else ``vocab.txt``, each with ``tokenizer_config.json``.

    Args:
        folder: that holds them.
        names: the files that may be read, such as those of which a manifest has the hashes; by default all.

    Raises:
        TokenizerError: files missing, corrupt, or of another kind of tokenizer.
    """
    files = _Files(folder, names)
    configured = files.has(_CONFIG)
    config = files.read(_CONFIG)
    _check(config)
    # transformers writes these lists into the configuration from 4.34 on; before, each was a file.
    if "added_tokens_decoder" not in config:
        config = _merged(config, files.read(_SPECIAL_TOKENS))
    if files.has(_TOKENIZER):
        return _from_tokenizer_json(files, config, configured)
    if not files.has(_VOCAB):
        raise TokenizerError(
            f"there is neither {_TOKENIZER} nor {_VOCAB} in {str(folder)!r}; copy the model's tokenizer "
            "files into it"
        )
    settings = TokenizerSettings.from_config(config, clean_text=True, clean_up_tokenization_spaces=True)
    vocab = definitions.number(read_vocab(folder / _VOCAB))
    return _with_tokens_of(Definition(vocab=vocab, settings=settings), files, config)


def read_vocab(path: Path) -> list[str]:
    r"""The lines of a ``vocab.txt``: UTF-8, one WordPiece a line, the line's number (from 0) its id.

    Lines end at ``\n``, ``\r\n`` or ``\r`` and nowhere else: vocabularies hold characters such as U+2028 and
    U+0085, at which `str.splitlines` would break.

    Raises:
        TokenizerError: missing, not UTF-8, or too large.
    """
    lines = _read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if lines[-1] == "":
        lines.pop()
    return lines


def _from_tokenizer_json(files: _Files, config: Mapping[str, Any], configured: bool) -> Definition:
    value = files.read(_TOKENIZER)
    own = definitions.normalizer_of(value)
    clean_text = own.pop("clean_text")
    unk_token = definitions.unk_token_of(value)
    if not configured or _class_of(config) in _PLAIN_CLASSES:
        config = {**config, **own}
    settings = TokenizerSettings.from_config(
        {"unk_token": unk_token, **config}, clean_text=clean_text, clean_up_tokenization_spaces=False
    )
    if settings.unk_token != unk_token:
        raise TokenizerError(
            f"{_TOKENIZER} calls the unknown token {unk_token!r}, {_CONFIG} {settings.unk_token!r}; make "
            "them agree"
        )
    definition = _with_tokens_of(definitions.from_json(value, settings), files, config)
    definitions.check_post_processor(value, definition)
    return definition


def _with_tokens_of(definition: Definition, files: _Files, config: Mapping[str, Any]) -> Definition:
    """Add what the configuration and its companions list, in the order in which transformers does."""
    roles = [AddedToken.special_token(config[role], role) for role in ROLES if config.get(role) is not None]
    others = list(_other_specials(config))
    special = {token.content for token in (*roles, *others)}
    listed: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        for key, value in _mapping(config["added_tokens_decoder"], "added_tokens_decoder").items():
            listed[_id(key)] = AddedToken.from_json(value, key)
    else:
        for content, index in files.read(_ADDED_TOKENS).items():
            token = {"content": content, "special": content in special}
            listed[_id(index)] = AddedToken.from_json(token, content)
    definition = definition.adding((listed[index], index) for index in sorted(listed))
    ids = definition.ids
    definition = definition.adding((token, None) for token in roles if token.content in ids)
    return definition.with_special_tokens().adding((token, None) for token in others)


def _merged(config: Mapping[str, Any], special_tokens: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens' file wins over the configuration, but for the list that both may continue."""
    merged = {**config, **special_tokens}
    name = "additional_special_tokens"
    first, second = config.get(name), special_tokens.get(name)
    if isinstance(first, list) and isinstance(second, list):
        merged[name] = first + second
    return merged


def _other_specials(config: Mapping[str, Any]) -> Iterator[AddedToken]:
    for name in _OTHER_SPECIALS:
        value = config.get(name)
        if isinstance(value, list):
            yield from (AddedToken.special_token(token, name) for token in value)
        elif isinstance(value, dict) and "content" not in value:
            yield from (AddedToken.special_token(token, name) for token in value.values())
        elif value is not None:
            yield AddedToken.special_token(value, name)


def _check(config: Mapping[str, Any]) -> None:
    kind = _class_of(config)
    if kind is not None and kind not in _BERT_CLASSES + _PLAIN_CLASSES:
        raise TokenizerError(
            f"{_CONFIG} says tokenizer_class={config['tokenizer_class']!r}, which is not BERT's WordPiece; "
            f"BertRT reads {', '.join(_BERT_CLASSES + _PLAIN_CLASSES)}"
        )
    if config.get("split_special_tokens"):
        raise TokenizerError(f"{_CONFIG} says split_special_tokens, which is not implemented; remove it")


def _class_of(config: Mapping[str, Any]) -> str | None:
    kind = config.get("tokenizer_class")
    return None if kind is None else str(kind).removesuffix("Fast")


def _id(value: object) -> int:
    try:
        return int(str(value))
    except ValueError as error:
        raise TokenizerError(f"an added token's id must be a whole number, got {value!r}") from error


def _mapping(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TokenizerError(f"{name} must be a JSON object, got {type(value).__name__}")
    return value


def _read_json(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(
            f"{str(path)!r} is not JSON ({error}); take the file from the checkpoint again"
        ) from error
    return _mapping(value, repr(str(path)))


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise TokenizerError(f"cannot read {str(path)!r}: {error.strerror}") from error
    if len(data) > _LARGEST_FILE:
        raise TokenizerError(
            f"{str(path)!r} is larger than {_LARGEST_FILE} bytes: it is not a tokenizer file"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{str(path)!r} is not UTF-8 ({error.reason} at byte {error.start}); take the file from the "
            "checkpoint again"
        ) from error
