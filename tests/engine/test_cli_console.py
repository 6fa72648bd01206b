from __future__ import annotations

import contextlib
import io
import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertrt.cli import console
from bertrt.cli.npy import NpyWriter
from bertrt.errors import InputError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_json_is_one_line_and_keeps_letters(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"text": "é\n日本", "score": 0.1, "none": None}
    console.emit(value, as_json=True)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "日本" in out
    assert json.loads(out) == value


def test_json_escapes_what_utf8_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"path": "caf\udce9/日本"}
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, encoding="utf-8"))
    console.emit(value, as_json=True)
    assert data.getvalue().isascii()
    assert json.loads(data.getvalue()) == value


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_has_no_nan(number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        console.emit([number], as_json=True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_without_unicode_gets_escapes(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    console.emit(["日本"], as_json=True)
    console.emit("日本", as_json=False)
    as_json, as_text = raw.getvalue().decode(encoding).splitlines()
    assert json.loads(as_json) == ["日本"]
    assert as_text == r"\u65e5\u672c"


def test_table() -> None:
    rows = [("score", "token"), ("0.5", "日本"), ("10.25", "e\u0301\x1b[2J")]
    assert console.table(rows, align="><").splitlines() == [
        "  score  token",
        "    0.5  日本",
        "  10.25  e\u0301\\x1b[2J",
    ]


@pytest.mark.parametrize(
    ("text", "columns"), [("", 0), ("abc", 3), ("日本", 4), ("e\u0301", 1), ("a\u3000b", 4)]
)
def test_width(text: str, columns: int) -> None:
    assert console.width(text) == columns


@given(st.text())
def test_nothing_printable_steers_the_terminal(text: str) -> None:
    shown = console.printable(text)
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (11_250_000, "11.2 MB"),
        (3 * 10**9, "3.0 GB"),
        (5 * 10**15, "5000.0 TB"),
    ],
)
def test_human_bytes(count: int, text: str) -> None:
    assert console.human_bytes(count) == text


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with console.Progress("texts", total=3) as progress:
        progress.advance(3)
    assert capsys.readouterr() == ("", "")


def test_progress_without_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with console.Progress("texts") as progress:
        progress.advance()


def test_progress_counts_on_a_terminal_and_clears_up(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(0, 1000, 2))
    monkeypatch.setattr("bertrt.cli.console.time.monotonic", lambda: float(next(times)))
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with console.Progress("texts", total=20) as progress:
        progress.advance(5)
        progress.advance(5)
    with console.Progress("texts") as progress:
        progress.advance(1)
    first, second, cleared, unknown, cleared_too = terminal.getvalue().split("\r\x1b[K")[1:]
    assert first == "texts: 5 of 20 (25%), 2.5 a second, 6 s left"
    assert second == "texts: 10 of 20 (50%), 2.5 a second, 4 s left"
    assert unknown == "texts: 1, 2 s"
    assert (cleared, cleared_too) == ("", "")


def test_progress_towards_what_is_known_only_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(0, 1000, 2))
    monkeypatch.setattr("bertrt.cli.console.time.monotonic", lambda: float(next(times)))
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with console.Progress("texts") as progress:
        progress.advance(5, 20)
        progress.advance(5)
    drawn = terminal.getvalue().split("\r\x1b[K")[1:]
    assert [line.partition(",")[0] for line in drawn] == ["texts: 5 of 20 (25%)", "texts: 10 of 20 (50%)", ""]


def test_progress_is_not_drawn_through_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    with console.Progress("texts", beside_output=True) as progress:
        progress.advance()
    assert terminal.getvalue() == ""


def test_write_atomically(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    console.write_atomically(path, "é\n")
    console.write_atomically(str(path), "ü\n")
    assert path.read_bytes() == "ü\n".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("counts", [[1], [3, 2], [256, 1]])
@pytest.mark.parametrize("columns", [1, 24])
def test_npy(tmp_path: Path, counts: list[int], columns: int) -> None:
    generator = np.random.default_rng(0)
    blocks = [generator.standard_normal((count, columns), np.float32) for count in counts]
    path = tmp_path / "x.npy"
    path.write_bytes(b"what was there before")
    with NpyWriter(path) as writer:
        for block in blocks:
            writer.write(block)
        assert path.read_bytes() == b"what was there before"
    found = np.load(path, allow_pickle=False)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.concatenate(blocks))
    assert np.load(path, mmap_mode="r").shape == (sum(counts), columns)
    assert list(tmp_path.iterdir()) == [path]


def test_npy_of_many_rows_has_room_for_its_shape(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    with NpyWriter(path) as writer:
        writer.write(np.zeros((1, 1), np.float32))
        writer.rows, writer.columns = 2**63 - 1, 2**31 - 1
    with path.open("rb") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == ((2**63 - 1, 2**31 - 1), False, np.dtype("<f4"))
        assert file.tell() == 128


def test_npy_takes_any_layout(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    with NpyWriter(tmp_path / "x.npy") as writer:
        writer.write(array.T)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), array.T)


def test_an_interrupted_npy_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(b"before")
    with contextlib.suppress(KeyboardInterrupt), NpyWriter(path) as writer:
        writer.write(np.zeros((1, 1), np.float32))
        raise KeyboardInterrupt
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_npy_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with NpyWriter(tmp_path / "x.npy") as writer:
            writer.write(np.zeros((1, 1), np.float32))
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x.npy").stat().st_mode) == 0o640


@pytest.mark.parametrize("name", ["no/such/folder/x.npy", "folder.npy"])
def test_npy_says_at_once_that_it_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        NpyWriter(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.npy"]
