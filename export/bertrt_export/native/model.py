"""The tensors of the weight file, made from a checkpoint's; the table in ``kernels/FORMAT.md`` lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from bertrt.architecture import BertArchitecture
from bertrt.errors import ExportError
from bertrt.manifest import Heads, Precision
from bertrt_export.native.layout import (
    BFLOAT16_LARGEST,
    PANEL,
    Array,
    Dtype,
    pack_panels,
    pack_rows,
    panels_bytes,
    round_up,
    rows_bytes,
    to_bfloat16,
)
from bertrt_export.quantize import quantize_per_channel

Float32 = npt.NDArray[np.float32]

_TYPES: dict[Precision, Dtype] = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
_HEAD_SIZE_STEP = 32
_LARGEST_HEAD_SIZE = 256
# An int32 holds this many products of an unsigned and a signed byte.
_LARGEST_INT8_INPUTS = 1 << 16
# Rows are converted in pieces of about this size, which stay in the processor's cache.
_PIECE_BYTES = 1 << 20


class Model(Protocol):
    """What a weight file is made from: a checkpoint."""

    @property
    def architecture(self) -> BertArchitecture:
        """Its dimensions."""
        ...

    @property
    def heads(self) -> Heads:
        """Its heads."""
        ...

    @property
    def tied_decoder(self) -> bool:
        """Whether the masked-LM decoder is the word embeddings."""
        ...

    def tensor(self, name: str) -> Float32:
        """The tensor of a canonical name."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One tensor of the weight file.

    Attributes:
        name: in the file.
        dtype: of its elements.
        layout: ``rows`` or ``panels``.
        shape: ``(rows, columns)``, of panels ``(outputs, inputs)``, before padding.
        pieces: makes its bytes, padding included, in pieces that follow one another. The scale and the sums of
            a matrix are known once its own pieces have been made.
    """

    name: str
    dtype: Dtype
    layout: Literal["rows", "panels"]
    shape: tuple[int, int]
    pieces: Callable[[], Iterator[Array]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, padding included."""
        return (rows_bytes if self.layout == "rows" else panels_bytes)(*self.shape, self.dtype)


def padded_head_size(architecture: BertArchitecture) -> int:
    """The width that a head has in the file."""
    return round_up(architecture.head_size, _HEAD_SIZE_STEP)


def native_problem(architecture: BertArchitecture) -> str | None:
    """Why the native kernels cannot run models of these dimensions, or ``None``."""
    if architecture.head_size > _LARGEST_HEAD_SIZE:
        return (
            f"its attention heads are {architecture.head_size} wide, the native kernels' at most "
            f"{_LARGEST_HEAD_SIZE}"
        )
    widest = max(architecture.hidden_size, architecture.intermediate_size)
    if widest > _LARGEST_INT8_INPUTS:
        return f"its layers are {widest} wide, the native kernels' at most {_LARGEST_INT8_INPUTS}"
    return None


def native_tensors(model: Model, precision: Precision) -> Iterator[Tensor]:
    """All tensors in the file's order. Weights are read when their pieces are made, one matrix at a time."""
    sizes, heads, dtype = model.architecture, model.heads, _TYPES[precision]
    hidden, padded = sizes.hidden_size, sizes.num_attention_heads * padded_head_size(sizes)
    small: Dtype = "float32" if precision == "fp32" else "bfloat16"

    def vector(name: str, source: str) -> Tensor:
        return _rows(name, (1, hidden), lambda: model.tensor(source))

    def norm(name: str, source: str) -> Iterator[Tensor]:
        yield vector(f"{name}.gamma", f"{source}.weight")
        yield vector(f"{name}.beta", f"{source}.bias")

    def dense(name: str, source: str, shape: tuple[int, int], dtype: Dtype = dtype) -> Iterator[Tensor]:
        yield from _matrix(name, dtype, shape, lambda: model.tensor(f"{source}.weight"))
        yield _rows(f"{name}.bias", (1, shape[0]), lambda: model.tensor(f"{source}.bias"))

    table = "embeddings.word_embeddings.weight"
    yield from _matrix("embeddings.words", dtype, (sizes.vocab_size, hidden), lambda: model.tensor(table))
    for name, source, rows in (
        ("positions", "position_embeddings", sizes.max_position_embeddings),
        ("segments", "token_type_embeddings", sizes.type_vocab_size),
    ):
        read = partial(model.tensor, f"embeddings.{source}.weight")
        yield _rows(f"embeddings.{name}", (rows, hidden), read)
    yield from norm("embeddings.norm", "embeddings.LayerNorm")
    for layer in range(sizes.num_hidden_layers):
        to, source = f"layer.{layer}", f"encoder.layer.{layer}"
        yield from _attention(model, to, source, dtype, padded)
        yield from norm(f"{to}.attention_norm", f"{source}.attention.output.LayerNorm")
        yield from dense(f"{to}.ffn_in", f"{source}.intermediate.dense", (sizes.intermediate_size, hidden))
        yield from dense(f"{to}.ffn_out", f"{source}.output.dense", (hidden, sizes.intermediate_size))
        yield from norm(f"{to}.ffn_norm", f"{source}.output.LayerNorm")
    if heads.mlm:
        head = "cls.predictions"
        yield from dense("mlm.dense", f"{head}.transform.dense", (hidden, hidden), small)
        yield from norm("mlm.norm", f"{head}.transform.LayerNorm")
        if not model.tied_decoder:
            shape = (sizes.vocab_size, hidden)
            yield from _matrix("mlm.decoder", dtype, shape, lambda: model.tensor(f"{head}.decoder.weight"))
        yield _rows("mlm.decoder.bias", (1, sizes.vocab_size), lambda: model.tensor(f"{head}.bias"))
    if heads.pooler:
        yield from dense("pooler.dense", "pooler.dense", (hidden, hidden), small)
    if heads.nsp:
        for part, rows, columns in (("weight", 2, hidden), ("bias", 1, 2)):
            read = partial(model.tensor, f"cls.seq_relationship.{part}")
            yield _rows(f"nsp.{part}", (rows, columns), read)


