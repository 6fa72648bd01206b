"""What a tokenizer does to text before WordPiece, and the names of its special tokens."""

# ruff: noqa: S105 - the rule takes the word "token" for a password; these are BERT's special tokens.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from bertrt.errors import TokenizerError
from bertrt.tokenization.added import AddedToken

# The roles a BERT tokenizer has a special token for, in the order in which messages name them.
ROLES = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# transformers writes 1e30 for "no limit"; whatever no model can have is read as that.
_NO_LIMIT = 1 << 31


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSettings:
    """Settings of a WordPiece tokenizer.

    The defaults are those of transformers' ``BertTokenizerFast`` (4.57) for a ``vocab.txt``.

    Attributes:
        lowercase: lower the case of every letter (an "uncased" model).
        strip_accents: drop combining marks after decomposition (Unicode NFD); ``None`` does so if and only if
            ``lowercase`` is set.
        tokenize_chinese_chars: every CJK ideograph is a word of its own.
        clean_text: drop control characters and make all white space a blank.
        clean_up_tokenization_spaces: close the gaps before English punctuation and contractions in `decode`.
        unk_token: stands for a word that no WordPieces spell.
        sep_token: ends a segment.
        pad_token: fills a batch.
        cls_token: opens a sequence.
        mask_token: stands for the token to be predicted.
        model_max_length: tokens of the longest sequence, special tokens included; ``None`` if nobody says.

    Raises:
        TokenizerError: a value of the wrong type, or two roles with the same token.
    """

    lowercase: bool = True
    strip_accents: bool | None = None
    tokenize_chinese_chars: bool = True
    clean_text: bool = True
    clean_up_tokenization_spaces: bool = True
    unk_token: str = "[UNK]"
    sep_token: str = "[SEP]"
    pad_token: str = "[PAD]"
    cls_token: str = "[CLS]"
    mask_token: str = "[MASK]"
    model_max_length: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ROLES:
                good, expected = isinstance(value, str) and value != "", "a text that is not empty"
            elif field.name == "model_max_length":
                good = value is None or (type(value) is int and value >= 1)
                expected = "a whole number of at least 1, or None"
            else:
                good = isinstance(value, bool) or (field.name == "strip_accents" and value is None)
                expected = "True or False"
            if not good:
                raise TokenizerError(
                    f"the tokenizer's setting {field.name} must be {expected}, got {value!r}"
                )
        if len(set(self.special_tokens.values())) < len(ROLES):
            raise TokenizerError(
                "two roles of the tokenizer share a special token, each must have its own: "
                f"{self.special_tokens}"
            )

    @property
    def special_tokens(self) -> dict[str, str]:
        """The special tokens by role."""
        return {role: getattr(self, role) for role in ROLES}

    def normalizer(self) -> dict[str, Any]:
        """The ``normalizer`` section of a ``tokenizer.json``."""
        return {
            "type": "BertNormalizer",
            "clean_text": self.clean_text,
            "handle_chinese_chars": self.tokenize_chinese_chars,
            "strip_accents": self.strip_accents,
            "lowercase": self.lowercase,
        }

    def to_config(self) -> dict[str, Any]:
        """The ``tokenizer_config.json`` that makes transformers load the same tokenizer.

        A folder with a ``tokenizer.json`` needs it too: ``BertTokenizerFast`` overrides what the former says
        about case with its own default where the latter is silent.
        """
        config: dict[str, Any] = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.lowercase,
            "strip_accents": self.strip_accents,
            "tokenize_chinese_chars": self.tokenize_chinese_chars,
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            **self.special_tokens,
        }
        if self.model_max_length is not None:
            config["model_max_length"] = self.model_max_length
        return config

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        clean_text: bool,
        clean_up_tokenization_spaces: bool,
    ) -> TokenizerSettings:
        """Read a ``tokenizer_config.json`` as ``BertTokenizerFast`` does.

        Args:
            config: the file's content.
            clean_text: holds in any case, the configuration cannot say it.
            clean_up_tokenization_spaces: holds where the configuration does not say it.

        Raises:
            TokenizerError: a field of the wrong type.
        """
        tokens = {
            role: AddedToken.special_token(config[role], role).content
            for role in ROLES
            if config.get(role) is not None
        }
        clean_up = config.get("clean_up_tokenization_spaces")
        return cls(
            lowercase=config.get("do_lower_case", True),
            strip_accents=config.get("strip_accents"),
            tokenize_chinese_chars=config.get("tokenize_chinese_chars", True),
            clean_text=clean_text,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces if clean_up is None else clean_up,
            model_max_length=_limit(config.get("model_max_length")),
            **tokens,
        )


def _limit(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1:
        raise TokenizerError(
            f"tokenizer_config.json: model_max_length must be a number of at least 1, got {value!r}"
        )
    return int(value) if value < _NO_LIMIT else None
