"""The tokenizer: texts and pairs of texts to token ids, and back."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from tokenizers import Tokenizer

from bertrt.arguments import as_texts, check_choice
from bertrt.errors import InputError, MaskNotFoundError, SequenceTooLongError, TokenizerError
from bertrt.tokenization import definition as definitions
from bertrt.tokenization import files, windows
from bertrt.tokenization.contents import LONG_TEXT, ContentReader
from bertrt.tokenization.definition import Definition
from bertrt.tokenization.settings import TokenizerSettings
from bertrt.tokenization.windows import Encoded, Int32, Overflow

# The largest id that the library can be asked about.
_LARGEST_ASKED = (1 << 32) - 1


class WordPieceTokenizer:
    """WordPiece as BERT uses it (Devlin et al. 2019, https://arxiv.org/abs/1810.04805).

    Token ids are those of transformers' ``BertTokenizerFast`` for the same files. Any number of threads may
    use one tokenizer at once.

    Attributes:
        settings: normalisation and special tokens.
        vocab_size: one more than the largest id.
        unk_id: id of the token for unknown words.
        sep_id: id of the token that ends a segment.
        pad_id: id of the token that fills a batch.
        cls_id: id of the token that opens a sequence.
        mask_id: id of the token to be predicted.
    """

    def __init__(self, definition: Definition) -> None:
        self.settings: TokenizerSettings = definition.settings
        ids = definition.ids
        self.vocab_size: int = 1 + max(ids.values())
        self.unk_id: int = ids[self.settings.unk_token]
        self.sep_id: int = ids[self.settings.sep_token]
        self.pad_id: int = ids[self.settings.pad_token]
        self.cls_id: int = ids[self.settings.cls_token]
        self.mask_id: int = ids[self.settings.mask_token]
        self._tokenizer = _build(definition)
        self._reader = ContentReader(self._tokenizer, (token.content for token in definition.added.values()))

    @classmethod
    def from_folder(cls, folder: Path, names: Collection[str] | None = None) -> WordPieceTokenizer:
        """Read ``tokenizer.json``, or ``vocab.txt``, with ``tokenizer_config.json``.

        Where both the first and the last are there, the configuration wins over the normaliser of
        ``tokenizer.json``, with ``BertTokenizerFast``'s defaults for what it leaves out. Without a
        configuration ``tokenizer.json`` is taken at its word, whereas transformers would lower the case.

        Args:
            folder: that holds the files.
            names: the files that may be read, such as those of which a manifest has the hashes; by default
                all.

        Raises:
            TokenizerError: files missing, corrupt, of another kind of tokenizer, or without a special token.
        """
        return cls(files.read_folder(Path(folder), names))

    @classmethod
    def from_vocab(cls, vocab: Sequence[str] | Path, settings: TokenizerSettings) -> WordPieceTokenizer:
        """Build a tokenizer from WordPieces in the order of their ids, or from the path of a ``vocab.txt``.

        Raises:
            TokenizerError: a WordPiece is there twice, or a special token is not there.
        """
        tokens = files.read_vocab(Path(vocab)) if isinstance(vocab, str | Path) else vocab
        return cls(Definition(vocab=definitions.number(tokens), settings=settings).with_special_tokens())

    @property
    def mask_token(self) -> str:
        """The text of the mask token."""
        return self.settings.mask_token

    def to_json(self) -> str:
        """The content of a ``tokenizer.json``.

        For transformers to load the same tokenizer, a ``tokenizer_config.json`` with
        `TokenizerSettings.to_config` must lie beside it.
        """
        text: str = self._tokenizer.to_str(pretty=True)
        return text + "\n"

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, or None if it is not in the vocabulary."""
        index: int | None = self._tokenizer.token_to_id(token)
        return index

    def id_to_token(self, id: int) -> str:  # noqa: A002 - the name that users of transformers know
        """The text of a token.

        Raises:
            InputError: no token has this id.
        """
        token: str | None = self._tokenizer.id_to_token(id) if 0 <= id < self.vocab_size else None
        if token is None:
            raise InputError(f"no token has the id {id}; ids go from 0 to {self.vocab_size - 1}")
        return token

    def encode(
        self,
        texts: Sequence[str],
        *,
        max_length: int,
        overflow: Overflow = "error",
        stride: int = 0,
        keep_masks: bool = False,
    ) -> list[list[Encoded]]:
        """Tokenize texts, each into ``[CLS] tokens [SEP]``.

        Args:
            texts: any number of texts; special tokens written out in them, such as ``[MASK]``, become tokens.
            max_length: tokens that a sequence may have, special tokens included; at least 3.
            overflow: what to do with a longer text: ``error``; ``truncate`` keeps its first tokens;
                ``window`` cuts it into sequences that overlap.
            stride: tokens that neighbouring windows share, less than ``max_length - 2``.
            keep_masks: refuse to lose a mask token to truncation.

        Returns:
            For each text its sequences: one, except under ``window``.

        Raises:
            InputError: an argument out of range, or a text that is not a ``str``.
            EmptyTextError: a text without a token.
            MaskNotFoundError: truncation would lose a mask token, under ``keep_masks``.
            SequenceTooLongError: a text is too long, under ``error``.
            TextEncodingError: a text with a lone surrogate.
        """
        size = max_length - windows.SPECIALS_OF_ONE
        check_choice(overflow, name="overflow", choices=get_args(Overflow))
        if size < 1:
            raise InputError(f"max_length must be at least 3 ([CLS], a token, [SEP]), got {max_length}")
        if not 0 <= stride < size:
            raise InputError(
                f"stride must be from 0 to {size - 1}, less than the {size} tokens of a window, got {stride}"
            )
        texts = _listed(texts, "texts")
        # Truncation has to see what it drops, to miss no mask.
        enough = None if overflow == "window" or (keep_masks and overflow == "truncate") else size
        cls_id, sep_id = self.cls_id, self.sep_id
        result = []
        for index, content in enumerate(self._reader.read(texts, "text {}", enough=enough)):
            length = content.shape[0]
            if length <= size:
                cuts = [(0, length)]
            elif overflow == "window":
                cuts = windows.spans(length, size, stride)
            elif overflow == "truncate":
                if keep_masks:
                    self._check_lost(content[size:], index, size)
                cuts = [(0, size)]
            else:
                raise SequenceTooLongError(
                    f"text {index} has {_count(length + windows.SPECIALS_OF_ONE, texts[index])} tokens, the "
                    f"model has {max_length} positions; shorten it or pass overflow='truncate' or 'window'",
                    index=index,
                )
            result.append(
                [windows.single(content[start:stop], start, cls_id, sep_id) for start, stop in cuts]
            )
        return result

    def encode_pairs(
        self,
        a: Sequence[str],
        b: Sequence[str],
        *,
        max_length: int,
        overflow: Literal["error", "truncate"] = "error",
    ) -> list[Encoded]:
        """Tokenize pairs of texts, each into ``[CLS] a [SEP] b [SEP]``.

        Args:
            a: first texts.
            b: second texts, as many.
            max_length: tokens that a sequence may have, special tokens included; at least 5.
            overflow: what to do with a longer pair: ``error``, or ``truncate``, which takes tokens from the
                end of the longer text until the pair fits.

        Raises:
            InputError: an argument out of range, or a text that is not a ``str``.
            EmptyTextError: a text without a token.
            SequenceTooLongError: a pair is too long, under ``error``.
            TextEncodingError: a text with a lone surrogate.
        """
        room = max_length - windows.SPECIALS_OF_PAIR
        check_choice(overflow, name="overflow", choices=("error", "truncate"))
        if room < 2:
            raise InputError(
                f"max_length must be at least 5 ([CLS], a token, [SEP], a token, [SEP]), got {max_length}"
            )
        names = "the first text of pair {}", "the second text of pair {}"
        a, b = _listed(a, "a"), _listed(b, "b")
        if len(a) != len(b):
            raise InputError(
                f"there are {len(a)} first texts and {len(b)} second texts; give as many of both"
            )
        # Which segment keeps an odd token depends on which is longer, so truncation needs both to the end.
        enough = room if overflow == "error" else None
        firsts, seconds = (
            self._reader.read(texts, name, enough=enough) for texts, name in zip((a, b), names, strict=True)
        )
        result = []
        for index, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
            length = first.shape[0] + second.shape[0]
            if length > room:
                if overflow == "error":
                    count = _count(length + windows.SPECIALS_OF_PAIR, a[index], b[index])
                    raise SequenceTooLongError(
                        f"pair {index} has {count} tokens, the model has {max_length} positions; shorten it "
                        "or pass overflow='truncate'",
                        index=index,
                    )
                keep_first, keep_second = windows.longest_first(first.shape[0], second.shape[0], room)
                first, second = first[:keep_first], second[:keep_second]
            result.append(windows.pair(first, second, self.cls_id, self.sep_id))
        return result

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids, as ``BertTokenizerFast.decode`` of transformers 4.57 writes it.

        An id beyond the vocabulary (a model may have rows to spare) stands for nothing and is left out.

        Raises:
            InputError: a negative id.
        """
        numbers = np.asarray(ids, dtype=np.int64).tolist()
        if numbers and not 0 <= min(numbers) <= max(numbers) <= _LARGEST_ASKED:
            raise InputError(f"token ids go from 0, got {min(numbers)} to {max(numbers)}")
        text: str = self._tokenizer.decode(numbers, skip_special_tokens=skip_special_tokens)
        return _clean_up(text) if self.settings.clean_up_tokenization_spaces else text

    def _check_lost(self, rest: Int32, index: int, size: int) -> None:
        lost = int(np.count_nonzero(rest == self.mask_id))
        if lost:
            raise MaskNotFoundError(
                f"truncating text {index} to its first {size} tokens would lose {lost} of its "
                f"{self.mask_token}; move them forward, shorten the text, or pass overflow='window'",
                index=index,
            )


def _build(definition: Definition) -> Any:
    try:
        tokenizer = Tokenizer.from_str(json.dumps(definition.to_json()))
    # The library raises bare Exception for whatever it cannot read.
    except Exception as error:
        raise TokenizerError(
            f"the tokenizer cannot be built: {error}; take its files from the checkpoint again"
        ) from error
    for index, token in definition.added.items():
        found = tokenizer.token_to_id(token.content)
        if found != index:
            raise TokenizerError(
                f"the added token {token.content!r} has id {index}, but the library gives it {found}; take "
                "the files from the checkpoint again"
            )
    return tokenizer


def _count(tokens: int, *texts: str) -> str:
    """The number of tokens for a message; of a long text, not all were counted."""
    return f"at least {tokens}" if any(len(text) > LONG_TEXT for text in texts) else str(tokens)


def _listed(texts: Sequence[str], name: str) -> list[str]:
    items, single = as_texts(texts, name=name)
    if single:
        raise InputError(f"{name} is a single str, expected a sequence of them: put it into a list")
    return items


def _clean_up(text: str) -> str:
    # The rules of transformers' clean_up_tokenization, in its order.
    for gap, closed in (
        (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
        (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
    ):  # fmt: skip
        text = text.replace(gap, closed)
    return text
