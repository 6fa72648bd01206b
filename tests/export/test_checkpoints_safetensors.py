"""Our safetensors reader and writer against the library of that name, on whole files and on broken ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from bertrt.errors import CheckpointError, CorruptCheckpointError
from bertrt_export.checkpoints.safetensors_file import SafetensorsFile, write_safetensors

TENSORS = {
    "float32": torch.tensor([[1.5, -0.0, math.inf], [math.nan, 1e-42, 3.4e38]]),
    "float16": torch.tensor([65504.0, 6e-8, -math.inf, 0.1], dtype=torch.float16),
    "bfloat16": torch.tensor([[3.38e38], [1e-40], [-2.0], [math.nan]], dtype=torch.bfloat16),
    # An odd number of bytes, after which nothing is aligned.
    "int8": torch.tensor([1, 2, 3], dtype=torch.int8),
    "scalar": torch.tensor(7.25),
}


def test_values_and_types(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert {name: (info.shape, info.dtype) for name, info in file.infos.items()} == {
        name: (tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in TENSORS.items()
    }
    for name in ("float32", "float16", "bfloat16", "scalar"):
        # Bit by bit, so that the signs of zeros and the payloads of NaN count too.
        expected = TENSORS[name].float().numpy().view(np.uint32)
        np.testing.assert_array_equal(file.read(name).view(np.uint32), expected, strict=True)


def test_unaligned_data(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (3 - len(header) % 4)
    path = tmp_path / "x.safetensors"
    values = np.array([1.5, -2.5], np.float32)
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
    np.testing.assert_array_equal(SafetensorsFile(path).read("a"), values)


def test_writer_is_read_by_the_library(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "b.weight": rng.standard_normal((3, 5), np.float32),
        # Not contiguous: the file must hold the rows all the same.
        "a.é": rng.standard_normal((4, 7), np.float32).T,
        "c": rng.standard_normal(1, np.float32),
    }
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {name: value.shape for name, value in arrays.items()}, lambda name: arrays[name])
    loaded = load_file(path)
    assert loaded.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(loaded[name].numpy(), value)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0


def test_writer_does_not_replace_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write_safetensors(path, {"a": (1,)}, lambda _name: np.ones(1, np.float32))
    assert path.read_bytes() == b"mine"


def accepted_by_the_library(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, "pt"):
            return True
    except safetensors.SafetensorError:
        return False


def accepted(path: Path) -> bool:
    try:
        SafetensorsFile(path)
    except CorruptCheckpointError:
        return False
    return True


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    data = save({"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.float16)})
    path = tmp_path / "x.safetensors"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert not accepted(path), length
    path.write_bytes(data)
    assert accepted(path)
    path.write_bytes(data + b"\0")
    assert not accepted(path)


def test_what_the_library_refuses_is_refused(tmp_path: Path) -> None:
    data = save({"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.float16), "c": torch.zeros(1)})
    rng = np.random.default_rng(0)
    path = tmp_path / "x.safetensors"
    refused = 0
    for _ in range(400):
        broken = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            # Bytes that JSON is made of, at places in the length and the header.
            broken[rng.integers(len(data) - 20)] = rng.choice(list(b'0123456789"{}[]:,-F BI\0\xff'))
        path.write_bytes(broken)
        if not accepted_by_the_library(path):
            refused += 1
            assert not accepted(path), bytes(broken)
    assert refused > 200


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[1]", "not a JSON object"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": 1}', "occurs twice"),
        ({"a": 1}, "broken header entry for 'a'"),
        ({"a": ENTRY | {"dtype": ["F32"]}}, "broken header entry"),
        ({"a": ENTRY | {"dtype": "F3"}}, "broken header entry"),
        ({"a": ENTRY | {"shape": [-2]}}, "broken header entry"),
        ({"a": ENTRY | {"shape": [2.0]}}, "broken header entry"),
        ({"a": ENTRY | {"shape": [True, 2]}}, "broken header entry"),
        ({"a": ENTRY | {"shape": [1] * 50 + [2]}}, "broken header entry"),
        ({"a": ENTRY | {"shape": [10**4000] * 2}}, "broken header entry"),
        ({"a": ENTRY | {"shape": [1 << 63]}}, "broken header entry"),
        ({"a": ENTRY | {"data_offsets": [0, 10**4000]}}, "broken header entry"),
        ({"\x1b" * 5000: ENTRY | {"dtype": "F" * 5000}}, "broken header entry"),
        ({"a": ENTRY | {"data_offsets": [0]}}, "broken header entry"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, "gives -8 bytes"),
        ({"a": ENTRY | {"shape": [1 << 40]}}, "gives 8 bytes to 'a', F32"),
        ({"a": ENTRY | {"data_offsets": [4, 12]}}, "overlap or leave a hole at byte 0"),
        ({"a": ENTRY, "b": ENTRY}, "overlap or leave a hole at byte 8"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [8, 16]}}, "8 bytes of data, its header describes 16"),
        ({}, "8 bytes of data, its header describes 0"),
    ],
)
def test_broken_headers(header: bytes | dict[str, object], message: str, tmp_path: Path) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        SafetensorsFile(path)
    said = str(caught.value).replace(str(path), "")
    assert said.isprintable()
    assert len(said) < 1000


def test_header_that_claims_more_than_the_file_has(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(CorruptCheckpointError, match="10 bytes and claims a header of 18446744073709551615"):
        SafetensorsFile(path)


def test_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", encoding="utf-8")
    with pytest.raises(CorruptCheckpointError, match="git lfs pull"):
        SafetensorsFile(path)


def test_file_that_shrinks_or_vanishes_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CorruptCheckpointError, match="ends within 'a'"):
        file.read("a")
    path.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        file.read("a")


@given(data=st.binary(max_size=200))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused_or_read(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    assert accepted(path) <= accepted_by_the_library(path)
