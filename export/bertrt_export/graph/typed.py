"""Graphs in which every value has its type written down, for runtimes that choose no precision themselves.

TensorRT has strongly typed networks only: what a product computes in is what its operands are. So casts, and the
QuantizeLinear / DequantizeLinear pairs of int8 and fp8, stand in the graph.

- The products of the encoder and attention are in the working type: float16, bfloat16 or float32; int8 and fp8
  products have quantised operands and give float16. The query is divided by the square root of the head size in its
  weights, before it is rounded.
- The residual stream, biases, LayerNorm, activations, the masked-LM head's transform, the pooler and the
  next-sentence head are in float32.
- The table of words and the decoder are float16, in bfloat16 engines too: logits of 8 bits would be worth little, and
  what meets in the decoder is small.
- What enters or leaves float16 is clamped to its range. The mask is half of the working type's lowest number: it
  neither overflows when it is added to a score, nor makes a row of nothing but padding NaN.
- int8 and fp8: weights have a scale for each output channel. An activation has one scale, found by calibration
  (`bertrt_export.calibration`), after each channel has been moved to the middle of its range and divided by a factor
  that evens out the channels: SmoothQuant (Xiao et al. 2023, https://arxiv.org/abs/2211.10438) and the channel shifts
  of Outlier Suppression+ (Wei et al. 2023, https://arxiv.org/abs/2304.09145). Both are taken back in the weights and
  the bias. Scales are float16 numbers, so that a DequantizeLinear has the scale's type: for others ONNX Runtime has no
  kernels on GPUs, and before 1.31 none at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from bertrt.architecture import BertArchitecture
from bertrt.errors import CalibrationError, ExportError
from bertrt.manifest import Precision
from bertrt_export.graph.dialects import MASKED, OnnxOperators
from bertrt_export.graph.emitter import GraphEmitter
from bertrt_export.graph.products import Products, Weights, check_float16, to_float16
from bertrt_export.quantize import (
    FLOAT16_LARGEST,
    WEIGHT_TYPES,
    QuantizedWeight,
    WeightType,
    quantize_per_channel,
)

Float32 = npt.NDArray[np.float32]
# The type of products and attention, in ONNX's words.
_WORKING_TYPE: Final[Mapping[Precision, int]] = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "int8": TensorProto.FLOAT16,
    "fp8": TensorProto.FLOAT16,
}
_NUMPY_TYPE: Final[Mapping[int, np.dtype[Any]]] = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
_QUANTIZED: Final[Mapping[Precision, WeightType]] = {"int8": "int8", "fp8": "fp8"}
_TABLE = "embeddings.word_embeddings"


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationScale:
    """How the input of a product is quantised: ``(x - shift) / smoothing`` is a multiple of ``scale``.

    Attributes:
        scale: of the whole tensor, positive, a float16 number (see `bertrt_export.quantize.float16_scales`).
        shift: ``[channels] float32``, or ``None`` for zero. A multiple of ``scale * smoothing``, so that zero, around
            which activations lie most densely, stays exact.
        smoothing: ``[channels] float32``, positive, or ``None`` for one.

    Raises:
        CalibrationError: the scale is not such a number.
    """

    scale: float
    shift: Float32 | None = None
    smoothing: Float32 | None = None

    def __post_init__(self) -> None:
        # Rounded in the graph only, it would not be what the shift is a multiple of.
        if not (0 < self.scale <= FLOAT16_LARGEST and float(np.float16(self.scale)) == self.scale):
            raise CalibrationError(
                f"a scale must be a positive float16 number, got {self.scale!r}; round it with "
                "bertrt_export.quantize.float16_scales"
            )


class FusedQueries:
    """A checkpoint whose query, key and value are one layer, ``{attention}.qkv``, the query already scaled."""

    def __init__(self, weights: Weights, architecture: BertArchitecture) -> None:
        self._weights = weights
        self._scale = np.float32(architecture.head_size**-0.5)

    def tensor(self, name: str) -> Float32:
        """The tensor of a canonical name, or of a fused layer."""
        before, fused, part = name.rpartition(".qkv.")
        if not fused:
            return self._weights.tensor(name)
        query, key, value = (
            self._weights.tensor(f"{before}.{which}.{part}") for which in ("query", "key", "value")
        )
        return np.concatenate([query * self._scale, key, value])


class TypedProducts(Products):
    """Products in the working type of ``fp32``, ``fp16`` or ``bf16``; the base of the quantised ones.

    Attributes:
        working_type: of the products, in ONNX's words.
        quantizes: whether their operands are quantised.
        inputs: for each product that a quantised engine quantises, the value that enters it.
    """

    def __init__(self, emitter: GraphEmitter, weights: Weights, precision: Precision) -> None:
        super().__init__(emitter, weights)
        self.working_type = _WORKING_TYPE[precision]
        self.quantizes = precision in _QUANTIZED
        self.inputs: dict[str, str] = {}
        # Values that are in the working type already, and the others' copies in it.
        self._narrow: set[str] = set()
        self._converted: dict[str, str] = {}

    def linear(self, x: str, name: str, *, quantize: bool = True, lowest: float | None = None) -> str:  # noqa: ARG002 - of int8 on CPUs
        """See `Products.linear`; ``quantize`` also says whether the product is in the working type."""
        if not quantize:
            return self._float32(x, name)
        self.inputs[name] = x
        return self._narrow_product(x, name)

    def decoder(self, x: str, name: str, *, tied: bool) -> str:
        """See `Products.decoder`."""
        table = self._table(name, tied=tied)
        if self.working_type == TensorProto.FLOAT:
            return self.emitter.node("Gemm", [x, table], name=name, transB=1)
        narrow = self._cast(x, TensorProto.FLOAT16, name)
        return self._widen(
            self.emitter.node("Gemm", [narrow, table], name=name, transB=1), TensorProto.FLOAT16, name
        )

    def words(self, ids: str) -> str:
        """See `Products.words`."""
        name = "embeddings/words"
        rows = self.emitter.node("Gather", [self._table("", tied=True), ids], name=name, axis=0)
        if self.working_type == TensorProto.FLOAT:
            return rows
        return self.emitter.node("Cast", [rows], name=name, to=TensorProto.FLOAT)

    def narrow(self, x: str, name: str) -> str:
        """A float32 value in the working type, clamped to its range."""
        if self.working_type == TensorProto.FLOAT or x in self._narrow:
            return x
        if x not in self._converted:
            self._converted[x] = self._cast(x, self.working_type, name)
        return self._converted[x]

    def is_narrow(self, x: str) -> str:
        """Remember that a value is in the working type, and return it."""
        self._narrow.add(x)
        return x

    def _float32(self, x: str, name: str) -> str:
        weight = self.emitter.weight(f"{name}.weight_t", lambda: self.weights.tensor(f"{name}.weight").T)
        return self.emitter.node("MatMul", [x, weight], name=name)

    def _narrow_product(self, x: str, name: str) -> str:
        if self.working_type == TensorProto.FLOAT:
            return self._float32(x, name)
        weight = self.emitter.weight(f"{name}.weight_t", lambda: self._to_working_type(name).T)
        product = self.emitter.node("MatMul", [self.narrow(x, f"{x}/narrow"), weight], name=name)
        return self._widen(product, self.working_type, name)

    def _to_working_type(self, name: str) -> npt.NDArray[Any]:
        values = self.weights.tensor(f"{name}.weight")
        if self.working_type == TensorProto.FLOAT16:
            return to_float16(values, name)
        return values.astype(_NUMPY_TYPE[self.working_type])

    def _cast(self, x: str, to: int, name: str) -> str:
        if to == TensorProto.FLOAT16:
            x = self.emitter.node("Clip", [x, *self._limits()], name=name)
        return self.emitter.node("Cast", [x], name=name, to=to)

    def _widen(self, x: str, from_type: int, name: str) -> str:
        wide = self.emitter.node("Cast", [x], name=name, to=TensorProto.FLOAT)
        if from_type == TensorProto.FLOAT16:
            # A sum beyond the range has become infinite.
            wide = self.emitter.node("Clip", [wide, *self._limits()], name=name)
        return wide

    def _limits(self) -> list[str]:
        return [self.emitter.scalar(-FLOAT16_LARGEST), self.emitter.scalar(FLOAT16_LARGEST)]

    def _table(self, name: str, *, tied: bool) -> str:
        source = f"{_TABLE if tied else name}.weight"
        if self.working_type == TensorProto.FLOAT:
            return self.emitter.weight(source, lambda: self.weights.tensor(source))
        return self.emitter.weight(source, lambda: to_float16(self.weights.tensor(source), source))


class QuantizedProducts(TypedProducts):
    """``int8`` and ``fp8``: quantised operands, calibrated scales for the activations.

    Args:
        emitter: of the graph.
        weights: of the model.
        precision: ``int8`` or ``fp8``.
        scales: of the activations, by the product that they enter.

    Raises:
        ExportError: a product has no scale.
    """

    def __init__(
        self,
        emitter: GraphEmitter,
        weights: Weights,
        precision: Precision,
        scales: Mapping[str, ActivationScale],
    ) -> None:
        super().__init__(emitter, weights, precision)
        self._type = _QUANTIZED[precision]
        self._scales = scales

    def bias(self, name: str) -> str:
        """See `Products.bias`: with what the shift of the layer's input has taken from the product."""
        scale = self._scales.get(name)
        if scale is None or scale.shift is None:
            return super().bias(name)
        # With the weight as it is after rounding, so that a shift does not multiply the rounding's error.
        shift = scale.shift if scale.smoothing is None else scale.shift / scale.smoothing

        def shifted() -> Float32:
            weight = self._quantize_weight(name)
            taken = (weight.values.astype(np.float64) @ shift) * weight.scale
            return self.weights.tensor(f"{name}.bias") + taken.astype(np.float32)

        return self.emitter.weight(f"{name}.bias_shifted", shifted)

    def _narrow_product(self, x: str, name: str) -> str:
        emitter = self.emitter
        if name not in self._scales:
            raise ExportError(f"calibration gave no scale for the input of {name!r}; calibrate again")
        activation = self._quantized_activation(x, name, self._scales[name])
        # Both tensors come from one pass.
        quantized: list[QuantizedWeight] = []

        def once() -> QuantizedWeight:
            quantized[:] = quantized or [self._quantize_weight(name)]
            return quantized[0]

        # The weight file of a folder holds one precision only, so its names need not tell.
        values = emitter.weight(f"{name}.weight_q", lambda: once().values.T)
        scale = emitter.weight(f"{name}.weight_scale", lambda: once().scale.astype(np.float16))
        # A zero point would need the scale's shape; left out it is zero.
        weight = emitter.node("DequantizeLinear", [values, scale], name=f"{name}.weight", axis=1)
        product = emitter.node("MatMul", [activation, weight], name=name)
        return self._widen(product, self.working_type, name)

    def _quantized_activation(self, x: str, name: str, how: ActivationScale) -> str:
        emitter, where = self.emitter, f"{name}.input"
        if x in self._narrow:
            x = emitter.node("Cast", [x], name=where, to=TensorProto.FLOAT)
        if how.shift is not None:
            shift = how.shift
            x = emitter.node("Sub", [x, emitter.weight(f"{where}.shift", lambda: shift)], name=where)
        if how.smoothing is not None:
            factor = np.float32(1) / how.smoothing
            x = emitter.node("Mul", [x, emitter.weight(f"{where}.factor", lambda: factor)], name=where)
        # One number in two types, each that of what is divided or given back.
        wide = emitter.scalar(how.scale)
        narrow = emitter.constant(f"float16_{how.scale!r}", np.array(how.scale, np.float16))
        quantized = emitter.node("QuantizeLinear", [x, wide, self._zero()], name=where)
        return emitter.node("DequantizeLinear", [quantized, narrow, self._zero()], name=where)

    def _zero(self) -> str:
        return self.emitter.constant(f"{self._type}_0", np.zeros((), WEIGHT_TYPES[self._type].dtype))

    def _quantize_weight(self, name: str) -> QuantizedWeight:
        weight, smoothing = self.weights.tensor(f"{name}.weight"), self._scales[name].smoothing
        if smoothing is not None:
            weight = weight * smoothing
        # Seen only once they are taken back, they would be cut off.
        check_float16(weight, name, "fp32")
        return quantize_per_channel(weight, self._type, float16=True)


