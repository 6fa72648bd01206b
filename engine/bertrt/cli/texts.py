"""Texts for a command: from its arguments, a file, or standard input; one a line, in constant memory."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from types import TracebackType
from typing import Final, TypeVar, cast

from bertrt.cli.console import note
from bertrt.errors import BertRTError, EmptyTextError, InputError, TextEncodingError

T = TypeVar("T")

_STANDARD_INPUT: Final = "-"
_STANDARD_INPUT_NAME: Final = "standard input"
_READ_AT_ONCE: Final = 1 << 16
# Without a bound, a file without a single line end would be read into memory whole. A text of this many
# bytes has some hundred times the tokens that a BERT has positions.
LONGEST_LINE: Final = 1 << 20
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """One text, and where it came from.

    Attributes:
        text: without its line end.
        number: counted from 1.
        place: for messages, with ``{}`` for the number.
    """

    text: str
    number: int
    place: str

    @property
    def where(self) -> str:
        """Its place, for messages."""
        return self.place.replace("{}", str(self.number), 1)


def add_text_arguments(parser: argparse.ArgumentParser, *, pairs: bool = False) -> None:
    """Add the arguments that name the texts.

    Args:
        parser: of the command.
        pairs: the command wants pairs: two arguments, or two texts a line with a tab between them.
    """
    one_a_line = "one pair a line, a tab between its texts" if pairs else "one text a line"
    parser.add_argument(
        "texts",
        nargs="*",
        default=[],
        metavar="TEXT",
        help=("the two texts A and B" if pairs else "a text, or several")
        + f"; '-' or none: standard input, {one_a_line}",
    )
    parser.add_argument("--file", metavar="FILE", help=f"read a file instead: UTF-8, {one_a_line}")
    parser.add_argument("--skip-blank", action="store_true", help="pass over blank lines (default: an error)")


def open_lines(args: argparse.Namespace) -> Lines:
    """Open the texts that the arguments of `add_text_arguments` name; use it as a context manager.

    Raises:
        InputError: arguments that contradict each other, or no such file.
    """
    texts: list[str] = args.texts
    file: str | None = args.file
    if texts and file is not None:
        raise InputError("texts were given and --file too; give one of the two")
    if texts and texts != [_STANDARD_INPUT]:
        return Lines.of_arguments(texts)
    if file is not None and file != _STANDARD_INPUT:
        return Lines.of_file(file, skip_blank=args.skip_blank)
    return Lines.of_standard_input(skip_blank=args.skip_blank)


def in_chunks(items: Iterator[T], size: int, *, weigh: Callable[[T], int] = lambda _: 0) -> Iterator[list[T]]:
    """Group items, in order, into lists of ``size`` (the last may be shorter).

    A chunk is cut early when its items weigh more than `LONGEST_LINE` together, and, where the items can tell
    (`Lines.ready`), when the next one would have to be waited for: whoever types or sends one line at a time
    gets its answer before the next. When ``items`` raises, the items before come first.
    """
    ready: Callable[[], bool] = getattr(items, "ready", lambda: True)
    chunk: list[T] = []
    weight = 0
    failure: BertRTError | None = None
    while failure is None:
        if chunk and (len(chunk) >= size or weight >= LONGEST_LINE or not ready()):
            yield chunk
            chunk, weight = [], 0
        try:
            item = next(items)
        except StopIteration:
            break
        except BertRTError as error:
            failure = error
        else:
            chunk.append(item)
            weight += weigh(item)
    if chunk:
        yield chunk
    if failure is not None:
        raise failure


class Lines:
    """An iterator over `Line`, checked as they come; at most one line and one read are in memory.

    A line ends with a line feed, or a carriage return and a line feed; a byte-order mark before the first is
    dropped.

    Raises:
        InputError: on the way: a line too long, or a file that cannot be read.
        TextEncodingError: bytes that are not UTF-8; names file, line and offset.
        EmptyTextError: no text at all, or a blank line without ``skip_blank``.
    """

    def __init__(
        self, stream: BufferedIOBase | None, origin: str, place: str, *, skip_blank: bool, owned: bool
    ) -> None:
        self._stream = stream
        self._of_arguments = stream is None
        self._origin = origin
        self._place = place
        self._skip_blank = skip_blank
        self._owned = owned
        self._pending: deque[bytes] = deque()
        self._tail = bytearray()
        self._number = 0
        self._offset = 0  # in the file, of the line to come
        self._found = False

    @classmethod
    def of_arguments(cls, texts: list[str], *, called: str = "text") -> Lines:
        """The texts of the command line; none of them may be blank."""
        lines = cls(None, "the arguments", called + " {}", skip_blank=False, owned=False)
        lines._pending.extend(map(_argument_bytes, texts))
        return lines

    @classmethod
    def of_file(cls, path: str | os.PathLike[str], *, skip_blank: bool = False) -> Lines:
        """The lines of a file.

        Raises:
            InputError: it cannot be opened.
        """
        name = repr(os.fspath(path))
        try:
            stream = Path(path).open("rb")  # noqa: SIM115 - closed by `close`
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"cannot read {name}: {reason}; give a file of texts, one a line") from error
        return cls(stream, name, f"line {{}} of {name}", skip_blank=skip_blank, owned=True)

    @classmethod
    def of_standard_input(cls, *, skip_blank: bool = False) -> Lines:
        """The lines of standard input; a person at a terminal is told that they are waited for.

        Raises:
            InputError: there is no standard input.
        """
        # Either is None, or closed, where a program was started without it.
        standard_input = sys.stdin
        if standard_input is None or standard_input.closed:
            raise InputError("no text was given and standard input is closed; give a text or --file FILE")
        if standard_input.isatty():
            note("reading from the terminal, one line at a time; end with Ctrl-D")
        stream = cast(BufferedIOBase, standard_input.buffer)
        return cls(
            stream,
            _STANDARD_INPUT_NAME,
            f"line {{}} of {_STANDARD_INPUT_NAME}",
            skip_blank=skip_blank,
            owned=False,
        )

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> Line:
        while True:
            raw = self._next_raw()
            if raw is None:
                if not self._found:
                    raise EmptyTextError(f"there is no text in {self._origin}")
                raise StopIteration
            self._number += 1
            text = self._decode(raw)
            if not self._of_arguments:
                self._offset += len(raw) + 1
            line = Line(text, self._number, self._place)
            if text and not text.isspace():
                self._found = True
                return line
            if not self._skip_blank:
                advice = "give a text" if self._of_arguments else "remove it or pass --skip-blank"
                raise EmptyTextError(f"{line.where} is blank; {advice}")

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, if it was opened here."""
        if self._owned and self._stream is not None:
            self._stream.close()

    def ready(self) -> bool:
        """Whether the next line can be had without waiting for whoever writes it."""
        if self._pending or self._stream is None:
            return True
        try:
            return bool(select.select([self._stream.fileno()], [], [], 0)[0])
        except (OSError, ValueError):  # not something that can be asked, such as a buffer in memory
            return True

    def _next_raw(self) -> bytes | None:
        """The bytes of the next line, without its line feed; ``None`` at the end."""
        while not self._pending:
            if self._stream is None:
                return None
            try:
                data = self._stream.read1(_READ_AT_ONCE)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise InputError(f"cannot read {self._origin}: {reason}") from error
            if not data:
                self.close()
                self._stream = None
                if self._tail:
                    self._pending.append(bytes(self._tail))
                    self._tail.clear()
                continue
            first, *rest = data.split(b"\n")
            if len(self._tail) + len(first) > LONGEST_LINE:
                raise InputError(
                    f"line {self._number + 1} of {self._origin} is longer than {LONGEST_LINE:,} bytes; "
                    "expected one text a line: break it into several"
                )
            self._tail += first
            for part in rest:
                self._pending.append(bytes(self._tail))
                self._tail[:] = part
        return self._pending.popleft()

    def _decode(self, raw: bytes) -> str:
        """Decode a line, without its carriage return and, on the first, its byte-order mark."""
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            where = Line("", self._number, self._place).where
            hint = "convert it to UTF-8"
            if self._number == 1 and raw[:2] in {b"\xff\xfe", b"\xfe\xff"}:
                hint = "it looks like UTF-16: convert it with 'iconv -f UTF-16 -t UTF-8'"
            raise TextEncodingError(
                f"{where} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {self._offset + error.start} "
                f"({error.reason}); {hint}"
            ) from error
        if not self._of_arguments:
            text = text.removesuffix("\r")
            if self._number == 1 and raw.startswith(_BYTE_ORDER_MARK):
                text = text[1:]
        return text


def _argument_bytes(text: str) -> bytes:
    """The bytes of an argument; those that are not UTF-8 arrive as surrogates and are to be refused later."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
