"""What a command writes: answers on standard output, progress and notes on standard error."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from bertrt.folder import write_file

# Redrawing more often than this (in seconds) costs time and shows nothing more.
_REDRAW_EVERY: Final = 0.1
_RIGHT_ALIGNED: Final = ">"


def emit(value: Any, *, as_json: bool) -> None:
    """Write one answer to standard output, and flush it.

    Args:
        value: with ``as_json`` a JSON value, otherwise whatever ``str`` turns into the text to be shown.
        as_json: write the value as JSON on one line.

    Raises:
        ValueError: a number of the JSON value is NaN or infinite.
    """
    write_line(to_json(value) if as_json else str(value))
    sys.stdout.flush()


def to_json(value: Any) -> str:
    """A JSON value on one line; non-ASCII letters stay letters where standard output can carry them."""
    if _speaks_utf8():
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        # Half of a surrogate pair, such as a file name that is not UTF-8 holds, can only be escaped.
        with contextlib.suppress(UnicodeEncodeError):
            text.encode()
            return text
    return json.dumps(value, allow_nan=False)


def write_line(text: str) -> None:
    """Write a line to standard output, without flushing; what its encoding lacks is written as an escape."""
    if not _speaks_utf8():
        encoding = sys.stdout.encoding or "ascii"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """Write a line for the person at the terminal to standard error."""
    print(f"bertrt: {printable(text)}", file=sys.stderr, flush=True)


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8 beside its place and rename it, so that no reader sees half of it.

    Raises:
        OSError: the disk is full or read-only; nothing is left behind.
    """
    write_file(Path(path), text.encode())


def printable(text: str) -> str:
    """The text with control characters as escapes, so that an answer cannot steer the terminal."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def width(text: str) -> int:
    """Columns that a text takes on a terminal: two for wide characters, none for combining ones."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def table(rows: Iterable[Sequence[str]], *, align: str = "", indent: str = "  ") -> str:
    """Rows as aligned columns, two spaces apart; control characters are escaped.

    Args:
        rows: of equal lengths.
        align: for each column ``<`` or ``>``; columns beyond its end are aligned left.
        indent: put before every row.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(width, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = []
        for column, cell in enumerate(row):
            space = " " * (widths[column] - width(cell))
            padded.append(space + cell if align[column : column + 1] == _RIGHT_ALIGNED else cell + space)
        lines.append((indent + "  ".join(padded)).rstrip())
    return "\n".join(lines)


def human_bytes(count: int) -> str:
    """A size for people, such as ``11.2 MB`` (powers of 1,000)."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


class Progress:
    """A line on standard error that counts, only when standard error is a terminal.

    Args:
        label: what is counted, such as ``"texts"``.
        total: how many there will be, where that is known.
        beside_output: answers go to standard output meanwhile; when that is a terminal too, the answers
            themselves show the progress, and the line would only run through them.
    """

    def __init__(self, label: str, *, total: int | None = None, beside_output: bool = False) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._drawn = 0.0
        self._start = time.monotonic()
        self._shown = _is_terminal(sys.stderr) and not (beside_output and _is_terminal(sys.stdout))

    def advance(self, count: int = 1, total: int | None = None) -> None:
        """Count, and redraw the line if it is time; ``total``: how many there will be, known by now."""
        self._done += count
        self._total = total or self._total
        now = time.monotonic()
        if self._shown and now - self._drawn >= _REDRAW_EVERY:
            self._drawn = now
            sys.stderr.write("\r\x1b[K" + self._line(now - self._start))
            sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._shown and self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _line(self, seconds: float) -> str:
        rate = self._done / seconds if seconds > 0 else 0.0
        line = f"{self._label}: {self._done:,}"
        if self._total:
            line += f" of {self._total:,} ({self._done / self._total:.0%})"
        line += f", {rate:,.1f} a second" if rate >= 1 else f", {seconds:,.0f} s"
        if self._total and rate > 0 and self._done < self._total:
            line += f", {(self._total - self._done) / rate:,.0f} s left"
        return line


def _is_terminal(stream: Any) -> bool:
    # A stream is None where the program was started without one.
    try:
        return stream is not None and bool(stream.isatty())
    except ValueError:  # closed
        return False


def _speaks_utf8() -> bool:
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    return encoding.lower().replace("-", "").replace("_", "") == "utf8"
