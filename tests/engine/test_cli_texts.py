from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from bertrt.cli.texts import LONGEST_LINE, Lines, add_text_arguments, in_chunks, open_lines
from bertrt.errors import EmptyTextError, InputError, TextEncodingError


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_text_arguments(parser)
    return parser.parse_args(arguments)


def read_texts(args: argparse.Namespace) -> Iterator[str]:
    with open_lines(args) as lines:
        for line in lines:
            yield line.text


@pytest.fixture
def write(tmp_path: Path) -> Iterator[object]:
    def write(data: bytes) -> str:
        path = tmp_path / "texts.txt"
        path.write_bytes(data)
        return str(path)

    return write


def give_standard_input(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


class Trickle(io.RawIOBase):
    """Gives ``data`` over and over, ``step`` bytes at a time, until ``size`` were given."""

    def __init__(self, data: bytes, *, size: int, step: int) -> None:
        self._data = data
        self._left = size
        self._step = step
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override] # BufferedReader gives a view
        count = min(len(buffer), self._step, self._left, len(self._data) - self._at)
        buffer[:count] = self._data[self._at : self._at + count]
        self._at = (self._at + count) % len(self._data)
        self._left -= count
        return count


def test_arguments() -> None:
    assert list(read_texts(parse("one", " two ", "three\nlines\r"))) == ["one", " two ", "three\nlines\r"]


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"\xef\xbb\xbfone\ntwo", ["one", "two"]),
        (b"one\n\xef\xbb\xbftwo", ["one", "\ufefftwo"]),
        (" é\u2028x \n日本\n".encode(), [" é\u2028x ", "日本"]),
        (b"a\rb\n", ["a\rb"]),
        (b"a\0b\n", ["a\0b"]),
        (b"a\tb\x0bc\x0cd\x1ce\xc2\x85f\n", ["a\tb\x0bc\x0cd\x1ce\x85f"]),
    ],
)
def test_lines_of_a_file_and_of_standard_input(
    data: bytes, texts: list[str], write: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(write)
    assert list(read_texts(parse("--file", write(data)))) == texts
    for arguments in ((), ("-",), ("--file", "-")):
        give_standard_input(monkeypatch, data)
        assert list(read_texts(parse(*arguments))) == texts


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1 << 20])
def test_however_the_bytes_arrive_the_lines_are_the_same(step: int) -> None:
    data = "one\r\ntwé\n日本\n\U0001f600 last".encode()
    stream = io.BufferedReader(Trickle(data, size=len(data), step=step))
    lines = Lines(stream, "x", "line {} of x", skip_blank=False, owned=True)
    assert [line.text for line in lines] == ["one", "twé", "日本", "\U0001f600 last"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b" \t\n", "\u3000\n".encode()])
def test_a_blank_line_is_named_or_skipped(end: bytes, write: object) -> None:
    assert callable(write)
    name = write(b"one\n" + end + b"three\n")
    texts = read_texts(parse("--file", name))
    assert next(texts) == "one"
    with pytest.raises(EmptyTextError, match=r"^line 2 of '.*texts\.txt' is blank; .*--skip-blank"):
        next(texts)
    with open_lines(parse("--file", name, "--skip-blank")) as lines:
        assert [(line.text, line.number) for line in lines] == [("one", 1), ("three", 3)]


