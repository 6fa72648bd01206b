"""What calibration runs: sequences of token ids, as a model in use sees them.

A scale must fit what the engine will see. A `[MASK]` and a token of the second segment have activations that plain text
does not have, and ranges that were found without them cut those off. So of four texts one is run as it is, one with
masks, one as a pair of segments, and one as a pair with masks, as far as the model has been trained on such; a short
text is run in several of these ways.

A text is read line by line; what is kept of it is token ids.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import numpy as np
import numpy.typing as npt

from bertrt.backends.base import Int32
from bertrt.cli.texts import Lines, in_chunks
from bertrt.errors import CalibrationError, EmptyTextError, InputError
from bertrt.tokenization import Encoded
from bertrt.tokenization.windows import SPECIALS_OF_ONE, SPECIALS_OF_PAIR, pair, single
from bertrt_export.checkpoints import Checkpoint
from bertrt_export.demo import evaluation_text

DEFAULT_TEXTS: Final = 1_000
DEFAULT_TOKENS: Final = 128
# Token ids are all that is kept of a text: these many, of 512 tokens each, take 0.4 GB.
MOST_TEXTS: Final = 100_000
# Fewer say little about the range of an activation.
FEWEST_TEXTS: Final = 8
# Random weights have no text; that many sequences of noise find scales that overflow nothing.
RANDOM_TEXTS: Final = 16
# Devlin et al. 2019, section 3.1 (https://arxiv.org/abs/1810.04805). That there a tenth of the chosen tokens becomes
# another word, and a tenth stays, makes no input of a kind that plain text lacks.
_MASKED: Final = 0.15
# As it is, with masks, as a pair, as a pair with masks.
_ARRANGEMENTS: Final = 4
_LINES_AT_ONCE: Final = 64
_READ_AT_ONCE: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationInputs:
    """Sequences to run.

    Attributes:
        name: of the text: a file's name without its folder, ``text``, or ``random tokens``.
        sha256: of the file or the text in UTF-8, in hexadecimal; ``None`` for random tokens.
        texts: that were read, or windows of them; none for random tokens.
        sequences: with their special tokens; of a short text several for each.
    """

    name: str
    sha256: str | None
    texts: int
    sequences: tuple[Encoded, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, special ones included."""
        return sum(sequence.input_ids.shape[0] for sequence in self.sequences)


def default_text(checkpoint: Checkpoint) -> Path | None:
    """The text to calibrate with where none is given: the built-in novel, or none for random weights."""
    return None if checkpoint.source.kind == "random" else evaluation_text()


def make_inputs(
    checkpoint: Checkpoint, text: Path | str | None, *, max_texts: int, max_tokens: int, seed: int
) -> CalibrationInputs:
    """Read a text, or draw random tokens; the same arguments give the same inputs.

    Args:
        checkpoint: the model and its tokenizer.
        text: a file (``Path``) or the text itself (``str``): a text a line, blank lines are passed over; a longer
            one is cut into windows, each of which counts as a text. ``None`` for random weights: random tokens.
        max_texts: the first so many are used, from 1 to `MOST_TEXTS`. Fewer are run in several ways, as long as that
            makes no more sequences than this.
        max_tokens: of a sequence, special tokens included; cut to the model's positions. Those beyond are not seen.
        seed: of the masks and the random tokens, 0 or more.

    Raises:
        CalibrationError: fewer than `FEWEST_TEXTS` texts, or no text for weights that are not random.
        InputError: a limit out of range, no such file, or a line longer than a mebibyte.
        EmptyTextError: nothing but blank lines.
        TextEncodingError: not UTF-8; names file, line and byte.
    """
    positions = checkpoint.architecture.max_position_embeddings
    longest = min(max_tokens, positions)
    if not 1 <= max_texts <= MOST_TEXTS:
        raise InputError(f"max_texts must be from 1 to {MOST_TEXTS:,}, got {max_texts}")
    if longest <= SPECIALS_OF_PAIR:
        raise InputError(
            f"calibration needs sequences of {SPECIALS_OF_PAIR + 1} tokens, got max_tokens {max_tokens} for a model "
            f"with {positions} positions"
        )
    if seed < 0:
        raise InputError(f"the seed must be 0 or more, got {seed}")
    rng = np.random.default_rng(seed)
    arrange = _Arrangement(checkpoint, rng, longest)
    size = longest - SPECIALS_OF_ONE
    if text is None:
        if checkpoint.source.kind != "random":
            raise CalibrationError(
                f"calibration of {checkpoint.source.name!r} needs a text, got none; pass a file of UTF-8 from your "
                "field, a text a line"
            )
        contents = rng.integers(checkpoint.architecture.vocab_size, size=(min(max_texts, RANDOM_TEXTS), size))
        return CalibrationInputs(
            name="random tokens",
            sha256=None,
            texts=0,
            sequences=arrange(list(contents.astype(np.int32)), min(max_texts, RANDOM_TEXTS)),
        )
    source = _HashedStream(text)
    found: list[Int32] = []
    with (
        Lines(
            source,
            source.origin,
            f"line {{}} of {source.origin}",
            skip_blank=True,
            owned=False,
        ) as lines,
        source,
    ):
        for content in _contents(lines, checkpoint, size):
            found.append(content)
            if len(found) == max_texts:
                break
        digest = source.finish()
    if len(found) < min(FEWEST_TEXTS, max_texts):
        raise CalibrationError(
            f"{source.origin} holds {len(found)} texts, calibration needs {FEWEST_TEXTS}, and some hundred to be "
            "good; give more, one a line"
        )
    return CalibrationInputs(
        name=source.name, sha256=digest, texts=len(found), sequences=arrange(found, max_texts)
    )


