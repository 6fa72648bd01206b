"""Files that are no weight files: each is refused by a message of its own, before anything is computed."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.native import write_weight_file

native = pytest.importorskip("bertrt._native", reason="the native kernels are not built")

AGAIN = "; export the engine again$"


class File:
    """A weight file to be spoilt: fields by their places in kernels/FORMAT.md."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = bytearray(path.read_bytes())
        (self.count,) = struct.unpack_from("<I", self.data, 24)

    def put(self, at: int, kind: str, *values: Any) -> None:
        struct.pack_into(f"<{kind}", self.data, at, *values)

    def record(self, name: str) -> int:
        """Where the record of a tensor lies."""
        for at in range(128, 128 + 128 * self.count, 128):
            if self.data[at : at + 64].rstrip(b"\0") == name.encode():
                return at
        raise KeyError(name)

    def place(self, name: str) -> tuple[int, int]:
        """Where a tensor lies, and its bytes."""
        return struct.unpack_from("<QQ", self.data, self.record(name) + 88)

    def cut(self, size: int) -> None:
        """Shorten the file, or lengthen it with zeros, and let the header say so."""
        self.data = self.data[:size] + bytes(max(0, size - len(self.data)))
        self.put(16, "Q", size)

    def mend(self, *tensors: str) -> None:
        """Make the checksums of these tensors, and of the header, right again."""
        for name in tensors:
            offset, size = self.place(name)
            self.put(self.record(name) + 104, "I", zlib.crc32(self.data[offset : offset + size]))
        (size,) = struct.unpack_from("<I", self.data, 12)
        self.put(28, "I", 0)
        self.put(28, "I", zlib.crc32(self.data[:size]))

    def load(self, *, verify: bool = False) -> Any:
        self.path.write_bytes(self.data)
        return native.Engine(str(self.path), threads=1, verify=verify)


