"""``model.bertrt``, read by a parser of this file's own, against the checkpoint's tensors."""

from __future__ import annotations

import math
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bertrt.errors import ExportError
from bertrt_export.checkpoints import Checkpoint, open_checkpoint
from bertrt_export.native import native_problem, write_weight_file
from bertrt_export.quantize import quantize_per_channel

PRECISIONS = ("fp32", "bf16", "int8")
TYPES = ("<f4", "<u2", "i1", "<i4")
Write = Callable[..., Path]


class File:
    """A weight file, whose structure is checked as it is read."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        magic, version, header, total, count, crc = struct.unpack_from("<8sIIQII", data)
        assert (magic, version, total) == (b"BERTRTW\0", 1, len(data))
        assert header == 128 + 128 * count
        assert zlib.crc32(data[:28] + bytes(4) + data[32:header]) == crc
        assert not any(data[32:64])
        assert not any(data[116:128])
        self.precision, self.activation, *self.sizes = struct.unpack_from("<12I", data, 64)
        (self.epsilon,) = struct.unpack_from("<f", data, 112)
        self.names: list[str] = []
        self.tensors: dict[str, np.ndarray[Any, Any]] = {}
        end = header
        for index in range(count):
            at = 128 + 128 * index
            raw, kind, layout, rows, columns, offset, size, crc = struct.unpack_from("<64sIIQQQQI", data, at)
            name = raw.rstrip(b"\0").decode("ascii")
            assert not any(data[at + 108 : at + 128])
            assert offset == end
            assert offset % 64 == size % 64 == 0
            assert zlib.crc32(data[offset : offset + size]) == crc
            values = np.frombuffer(data[offset : offset + size], TYPES[kind])
            self.names.append(name)
            self.tensors[name] = (unpanelled if layout else unpadded)(values, rows, columns)
            end = offset + size
        assert end == len(data)

    def matrix(self, name: str) -> np.ndarray[Any, Any]:
        """The matrix as float32, whatever its type."""
        values = self.tensors[name]
        if values.dtype == np.int8:
            np.testing.assert_array_equal(self.tensors[f"{name}.sums"][0], values.sum(axis=1, dtype=np.int64))
            assert values.min() >= -127
            return values * self.tensors[f"{name}.scale"][0][:, None]
        return bfloat16(values) if values.dtype == np.uint16 else values


def unpadded(values: np.ndarray[Any, Any], rows: int, columns: int) -> np.ndarray[Any, Any]:
    values = values.reshape(rows, math.ceil(columns / 64) * 64)
    assert not values[:, columns:].any()
    return values[:, :columns]


def unpanelled(values: np.ndarray[Any, Any], outputs: int, inputs: int) -> np.ndarray[Any, Any]:
    g = 4 // values.itemsize
    values = values.reshape(math.ceil(outputs / 32), math.ceil(inputs / (16 * g)), 2, 16, 16, g)
    n, k = np.indices((values.shape[0] * 32, values.shape[1] * 16 * g))
    found = values[n // 32, k // (16 * g), n % 32 // 16, k % (16 * g) // g, n % 16, k % g]
    assert not found[outputs:].any()
    assert not found[:, inputs:].any()
    return found[:outputs, :inputs]


def bfloat16(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(weight: np.ndarray[Any, Any], precision: str) -> np.ndarray[Any, Any]:
    """The weight as a precision keeps it."""
    if precision == "int8":
        values, scale = quantize_per_channel(weight)
        return values * scale[:, None]
    if precision == "bf16":
        return torch.from_numpy(weight).bfloat16().float().numpy()
    return weight


@pytest.fixture
def write(tmp_path: Path, save_checkpoint: Any) -> Write:
    """A function that saves a model, writes its weight file and gives its path; same name, same place."""

    def write(model: Any, precision: str, name: str = "model") -> Path:
        path = tmp_path / f"{name}-{precision}.bertrt"
        with open_checkpoint(save_checkpoint(model)) as checkpoint:
            write_weight_file(checkpoint, path, precision)
        return path

    return write


# Head size, and the model's: 8 in 32, 32 as it is, 48 in 64, 64 as it is.
HEADS = {8: (24, 3), 32: (64, 2), 48: (96, 2), 64: (128, 2)}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", HEADS)
def test_every_tensor_is_the_checkpoints(size: int, precision: str, small_bert: Any, write: Write) -> None:
    hidden, heads = HEADS[size]
    model = small_bert(hidden_size=hidden, num_attention_heads=heads)
    file = File(write(model, precision))
    width = math.ceil(size / 32) * 32
    assert file.precision == PRECISIONS.index(precision)
    assert file.sizes == [hidden, 3, heads, size, width, 40, 97, 50, 2, 1 | 2 | 4 | 8]
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    small = "fp32" if precision == "fp32" else "bf16"
    unread = set(file.names)

    def check_matrix(name: str, weight: np.ndarray[Any, Any], precision: str = precision) -> None:
        np.testing.assert_array_equal(file.matrix(name), rounded(weight, precision))
        unread.difference_update({name, *([f"{name}.scale", f"{name}.sums"] if precision == "int8" else [])})

    def check_rows(name: str, values: np.ndarray[Any, Any]) -> None:
        np.testing.assert_array_equal(file.tensors[name], np.atleast_2d(values))
        unread.remove(name)

    def check_norm(name: str, source: str) -> None:
        check_rows(f"{name}.gamma", state[f"{source}.weight"])
        check_rows(f"{name}.beta", state[f"{source}.bias"])

    def check_dense(name: str, source: str, precision: str = precision) -> None:
        check_matrix(name, state[f"{source}.weight"], precision)
        check_rows(f"{name}.bias", state[f"{source}.bias"])

    embeddings = "bert.embeddings"
    check_matrix("embeddings.words", state[f"{embeddings}.word_embeddings.weight"])
    check_rows("embeddings.positions", state[f"{embeddings}.position_embeddings.weight"])
    check_rows("embeddings.segments", state[f"{embeddings}.token_type_embeddings.weight"])
    check_norm("embeddings.norm", f"{embeddings}.LayerNorm")
    for index in range(3):
        layer, source = f"layer.{index}", f"bert.encoder.layer.{index}"
        weights, biases = [], []
        for part in ("query", "key", "value"):
            for head in range(heads):
                rows = slice(head * size, head * size + size)
                weight = state[f"{source}.attention.self.{part}.weight"][rows]
                bias = state[f"{source}.attention.self.{part}.bias"][rows]
                weights.append(np.concatenate([weight, np.zeros((width - size, hidden), np.float32)]))
                biases.append(np.concatenate([bias, np.zeros(width - size, np.float32)]))
        check_matrix(f"{layer}.qkv", np.concatenate(weights))
        check_rows(f"{layer}.qkv.bias", np.concatenate(biases))
        # Rounding the weight before it is padded is what the kernels rely on.
        output = rounded(state[f"{source}.attention.output.dense.weight"], precision)
        found = file.matrix(f"{layer}.attention_out")
        assert found.shape == (hidden, heads * width)
        for head in range(heads):
            columns = found[:, head * width : head * width + width]
            np.testing.assert_array_equal(columns[:, :size], output[:, head * size : head * size + size])
            assert not columns[:, size:].any()
        unread -= {f"{layer}.attention_out{end}" for end in ("", ".scale", ".sums")}
        check_rows(f"{layer}.attention_out.bias", state[f"{source}.attention.output.dense.bias"])
        check_norm(f"{layer}.attention_norm", f"{source}.attention.output.LayerNorm")
        check_dense(f"{layer}.ffn_in", f"{source}.intermediate.dense")
        check_dense(f"{layer}.ffn_out", f"{source}.output.dense")
        check_norm(f"{layer}.ffn_norm", f"{source}.output.LayerNorm")
    check_dense("mlm.dense", "cls.predictions.transform.dense", small)
    check_norm("mlm.norm", "cls.predictions.transform.LayerNorm")
    check_rows("mlm.decoder.bias", state["cls.predictions.bias"])
    check_dense("pooler.dense", "bert.pooler.dense", small)
    check_rows("nsp.weight", state["cls.seq_relationship.weight"])
    check_rows("nsp.bias", state["cls.seq_relationship.bias"])
    assert unread == set()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_untied_decoder_has_a_matrix_of_its_own(precision: str, small_bert: Any, write: Write) -> None:
    model = small_bert(tie_word_embeddings=False)
    file = File(write(model, precision))
    assert file.sizes[-1] == 1 | 2 | 4
    decoder = model.cls.predictions.decoder.weight.detach().numpy()
    np.testing.assert_array_equal(file.matrix("mlm.decoder"), rounded(decoder, precision))
    assert not np.array_equal(file.matrix("mlm.decoder"), file.matrix("embeddings.words"))


@pytest.mark.parametrize(
    ("kind", "flags", "without"),
    [
        (transformers.BertModel, 4, ("mlm", "nsp")),
        (transformers.BertForMaskedLM, 1 | 8, ("pooler", "nsp")),
        (transformers.BertForNextSentencePrediction, 2 | 4, ("mlm",)),
    ],
)
def test_heads_that_are_missing(
    kind: Any, flags: int, without: tuple[str, ...], small_bert: Any, write: Write
) -> None:
    names = File(write(small_bert(), "int8", "whole")).names
    file = File(write(kind(small_bert().config), "int8"))
    assert file.sizes[-1] == flags
    # The same order with and without.
    assert file.names == [name for name in names if not name.startswith(without)]


@pytest.mark.parametrize(("activation", "code"), [("gelu", 0), ("gelu_new", 1), ("relu", 2)])
def test_activation_and_epsilon(activation: str, code: int, small_bert: Any, write: Write) -> None:
    file = File(write(small_bert(hidden_act=activation, layer_norm_eps=1e-5), "fp32"))
    assert file.activation == code
    assert file.epsilon == np.float32(1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_weights_give_the_same_bytes(precision: str, small_bert: Any, write: Write) -> None:
    first, second = (write(small_bert(seed=3), precision, name) for name in ("first", "second"))
    other = write(small_bert(seed=4), precision, "other")
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()


def test_a_matrix_of_many_pieces(small_bert: Any, write: Write) -> None:
    # The table of words is converted in pieces of a megabyte; the second one ends within a panel.
    model = small_bert(vocab_size=(1 << 20) // (4 * 24) + 83)
    found = File(write(model, "int8")).matrix("embeddings.words")
    table = model.bert.embeddings.word_embeddings.weight.detach().numpy()
    np.testing.assert_array_equal(found, rounded(table, "int8"))


def test_memory_stays_near_the_largest_tensor(tmp_path: Path) -> None:
    with open_checkpoint("bert-base-cased", random=True) as checkpoint:
        tracemalloc.start()
        try:
            write_weight_file(checkpoint, tmp_path / "model.bertrt", "int8")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    # The table of words in float32, and what checking its values takes; the model has five times as much.
    assert peak < 1.5 * 28996 * 768 * 4


def test_weights_out_of_reach_of_bfloat16(small_bert: Any, write: Write, tmp_path: Path) -> None:
    model = small_bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[2, 3] = -3.4e38
    write(model, "fp32")
    with pytest.raises(ExportError, match=r"'layer\.1\.ffn_out' reach 3\.4e\+38.*ends at 3\.39e\+38.*fp32"):
        write(model, "bf16")


def test_a_precision_that_the_kernels_do_not_have(small_bert: Any, write: Write, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not compute in fp16; choose among fp32, bf16, int8"):
        write(small_bert(), "fp16")
    assert list(tmp_path.iterdir()) == []


def test_head_sizes_that_the_kernels_do_not_have(
    small_bert: Any, save_checkpoint: Any, tmp_path: Path
) -> None:
    def checkpoint(hidden: int) -> Checkpoint:
        return open_checkpoint(
            save_checkpoint(small_bert(hidden_size=hidden, num_attention_heads=1, num_hidden_layers=1))
        )

    with checkpoint(256) as fits:
        assert native_problem(fits.architecture) is None
        write_weight_file(fits, tmp_path / "fits", "fp32")
    with checkpoint(257) as wide:
        problem = native_problem(wide.architecture)
        assert problem == "its attention heads are 257 wide, the native kernels' at most 256"
        with pytest.raises(ExportError, match=f"{problem}; export for onnxruntime"):
            write_weight_file(wide, tmp_path / "wide", "fp32")
    assert not (tmp_path / "wide").exists()