class _HashedStream(io.BufferedIOBase):
    """The bytes of a file, or of a text in memory, with their SHA-256; what `Lines` reads from."""

    def __init__(self, text: Path | str) -> None:
        self._digest = hashlib.sha256()
        self._file: IO[bytes]
        if isinstance(text, str):
            # A lone surrogate is refused where the line is decoded.
            self.name, self.origin = "text", "the text"
            self._file = io.BytesIO(text.encode("utf-8", "surrogatepass"))
            return
        # Bytes of a name that are not UTF-8 become question marks.
        self.name, self.origin = text.name.encode("utf-8", "replace").decode(), repr(str(text))
        try:
            self._file = text.open("rb")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(
                f"cannot read {self.origin}: {reason}; give a file of UTF-8, a text a line"
            ) from error

    def read1(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes; none at the end."""
        data = self._file.read(size)
        self._digest.update(data)
        return data

    def finish(self) -> str:
        """Read on to the end; the digest of it all, in hexadecimal."""
        try:
            while self.read1(_READ_AT_ONCE):
                pass
        except OSError as error:
            raise InputError(f"cannot read {self.origin}: {error.strerror}; give a file of UTF-8") from error
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def _contents(lines: Lines, checkpoint: Checkpoint, size: int) -> Iterator[Int32]:
    """The tokens of each window of each line, without special tokens: ``[at most size] int32``."""
    for chunk in in_chunks(lines, _LINES_AT_ONCE, weigh=lambda line: len(line.text)):
        texts = [line.text for line in chunk]
        try:
            yield from _windows(texts, checkpoint, size)
        except EmptyTextError:
            # Of some line the tokenizer keeps nothing. Nothing has been given out before, see `_windows`.
            for text in texts:
                try:
                    yield from _windows([text], checkpoint, size)
                except EmptyTextError:
                    continue


def _windows(texts: Sequence[str], checkpoint: Checkpoint, size: int) -> list[Int32]:
    # All texts are encoded before the first is given out.
    encoded = checkpoint.tokenizer.encode(texts, max_length=size + SPECIALS_OF_ONE, overflow="window")
    return [window.input_ids[1:-1] for windows in encoded for window in windows]


class _Arrangement:
    """Makes sequences of contents: masks in every second one, two segments in two of four.

    Args:
        checkpoint: says what its model knows.
        rng: of the masks.
        longest: tokens that a sequence may have.
    """

    def __init__(self, checkpoint: Checkpoint, rng: np.random.Generator, longest: int) -> None:
        self._room = longest - SPECIALS_OF_PAIR
        self._tokenizer = tokenizer = checkpoint.tokenizer
        self._rng = rng
        self._masks = checkpoint.heads.mlm
        self._pairs = checkpoint.architecture.type_vocab_size > 1
        self._special = [tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.mask_id]

    def __call__(self, contents: Sequence[Int32], most: int) -> tuple[Encoded, ...]:
        """Each content in one of the arrangements; in several, as long as that makes no more than ``most``."""
        rounds = max(1, min(_ARRANGEMENTS, most // len(contents)))
        return tuple(
            self._arrange(number + turn, content)
            for turn in range(rounds)
            for number, content in enumerate(contents)
        )

    def _arrange(self, number: int, content: Int32) -> Encoded:
        cls_id, sep_id = self._tokenizer.cls_id, self._tokenizer.sep_id
        if self._masks and number % 2:
            content = self._masked(content)
        if self._pairs and number % _ARRANGEMENTS > 1 and content.shape[0] > 1:
            # The second separator takes the place of a full window's last token.
            content = content[: self._room]
            half = content.shape[0] // 2
            return pair(content[:half], content[half:], cls_id, sep_id)
        return single(content, 0, cls_id, sep_id)

    def _masked(self, content: Int32) -> Int32:
        chosen: npt.NDArray[np.bool_] = np.asarray(self._rng.random(content.shape[0]) < _MASKED)
        # A short text has a mask too.
        chosen[self._rng.integers(content.shape[0])] = True
        return np.where(
            chosen & ~np.isin(content, self._special), np.int32(self._tokenizer.mask_id), content
        ).astype(np.int32)