@pytest.fixture(scope="module")
def weights(
    small_bert: Any, save_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """A weight file of each precision."""
    folder, files = tmp_path_factory.mktemp("weights"), {}
    with open_checkpoint(save_checkpoint(small_bert())) as checkpoint:
        for precision in ("fp32", "bf16", "int8"):
            write_weight_file(checkpoint, folder / precision, precision)
            files[precision] = (folder / precision).read_bytes()
    return files


@pytest.fixture
def make(weights: dict[str, bytes], tmp_path: Path) -> Callable[..., File]:
    """A function that gives a copy to spoil."""

    def make(precision: str = "int8") -> File:
        path = tmp_path / "model.bertrt"
        path.write_bytes(weights[precision])
        return File(path)

    return make


def refuse(file: File, message: str, *, verify: bool = False) -> None:
    with pytest.raises(native.Error, match=f"^'.*model.bertrt': {message}") as caught:
        file.load(verify=verify)
    assert caught.value.code == "bad_file"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_good_file(precision: str, make: Callable[..., File]) -> None:
    for verify in (False, True):
        engine = make(precision).load(verify=verify)
        assert engine.architecture["precision"] == precision
        assert engine.weight_bytes == len(make(precision).data)


def test_what_is_no_file(tmp_path: Path) -> None:
    def code(path: Path, message: str) -> str:
        with pytest.raises(native.Error, match=message) as caught:
            native.Engine(str(path))
        return str(caught.value.code)

    assert code(tmp_path / "none", "none' cannot be opened: No such file") == "not_found"
    assert code(tmp_path, "is a folder") == "bad_file"
    # To open a pipe waits for somebody who writes to it.
    os.mkfifo(tmp_path / "pipe")
    assert code(tmp_path / "pipe", "is no regular file") == "bad_file"
    assert code(Path("/dev/zero"), "is no regular file") == "bad_file"
    (tmp_path / "empty").touch()
    assert code(tmp_path / "empty", "is empty") == "bad_file"
    (tmp_path / "file").write_text("{}")
    assert code(tmp_path / "file" / "beneath", "cannot be opened") == "not_found"
    assert code(tmp_path / "file", "no weight file: it does not begin with 'BERTRTW'") == "bad_file"


@pytest.mark.parametrize("size", [7, 8, 127, 128, 129, 4096, -64, -1])
def test_a_truncated_file(size: int, make: Callable[..., File]) -> None:
    file = make()
    file.data = file.data[:size]
    message = {7: "this is no weight file"}.get(size, "the file (ends within its header|has .* truncated)")
    refuse(file, f"{message}.*{AGAIN}")


# Place, type, value, message; with the header's checksum mended.
HEADER = [
    (8, "I", 2, "the file has format version 2, this release reads 1; update bertrt$"),
    (8, "I", 0, "the file has format version 0"),
    (12, "I", 64, "header is said to have 64 bytes; with .* tensors it has"),
    (12, "I", 0xFFFFFF80, "header is said to have 4294967168 bytes"),
    (24, "I", 0xFFFFFFFF, "header is said to have"),
    (40, "B", 1, "reserved bytes of the header"),
    (120, "B", 1, "reserved bytes of the header"),
    (64, "I", 3, "unknown precision 3, expected 0 to 2"),
    (68, "I", 3, "unknown activation 3, expected 0 to 2"),
    (72, "I", 0, "the hidden size is 0, expected 1 to 65536"),
    (72, "I", 65537, "the hidden size is 65537"),
    (72, "I", 25, "3 heads of 8 do not make up the hidden size 25"),
    (76, "I", 0, "the number of layers is 0"),
    (76, "I", (1 << 24) + 1, "the number of layers is 16777217, expected 1 to 16777216"),
    (76, "I", 1 << 24, "there are .* tensors, the architecture implies 335544"),
    (76, "I", 4, "there are .* tensors, the architecture implies"),
    (80, "I", 0, "the number of heads is 0"),
    (80, "I", 0xFFFFFFFF, "the number of heads is 4294967295"),
    (84, "I", 257, "the head size is 257, expected 1 to 256"),
    (88, "I", 64, "the padded head size is 64, expected 32"),
    (88, "I", 8, "the padded head size is 8, expected 32"),
    (92, "I", 0, "the intermediate size is 0"),
    (92, "I", 65537, "the intermediate size is 65537"),
    (96, "I", 0, "the size of the vocabulary is 0"),
    (96, "I", 1 << 31, "the size of the vocabulary is 2147483648"),
    (100, "I", 0, "the number of positions is 0"),
    (104, "I", 0, "the number of segments is 0"),
    (108, "I", 16 | 15, "unknown flags 16"),
    (108, "I", 1 | 2 | 8, "a next-sentence head without a pooler"),
    (108, "I", 2 | 4 | 8, "a tied decoder without a masked-LM head"),
    (108, "I", 1 | 2 | 4, "there are .* tensors, the architecture implies"),
    (112, "f", float("nan"), "the epsilon of LayerNorm is -?nan, expected 0 to 1"),
    (112, "f", -1.0, "the epsilon of LayerNorm is -1"),
    (112, "f", float("inf"), "the epsilon of LayerNorm is inf"),
    (96, "I", 98, r"tensor 'embeddings.words' has shape \[97, 24\], the architecture implies \[98, 24\]"),
]


@pytest.mark.parametrize(("at", "kind", "value", "message"), HEADER)
def test_headers(at: int, kind: str, value: Any, message: str, make: Callable[..., File]) -> None:
    file = make()
    (size,) = struct.unpack_from("<I", file.data, 12)
    file.put(at, kind, value)
    file.put(28, "I", 0)
    file.put(28, "I", zlib.crc32(file.data[:size]))
    refuse(file, f".*{message}")


def test_a_flipped_bit_of_the_header(make: Callable[..., File]) -> None:
    for at in (33, 73, 112, 128, 200, 1000):
        file = make()
        file.data[at] ^= 1
        refuse(file, f"the checksum of the header is wrong: it is corrupt{AGAIN}")


# Tensor, place within its record, type, value, message.
RECORDS = [
    ("embeddings.words", 0, "c", b"E", "tensor 0 is 'Embeddings.words', expected 'embeddings.words'"),
    ("layer.1.qkv", 6, "c", b"2", "is 'layer.2.qkv', expected 'layer.1.qkv'"),
    ("nsp.bias", 3, "c", b"\x1b", "the name of tensor .* not printable ASCII"),
    ("nsp.bias", 3, "c", b"\0", "the name of tensor .* not filled up with zeros"),
    ("nsp.bias", 8, "56s", b"x" * 56, "the name of tensor .* not filled up with zeros"),
    ("nsp.bias", 108, "B", 1, "reserved bytes of tensor"),
    ("layer.0.qkv", 64, "I", 0, r"'layer.0.qkv' is of type float32 \(0\), expected int8"),
    ("layer.0.qkv", 64, "I", 9, r"is of type unknown \(9\), expected int8"),
    ("layer.0.qkv.sums", 64, "I", 0, "is of type float32 .* expected int32"),
    ("mlm.dense", 64, "I", 0, "is of type float32 .* expected bfloat16"),
    ("layer.0.qkv", 68, "I", 0, r"lies in layout rows \(0\), expected panels"),
    ("layer.0.qkv.bias", 68, "I", 7, r"lies in layout unknown \(7\), expected rows"),
    ("layer.0.ffn_in", 72, "Q", 41, r"has shape \[41, 24\], the architecture implies \[40, 24\]"),
    ("layer.0.ffn_in", 80, "Q", (1 << 64) - 1, r"has shape \[40, 18446744073709551615\]"),
    ("layer.0.ffn_in", 88, "Q", (1 << 64) - 64, "begins at byte 18446744073709551552, expected"),
    ("layer.0.ffn_in", 96, "Q", (1 << 64) - 1, "has 18446744073709551615 bytes, its shape implies"),
    ("layer.0.ffn_in", 96, "Q", 0, "has 0 bytes, its shape implies 4096"),
]


@pytest.mark.parametrize(("name", "at", "kind", "value", "message"), RECORDS)
def test_records(name: str, at: int, kind: str, value: Any, message: str, make: Callable[..., File]) -> None:
    file = make()
    file.put(file.record(name) + at, kind, value)
    file.mend()
    refuse(file, f".*{message}.*{AGAIN}")


def test_two_tensors_in_one_place(make: Callable[..., File]) -> None:
    file = make()
    file.put(file.record("layer.0.ffn_out.scale") + 88, "Q", file.place("layer.0.attention_out.scale")[0])
    file.mend()
    refuse(file, "tensor 'layer.0.ffn_out.scale' begins at byte .*, expected")


def test_a_tensor_twice(make: Callable[..., File]) -> None:
    file = make()
    first, second = file.record("layer.1.ffn_in.sums"), file.record("layer.1.ffn_in.bias")
    file.data[second : second + 128] = file.data[first : first + 128]
    file.mend()
    refuse(file, "tensor .* is 'layer.1.ffn_in.sums', expected 'layer.1.ffn_in.bias'")


@pytest.mark.parametrize("size", [-64, -1])
def test_a_tensor_beyond_the_end(size: int, make: Callable[..., File]) -> None:
    file = make()
    file.cut(len(file.data) + size)
    file.mend()
    refuse(file, f"tensor 'nsp.bias' has 256 bytes from byte .*, beyond the end of the file.*{AGAIN}")


def test_bytes_behind_the_last_tensor(make: Callable[..., File]) -> None:
    file = make()
    file.cut(len(file.data) + 64)
    file.mend()
    refuse(file, "the file has .* bytes, its last tensor ends after")


def floats(precision: str) -> Iterator[tuple[str, str, bytes, str]]:
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        bits = struct.pack("<f", value)
        for name in ("embeddings.positions", "layer.2.ffn_norm.beta", "nsp.bias"):
            yield precision, name, bits, "has values that are NaN or infinite"
        if precision != "int8":
            kept = bits if precision == "fp32" else bits[2:]
            yield precision, "layer.2.ffn_out", kept, "has values that are NaN or infinite"
            yield precision, "pooler.dense", kept, "has values that are NaN or infinite"


@pytest.mark.parametrize(
    ("precision", "name", "bits", "message"),
    [row for name in ("fp32", "bf16", "int8") for row in floats(name)],
)
def test_values_that_are_not_finite(
    precision: str, name: str, bits: bytes, message: str, make: Callable[..., File]
) -> None:
    width = len(bits)
    last = 1 if name == "nsp.bias" else 23
    # The first and the last value, wherever in a vector register they fall.
    for index in (0, last):
        file = make(precision)
        offset = file.place(name)[0] + index * width
        file.data[offset : offset + width] = bits
        refuse(file, f"tensor '{name}' {message}{AGAIN}")


def test_the_largest_values_are_finite(make: Callable[..., File]) -> None:
    for precision, largest in (("fp32", b"\xff\xff\x7f\x7f"), ("bf16", b"\x7f\x7f")):
        for bits in (largest, largest[:-1] + b"\xff"):
            file = make(precision)
            offset = file.place("layer.0.ffn_in")[0]
            file.data[offset : offset + len(bits)] = bits
            file.load()


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("index", [0, 96])
def test_scales(value: float, index: int, make: Callable[..., File]) -> None:
    file = make()
    file.put(file.place("embeddings.words.scale")[0] + 4 * index, "f", value)
    message = (
        "has a scale that is not above zero" if abs(value) <= 1 else "has values that are NaN or infinite"
    )
    refuse(file, f"tensor 'embeddings.words.scale' {message}{AGAIN}")


@pytest.mark.parametrize("name", ["layer.0.qkv.scale", "layer.0.ffn_in.bias", "layer.0.ffn_in.sums"])
def test_padding(name: str, make: Callable[..., File]) -> None:
    file = make()
    offset, size = file.place(name)
    file.put(offset + size - 4, "I", 1)
    refuse(file, f"tensor '{name}' is not padded with zeros{AGAIN}")


@pytest.mark.parametrize("name", ["embeddings.words", "layer.2.ffn_out.bias", "pooler.dense", "nsp.bias"])
def test_checksums_are_compared_when_asked_for(name: str, make: Callable[..., File]) -> None:
    file = make()
    offset, _ = file.place(name)
    file.data[offset] ^= 1
    file.load()
    refuse(file, f"tensor '{name}' does not match its checksum: the file is corrupt{AGAIN}", verify=True)


def test_int8_values_are_checked_when_asked_for(make: Callable[..., File]) -> None:
    file = make()
    offset, _ = file.place("layer.1.ffn_out")
    file.put(offset, "b", -128)
    file.mend("layer.1.ffn_out")
    refuse(file, f"tensor 'layer.1.ffn_out' has the value -128, expected -127 to 127{AGAIN}", verify=True)
    file = make()
    # The last output's.
    offset, _ = file.place("layer.1.ffn_out.sums")
    (found,) = struct.unpack_from("<i", file.data, offset + 4 * 23)
    file.put(offset + 4 * 23, "i", found + 1)
    file.mend("layer.1.ffn_out.sums")
    message = "tensor 'layer.1.ffn_out' has sums other than those in 'layer.1.ffn_out.sums'"
    refuse(file, f"{message}{AGAIN}", verify=True)
    file.load()
