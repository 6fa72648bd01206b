"""What makes a WordPiece tokenizer, and its form in ``tokenizer.json``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bertrt.errors import TokenizerError
from bertrt.tokenization.added import AddedToken
from bertrt.tokenization.settings import TokenizerSettings

# The largest id that a model can have (see `bertrt.architecture`).
LARGEST_ID = (1 << 24) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """All that makes a WordPiece tokenizer.

    Attributes:
        vocab: ids by WordPiece.
        settings: of normalisation and special tokens.
        added: added tokens by id, special tokens among them.
        prefix: of a WordPiece that continues a word.
        longest_word: a word of more characters is unknown.
        decoder: the ``decoder`` section of ``tokenizer.json``.
    """

    vocab: Mapping[str, int]
    settings: TokenizerSettings
    added: Mapping[int, AddedToken] = field(default_factory=dict)
    prefix: str = "##"
    longest_word: int = 100
    decoder: Mapping[str, Any] | None = field(
        default_factory=lambda: {"type": "WordPiece", "prefix": "##", "cleanup": True}
    )

    @property
    def ids(self) -> dict[str, int]:
        """Ids of all tokens, the added ones included."""
        return {**self.vocab, **{token.content: index for index, token in self.added.items()}}

    def adding(self, tokens: Iterable[tuple[AddedToken, int | None]]) -> Definition:
        """With more added tokens; one that is in the vocabulary keeps its id, others follow the last id.

        Args:
            tokens: each with the id that it must get, if that is known. What is added already is left out.

        Raises:
            TokenizerError: a token would get another id.
        """
        ids = self.ids
        used = set(ids.values())
        added = dict(self.added)
        known = {token.content for token in added.values()}
        following = max(len(self.vocab), 1 + max(added, default=-1))
        for token, wanted in tokens:
            if token.content in known:
                continue
            index = ids.get(token.content)
            if index is None:
                index, following = following, following + 1
                if index in used or index > LARGEST_ID:
                    raise TokenizerError(f"the added token {token.content!r} finds its id {index} taken")
            if wanted is not None and wanted != index:
                raise TokenizerError(
                    f"the added token {token.content!r} has id {wanted}, but the vocabulary leaves it "
                    f"{index}; the files belong to different tokenizers"
                )
            ids[token.content] = index
            used.add(index)
            known.add(token.content)
            added[index] = token
        return replace(self, added=added)

    def with_special_tokens(self) -> Definition:
        """With the special token of each role among the added ones.

        Raises:
            TokenizerError: the vocabulary lacks special tokens; names all that it lacks.
        """
        ids = self.ids
        tokens = self.settings.special_tokens
        missing = [f"{token!r} ({role})" for role, token in tokens.items() if token not in ids]
        if missing:
            raise TokenizerError(
                f"the vocabulary of {len(ids)} tokens lacks the special tokens {', '.join(missing)}; use the "
                "model's own vocabulary, or name its special tokens in tokenizer_config.json"
            )
        return self.adding((AddedToken(content=token, special=True), None) for token in tokens.values())

    def to_json(self) -> dict[str, Any]:
        """The content of ``tokenizer.json``."""
        ids = self.ids
        cls_token, sep_token = self.settings.cls_token, self.settings.sep_token
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [token.to_json(index) for index, token in sorted(self.added.items())],
            "normalizer": self.settings.normalizer(),
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": _post_processor(cls_token, ids[cls_token], sep_token, ids[sep_token]),
            "decoder": self.decoder,
            "model": {
                "type": "WordPiece",
                "unk_token": self.settings.unk_token,
                "continuing_subword_prefix": self.prefix,
                "max_input_chars_per_word": self.longest_word,
                "vocab": self.vocab,
            },
        }


def number(tokens: Iterable[str]) -> dict[str, int]:
    """Ids by token, in the order given.

    Raises:
        TokenizerError: a token occurs twice, is not a text, or has an id that no model can have.
    """
    vocab: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if not isinstance(token, str):
            raise TokenizerError(f"vocabulary: entry {index} must be a text, got {type(token).__name__}")
        if token in vocab:
            raise TokenizerError(
                f"vocabulary: {token!r} is there twice, on lines {vocab[token] + 1} and {index + 1}; "
                "a line's number is its token's id, so every token must be there once"
            )
        vocab[token] = index
    if len(vocab) > LARGEST_ID + 1:
        raise TokenizerError(f"vocabulary: {len(vocab)} tokens, a model can have {LARGEST_ID + 1} at most")
    return vocab


def normalizer_of(value: Mapping[str, Any]) -> dict[str, Any]:
    """The normaliser's flags in the names of ``tokenizer_config.json``, and ``clean_text``.

    Raises:
        TokenizerError: another kind of normaliser.
    """
    section = _section(value, "normalizer", "BertNormalizer")
    return {
        "do_lower_case": section.get("lowercase", True),
        "strip_accents": section.get("strip_accents"),
        "tokenize_chinese_chars": section.get("handle_chinese_chars", True),
        "clean_text": section.get("clean_text", True),
    }


def unk_token_of(value: Mapping[str, Any]) -> str:
    """The token for unknown words that the model of a ``tokenizer.json`` names.

    Raises:
        TokenizerError: another kind of model, or it names none.
    """
    return str(_typed(_section(value, "model", "WordPiece"), "unk_token", str, None))


def from_json(value: Mapping[str, Any], settings: TokenizerSettings) -> Definition:
    """Read the content of a ``tokenizer.json``; the settings stand for its normaliser.

    Stored truncation and padding are dropped: they are the caller's business.

    Raises:
        TokenizerError: not BERT's WordPiece, or a field that is missing or wrong.
    """
    model = _section(value, "model", "WordPiece")
    _section(value, "pre_tokenizer", "BertPreTokenizer")
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(map(_is_id, vocab.values())):
        raise TokenizerError(
            f"tokenizer.json: model.vocab must give each token an id from 0 to {LARGEST_ID}; take the file "
            "from the checkpoint again"
        )
    if len(set(vocab.values())) < len(vocab):
        raise TokenizerError("tokenizer.json: model.vocab gives the same id to two tokens")
    added = _typed(value, "added_tokens", list, [])
    definition = Definition(
        vocab=vocab,
        settings=settings,
        prefix=_typed(model, "continuing_subword_prefix", str, "##"),
        longest_word=_typed(model, "max_input_chars_per_word", int, 100),
        decoder=None if value.get("decoder") is None else _section(value, "decoder", "WordPiece"),
    )
    tokens = {_id_of(token): AddedToken.from_json(token, "added_tokens") for token in added}
    return definition.adding((tokens[index], index) for index in sorted(tokens))


def check_post_processor(value: Mapping[str, Any], definition: Definition) -> None:
    """See that a ``tokenizer.json`` puts BERT's special tokens where BERT has them.

    Raises:
        TokenizerError: it does not.
    """
    ids = definition.ids
    cls_token, sep_token = definition.settings.cls_token, definition.settings.sep_token
    given = value.get("post_processor")
    template = _post_processor(cls_token, ids[cls_token], sep_token, ids[sep_token])
    older = {"type": "BertProcessing", "sep": [sep_token, ids[sep_token]], "cls": [cls_token, ids[cls_token]]}
    if given not in (template, older):
        raise TokenizerError(
            f"tokenizer.json: the post_processor must make '{cls_token} A {sep_token}' and '{cls_token} A "
            f"{sep_token} B {sep_token}' as BERT's does, got {json.dumps(given)[:200]}"
        )


def _post_processor(cls_token: str, cls_id: int, sep_token: str, sep_id: int) -> dict[str, Any]:
    def special(token: str, segment: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": segment}}

    def text(name: str, segment: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": segment}}

    single = [special(cls_token, 0), text("A", 0), special(sep_token, 0)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, text("B", 1), special(sep_token, 1)],
        "special_tokens": {
            token: {"id": token, "ids": [index], "tokens": [token]}
            for token, index in ((cls_token, cls_id), (sep_token, sep_id))
        },
    }


def _section(value: Mapping[str, Any], name: str, kind: str) -> dict[str, Any]:
    section = value.get(name)
    found = section.get("type") if isinstance(section, dict) else None
    if not isinstance(section, dict) or found != kind:
        raise TokenizerError(
            f"tokenizer.json: {name} is of type {found!r}, BERT's is {kind!r}; this is another kind of "
            "tokenizer"
        )
    return section


def _typed(section: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = section.get(name, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TokenizerError(f"tokenizer.json: {name} must be of type {kind.__name__}, got {value!r}")
    return value


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_ID


def _id_of(token: object) -> int:
    index = token.get("id") if isinstance(token, dict) else None
    if type(index) is not int or not _is_id(index):
        raise TokenizerError(
            f"tokenizer.json: an added token must have an id from 0 to {LARGEST_ID}, got {token!r}"
        )
    return index
