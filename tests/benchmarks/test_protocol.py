"""Lines and arrays between the processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bertrt.errors import MeasurementError
from bertrt_bench import protocol


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    for descriptor in (reading, writing):
        try:
            os.close(descriptor)
        except OSError:  # the test closed it
            continue


def test_a_message_survives(pipe: tuple[int, int]) -> None:
    message = {"op": "time", "folder": "/tmp/é\n", "seconds": 0.25, "list": [1, 2]}  # noqa: S108 - never opened
    os.write(pipe[1], protocol.encode(message))
    assert protocol.decode(protocol.LineReader(pipe[0]).read(5)) == message


def test_lines_come_one_at_a_time_however_they_were_written(pipe: tuple[int, int]) -> None:
    reader = protocol.LineReader(pipe[0])
    os.write(pipe[1], b"one\ntwo\nthr")
    assert [reader.read(5), reader.read(5)] == [b"one", b"two"]
    os.write(pipe[1], b"ee\n\n")
    assert [reader.read(5), reader.read(5)] == [b"three", b""]


def test_a_line_larger_than_the_pipe(pipe: tuple[int, int]) -> None:
    line = b"x" * 1_000_000
    writer = threading.Thread(target=lambda: os.write(pipe[1], line + b"\n"))
    writer.start()
    assert protocol.LineReader(pipe[0]).read(30) == line
    writer.join()


def test_no_line_in_time(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"half a li")
    with pytest.raises(TimeoutError):
        protocol.LineReader(pipe[0]).read(0.01)


def test_the_other_side_is_gone(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"half a li")
    os.close(pipe[1])
    with pytest.raises(EOFError):
        protocol.LineReader(pipe[0]).read(5)


def test_a_line_without_end_is_not_kept(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_LARGEST_LINE", 1000)
    os.write(pipe[1], b"x" * 2000)
    with pytest.raises(MeasurementError, match="line of more than 1000 bytes"):
        protocol.LineReader(pipe[0]).read(0.1)


@pytest.mark.parametrize("line", [b"", b"no JSON", b"[1]", b'"text"', b"\xff", b"[" * 100_000])
def test_what_is_no_message(line: bytes) -> None:
    with pytest.raises(MeasurementError, match="not JSON|not a JSON object"):
        protocol.decode(line)


def test_numbers_that_json_lacks_are_not_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        protocol.encode({"seconds": float("nan")})


def test_arrays_survive(tmp_path: Path) -> None:
    arrays = {
        "ids": np.arange(6).reshape(2, 3),
        "log_probs": np.linspace(0, 1, 4, dtype=np.float32).reshape(2, 2),
    }
    again = protocol.load_arrays(tmp_path, protocol.save_arrays(tmp_path, arrays, rows=10))
    assert list(again) == ["ids", "log_probs"]
    for name, array in arrays.items():
        assert again[name].dtype == array.dtype
        np.testing.assert_array_equal(again[name], array)


@pytest.mark.parametrize("names", [None, "ids", [1], ["../ids"], ["/etc/passwd"], ["a b"], {"ids": 1}])
def test_names_that_are_none(tmp_path: Path, names: object) -> None:
    with pytest.raises(MeasurementError, match="expected a list of plain names"):
        protocol.load_arrays(tmp_path, names)


def test_files_that_are_no_arrays(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="cannot read a worker's answer"):
        protocol.load_arrays(tmp_path, ["absent"])
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY\x01")
    with pytest.raises(MeasurementError, match="cannot read a worker's answer"):
        protocol.load_arrays(tmp_path, ["broken"])
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(MeasurementError, match="cannot read a worker's answer"):
        protocol.load_arrays(tmp_path, ["pickled"])


@pytest.mark.parametrize(("rows", "kept"), [(1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (10, list(range(10)))])
def test_rows_are_spread_evenly(rows: int, kept: list[int]) -> None:
    array = np.arange(20).reshape(10, 2)
    np.testing.assert_array_equal(protocol.sample_rows(array, rows), array[kept])