class TypedOperators(OnnxOperators):
    """Standard operators, with attention in the working type."""

    _products: TypedProducts

    def mask(self, attention_mask: str) -> str:
        """See `OnnxOperators.mask`; in the working type."""
        working_type = self._products.working_type
        lowest = -FLOAT16_LARGEST / 2 if working_type == TensorProto.FLOAT16 else MASKED
        values = np.array([0.0, lowest], np.float32).astype(_NUMPY_TYPE[working_type])
        kept, masked = (
            self._emitter.constant(f"mask_{name}", values[index])
            for index, name in enumerate(("kept", "masked"))
        )
        return self._expanded_mask(attention_mask, kept, masked)

    def attention(self, hidden: str, mask: str, name: str) -> str:
        """See `Operators.attention`: one product for query, key and value; the query comes scaled."""
        emitter, products, sizes = self._emitter, self._products, self._architecture
        fused = f"{name}.qkv"
        summed = emitter.node("Add", [products.linear(hidden, fused), products.bias(fused)], name=fused)
        narrow = products.narrow(summed, fused)
        widths = emitter.integers(*[sizes.hidden_size] * 3)
        query = emitter.node("Split", [narrow, widths], name=fused, outputs=3, output=f"{fused}:0", axis=-1)
        context = emitter.node(
            "Attention",
            [query, f"{fused}/Split:1", f"{fused}/Split:2", mask],
            name=name,
            q_num_heads=sizes.num_attention_heads,
            kv_num_heads=sizes.num_attention_heads,
            scale=1.0,
        )
        return products.is_narrow(context)


def make_typed_products(
    precision: Precision,
    emitter: GraphEmitter,
    weights: Weights,
    scales: Mapping[str, ActivationScale] | None,
) -> TypedProducts:
    """The products of a precision; int8 and fp8 need scales."""
    if precision in _QUANTIZED:
        return QuantizedProducts(emitter, weights, precision, scales or {})
    return TypedProducts(emitter, weights, precision)