def _attention(model: Model, to: str, source: str, dtype: Dtype, padded: int) -> Iterator[Tensor]:
    sizes = model.architecture
    count, size, hidden = sizes.num_attention_heads, sizes.head_size, sizes.hidden_size
    width = padded_head_size(sizes)

    def fused(part: str) -> Float32:
        """The tensors of query, key and value, one after the other, each head padded with zeros."""
        parts = [
            model.tensor(f"{source}.attention.self.{which}.{part}") for which in ("query", "key", "value")
        ]
        result = np.zeros((3, count, width, *parts[0].shape[1:]), np.float32)
        for index, values in enumerate(parts):
            result[index, :, :size] = values.reshape(count, size, *values.shape[1:])
        return result.reshape(3 * padded, *parts[0].shape[1:])

    def projection() -> Float32:
        result = np.zeros((hidden, count, width), np.float32)
        weight = model.tensor(f"{source}.attention.output.dense.weight")
        result[:, :, :size] = weight.reshape(hidden, count, size)
        return result.reshape(hidden, padded)

    yield from _matrix(f"{to}.qkv", dtype, (3 * padded, hidden), lambda: fused("weight"))
    yield _rows(f"{to}.qkv.bias", (1, 3 * padded), lambda: fused("bias"))
    name = f"{to}.attention_out"
    yield from _matrix(name, dtype, (hidden, padded), projection)
    yield _rows(f"{name}.bias", (1, hidden), lambda: model.tensor(f"{source}.attention.output.dense.bias"))


def _rows(name: str, shape: tuple[int, int], make: Callable[[], Array], dtype: Dtype = "float32") -> Tensor:
    return Tensor(
        name=name, dtype=dtype, layout="rows", shape=shape, pieces=lambda: iter((pack_rows(make()),))
    )


def _matrix(name: str, dtype: Dtype, shape: tuple[int, int], make: Callable[[], Float32]) -> Iterator[Tensor]:
    scales: list[Float32] = []
    sums: list[npt.NDArray[np.int32]] = []

    def convert(rows: Float32) -> Array:
        if dtype == "float32":
            return rows
        if dtype == "bfloat16":
            return _checked_bfloat16(rows, name)
        # Zeros beside a row change nothing of it, and a row of zeros gets scale 1.
        quantized = quantize_per_channel(rows)
        scales.append(quantized.scale)
        sums.append(quantized.values.sum(axis=1, dtype=np.int32))
        return quantized.values

    def pieces() -> Iterator[Array]:
        weight = make()
        step = max(PANEL, _PIECE_BYTES // (4 * shape[1]) // PANEL * PANEL)
        for start in range(0, shape[0], step):
            yield pack_panels(convert(weight[start : start + step]))

    yield Tensor(name=name, dtype=dtype, layout="panels", shape=shape, pieces=pieces)
    if dtype == "int8":
        yield _rows(f"{name}.scale", (1, shape[0]), lambda: np.concatenate(scales))
        yield _rows(f"{name}.sums", (1, shape[0]), lambda: np.concatenate(sums), "int32")


def _checked_bfloat16(rows: Float32, name: str) -> npt.NDArray[np.uint16]:
    bits = to_bfloat16(rows)
    if ((bits & 0x7FFF) >= 0x7F80).any():
        raise ExportError(
            f"the weights of {name!r} reach {float(np.abs(rows).max()):.4g}, bfloat16 ends at "
            f"{BFLOAT16_LARGEST:.4g}; export with --precision fp32"
        )
    return bits
