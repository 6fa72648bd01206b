"""Writing ``model.bertrt``; ``kernels/FORMAT.md`` describes the file."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Final

import numpy as np

from bertrt.errors import ExportError
from bertrt.manifest import Precision
from bertrt_export.native.layout import Dtype
from bertrt_export.native.model import (
    Model,
    Tensor,
    native_problem,
    native_tensors,
    padded_head_size,
)

MAGIC: Final = b"BERTRTW\0"
FORMAT_VERSION: Final = 1
_PRECISIONS: dict[Precision, int] = {"fp32": 0, "bf16": 1, "int8": 2}
_ACTIVATIONS = {"gelu": 0, "gelu_new": 1, "relu": 2}
_DTYPES: dict[Dtype, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "int32": 3}
_LAYOUTS = {"rows": 0, "panels": 1}
_HEADER = struct.Struct("<8sIIQII32x")
_ARCHITECTURE = struct.Struct("<II10If12x")
_RECORD = struct.Struct("<64sIIQQQQI20x")


def write_weight_file(model: Model, path: Path, precision: Precision) -> None:
    """Write a checkpoint's weights for the native kernels, holding one matrix in memory at a time.

    The bytes depend on the weights and the precision only.

    Raises:
        ExportError: the native kernels cannot run this architecture or precision, or a weight is out of reach
            of bfloat16.
        CheckpointError: a tensor is missing or not finite.
        OSError: the file exists or cannot be written.
    """
    if precision not in _PRECISIONS:
        raise ExportError(
            f"the native backend does not compute in {precision}; choose among {', '.join(_PRECISIONS)}"
        )
    problem = native_problem(model.architecture)
    if problem:
        raise ExportError(f"the native backend cannot run this model: {problem}; export for onnxruntime")
    tensors = tuple(native_tensors(model, precision))
    records = []
    with path.open("xb") as file:
        file.write(bytes(_HEADER.size + _ARCHITECTURE.size + len(tensors) * _RECORD.size))
        for tensor in tensors:
            # A multiple of 64, as are the sizes of the header and of every tensor.
            offset = file.tell()
            crc = 0
            for piece in tensor.pieces():
                data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
                crc = zlib.crc32(data, crc)
                file.write(data)
            records.append(_record(tensor, offset, file.tell() - offset, crc))
        header = _header(_describe(model, precision) + b"".join(records), len(tensors), file.tell())
        file.seek(0)
        file.write(header)


def _header(description: bytes, tensors: int, total: int) -> bytes:
    size = _HEADER.size + len(description)

    def build(crc: int) -> bytes:
        return _HEADER.pack(MAGIC, FORMAT_VERSION, size, total, tensors, crc) + description

    # The checksum is that of the header with zero in its place.
    return build(zlib.crc32(build(0)))


def _describe(model: Model, precision: Precision) -> bytes:
    sizes, heads = model.architecture, model.heads
    flags = heads.mlm * 1 + heads.nsp * 2 + heads.pooler * 4 + model.tied_decoder * 8
    return _ARCHITECTURE.pack(
        _PRECISIONS[precision],
        _ACTIVATIONS[sizes.hidden_act],
        sizes.hidden_size,
        sizes.num_hidden_layers,
        sizes.num_attention_heads,
        sizes.head_size,
        padded_head_size(sizes),
        sizes.intermediate_size,
        sizes.vocab_size,
        sizes.max_position_embeddings,
        sizes.type_vocab_size,
        flags,
        sizes.layer_norm_eps,
    )


def _record(tensor: Tensor, offset: int, written: int, crc: int) -> bytes:
    if written != tensor.nbytes:
        raise ExportError(
            f"{tensor.name!r} took {written} bytes, its shape {tensor.shape} implies {tensor.nbytes}"
        )
    return _RECORD.pack(
        tensor.name.encode("ascii"),
        _DTYPES[tensor.dtype],
        _LAYOUTS[tensor.layout],
        *tensor.shape,
        offset,
        written,
        crc,
    )