@pytest.mark.parametrize("data", [b"", b"\n", b"\xef\xbb\xbf", b" \n\r\n\t\n"])
def test_no_text_at_all_is_an_error(data: bytes, write: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(write)
    with pytest.raises(EmptyTextError, match=r"there is no text in '.*texts\.txt'"):
        list(read_texts(parse("--file", write(data), "--skip-blank")))
    give_standard_input(monkeypatch, data)
    with pytest.raises(EmptyTextError, match="there is no text in standard input"):
        list(read_texts(parse("--skip-blank")))


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_a_blank_argument_is_an_error(text: str) -> None:
    with pytest.raises(EmptyTextError, match=r"^text 2 is blank"):
        list(read_texts(parse("one", text, "--skip-blank")))


@pytest.mark.parametrize(
    ("data", "line", "byte", "offset"),
    [
        (b"one\ntw\xff\n", 2, "0xff", 6),
        (b"\xc3\n", 1, "0xc3", 0),
        (b"one\r\n\r\nx\xed\xa0\x80", 3, "0xed", 8),  # a surrogate is not UTF-8
        (b"one\n" + b"y" * 100_000 + b"\x80", 2, "0x80", 100_004),
        (b"\xef\xbb\xbfone\n\xf5", 2, "0xf5", 7),
    ],
)
def test_bytes_that_are_not_utf8(data: bytes, line: int, byte: str, offset: int, write: object) -> None:
    assert callable(write)
    pattern = rf"^line {line} of '.*texts\.txt' is not UTF-8: byte {byte} at offset {offset} .*convert it"
    with pytest.raises(TextEncodingError, match=pattern):
        list(read_texts(parse("--file", write(data), "--skip-blank")))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf16_is_recognised(encoding: str, write: object) -> None:
    assert callable(write)
    data = "\ufeffone\n".encode(encoding)
    with pytest.raises(TextEncodingError, match="iconv -f UTF-16"):
        list(read_texts(parse("--file", write(data))))


@pytest.mark.parametrize("surrogate", [0xDCFF, 0xD800], ids=hex)
def test_an_argument_that_is_not_utf8(surrogate: int) -> None:
    with pytest.raises(TextEncodingError, match=r"^text 2 is not UTF-8: byte 0x.. at offset 1 "):
        list(read_texts(parse("one", f"a{chr(surrogate)}b")))


def test_a_line_may_be_long_but_not_longer(write: object) -> None:
    assert callable(write)
    name = write(b"one\n" + b"x" * LONGEST_LINE + b"\n")
    assert [len(text) for text in read_texts(parse("--file", name))] == [3, LONGEST_LINE]
    for end in (b"", b"\n"):
        name = write(b"one\n" + b"x" * (LONGEST_LINE + 1) + end)
        with pytest.raises(InputError, match=r"^line 2 of .* is longer than 1,048,576 bytes"):
            list(read_texts(parse("--file", name)))


@pytest.mark.parametrize(
    ("line", "size", "failure"),
    [
        (b"x" * 65_536, 32 << 20, InputError),
        (b"\n" * 65_536, 1 << 18, EmptyTextError),
        (b"a line of text\n" * 5_000, 2 << 20, None),
        (b"y" * 300_000 + b"\n", 32 << 20, None),
    ],
    ids=["one endless line", "blank lines", "short lines", "long lines"],
)
def test_memory_is_bounded(line: bytes, size: int, failure: type[Exception] | None) -> None:
    def measure() -> int:
        stream = io.BufferedReader(Trickle(line, size=size, step=1 << 20))
        lines = Lines(stream, "x", "line {} of x", skip_blank=True, owned=True)
        tracemalloc.start()
        try:
            with pytest.raises(failure) if failure else contextlib.nullcontext():
                for _ in in_chunks(lines, 256, weigh=lambda line: len(line.text)):
                    pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # A line (1 MiB) as bytes and as text, a chunk's weight of lines (1 MiB and one line more), a read of
    # 64 KiB split into as many empty lines of 33 bytes and 8 of pointer, twice: less than 8 MiB in all,
    # whatever the size of the stream.
    assert measure() < 8 << 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("one", "--file", "x"), "give one of the two"),
        (("--file", "/nowhere/x"), "cannot read '/nowhere/x': No such file"),
        (("--file", "/"), "cannot read '/': Is a directory"),
        (("--file", "a\0b"), "cannot read 'a"),
        (("--file", ""), "cannot read ''"),
    ],
)
def test_a_source_that_cannot_be_read(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(read_texts(parse(*arguments)))


def test_standard_input_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input is closed"):
        list(read_texts(parse()))


def test_a_person_at_the_terminal_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give_standard_input(monkeypatch, b"one\n")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert list(read_texts(parse())) == ["one"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "Ctrl-D" in captured.err


def test_the_file_is_closed_when_the_reader_stops(write: object) -> None:
    assert callable(write)
    with open_lines(parse("--file", write(b"one\ntwo\n"))) as lines:
        assert next(lines).where.startswith("line 1 of '")


def test_a_place_may_hold_braces(tmp_path: Path) -> None:
    path = tmp_path / "a{}b.txt"
    path.write_text("one\n")
    [line] = Lines.of_file(path)
    assert line.where == f"line 1 of {str(path)!r}"


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 9])
def test_chunks(count: int) -> None:
    chunks = list(in_chunks(iter(range(count)), 4))
    assert [item for chunk in chunks for item in chunk] == list(range(count))
    assert all(len(chunk) == 4 for chunk in chunks[:-1])
    assert all(0 < len(chunk) <= 4 for chunk in chunks)


def test_a_chunk_is_bounded_by_weight() -> None:
    chunks = list(in_chunks(iter([LONGEST_LINE, 1, 1, LONGEST_LINE]), 4, weigh=lambda item: item))
    assert chunks == [[LONGEST_LINE], [1, 1, LONGEST_LINE]]


def test_what_comes_before_an_error_is_not_lost() -> None:
    def items() -> Iterator[int]:
        yield from range(6)
        raise InputError("the seventh")

    chunks = in_chunks(items(), 4)
    assert [next(chunks), next(chunks)] == [[0, 1, 2, 3], [4, 5]]
    with pytest.raises(InputError, match="the seventh"):
        next(chunks)


def test_no_line_waits_for_the_next() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as stream, open(writer, "wb", buffering=0) as feed:  # noqa: PTH123 - descriptors
        lines = Lines(stream, "a pipe", "line {}", skip_blank=False, owned=False)
        chunks = in_chunks(lines, 256)
        # Each `next` would block for ever if it waited for 256 lines.
        for texts in (["one"], ["two", "three"]):
            feed.write("".join(text + "\n" for text in texts).encode())
            assert [line.text for line in next(chunks)] == texts
        feed.write(b"half")
        feed.close()
        assert [line.text for line in next(chunks)] == ["half"]
        assert next(chunks, None) is None
