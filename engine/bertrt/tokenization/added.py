"""Tokens that are found in a text as a whole, as tokenizer files write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bertrt.errors import TokenizerError


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedToken:
    """A token that is found in the text as a whole, before anything else happens to it.

    Attributes:
        content: its text.
        single_word: only where it is a word of its own.
        lstrip: with the white space before it.
        rstrip: with the white space after it.
        normalized: in the normalised text; otherwise in the text as it was given.
        special: left out by ``decode(skip_special_tokens=True)``.
    """

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = False

    @classmethod
    def special_token(cls, value: object, role: str) -> AddedToken:
        """Read a special token that a file gives as a text or as an object.

        Raises:
            TokenizerError: neither.
        """
        if isinstance(value, str):
            return cls.from_json({"content": value, "special": True}, role)
        return cls.from_json({**value, "special": True} if isinstance(value, Mapping) else value, role)

    @classmethod
    def from_json(cls, value: object, name: str) -> AddedToken:
        """Read an object of ``added_tokens``; ``name`` is what an error calls it.

        Raises:
            TokenizerError: no content, or a flag that is not true or false.
        """
        given = value if isinstance(value, Mapping) else {}
        special = given.get("special", False)
        flags = {flag: given.get(flag, False) for flag in ("single_word", "lstrip", "rstrip")}
        flags |= {"special": special, "normalized": given.get("normalized", not special)}
        content = given.get("content")
        if (
            not isinstance(content, str)
            or not content
            or not all(isinstance(f, bool) for f in flags.values())
        ):
            raise TokenizerError(
                f"the token {name!r} must be a text, or an object with 'content' and flags, got {value!r}; "
                "correct the tokenizer's files"
            )
        return cls(content=content, **flags)

    def to_json(self, index: int) -> dict[str, Any]:
        """The object that ``tokenizer.json`` holds for a token of this id."""
        return {"id": index, **{name: getattr(self, name) for name in AddedToken.__slots__}}
