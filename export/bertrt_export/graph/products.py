"""Matrix products with the model's weights, in each precision.

All of them take and give float32: the residual stream, LayerNorm and the biases around them stay in float32,
whatever the precision of the products.

- ``fp32``: as it stands.
- ``fp16``: operands and results of the products are float16. What enters is clamped to float16's range, and so is
  what leaves, so that a value near the limit saturates instead of becoming infinite and, a product later, NaN.
- ``int8``: weights are int8 with a scale for each output channel. Activations are quantised when they come, with a
  scale for each *token*: unlike ONNX's DynamicQuantizeLinear, which takes one scale from the whole tensor, that
  leaves the answer of one sequence untouched by its neighbours and its padding, and it is more accurate. What a
  GELU gives is never far below zero, so nearly all 256 steps go to what is above.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from bertrt.errors import ExportError
from bertrt.manifest import Dialect, Precision
from bertrt_export.graph.emitter import MICROSOFT, GraphEmitter
from bertrt_export.quantize import FLOAT16_LARGEST, QuantizedWeight, quantize_per_channel

_TABLE = "embeddings.word_embeddings"
_SMALLEST_SCALE = 1e-30
_STEPS_BELOW_ZERO = 16


class Weights(Protocol):
    """Where float32 tensors come from: a checkpoint."""

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor of a canonical name."""
        ...


class Products(ABC):
    """Products of float32 activations with named weights."""

    def __init__(self, emitter: GraphEmitter, weights: Weights) -> None:
        self.emitter = emitter
        self.weights = weights

    @abstractmethod
    def linear(self, x: str, name: str, *, quantize: bool = True, lowest: float | None = None) -> str:
        """``x @ W.T`` of ``{name}.weight``, without its bias.

        Args:
            x: float32 ``[..., in]``.
            name: of the layer.
            quantize: false asks int8 for float32.
            lowest: what no value of ``x`` is below, at most 0, where that is known.
        """

    @abstractmethod
    def decoder(self, x: str, name: str, *, tied: bool) -> str:
        """``x @ W.T`` with the vocabulary: the word embeddings themselves where they are ``tied``."""

    @abstractmethod
    def words(self, ids: str) -> str:
        """Rows of the word embeddings for int32 ids, as float32."""

    def vector(self, name: str) -> str:
        """A float32 initializer: biases, LayerNorm parameters, small tables."""
        return self.emitter.weight(name, lambda: self.weights.tensor(name))

    def bias(self, name: str) -> str:
        """The bias ``{name}.bias``."""
        return self.vector(f"{name}.bias")


class Float32Products(Products):
    """``fp32``: MatMul and Gemm on float32."""

    def linear(self, x: str, name: str, **quantization: bool | float | None) -> str:  # noqa: ARG002 - of int8
        """See `Products.linear`."""
        weight = self.emitter.weight(f"{name}.weight_t", lambda: self.weights.tensor(f"{name}.weight").T)
        return self.emitter.node("MatMul", [x, weight], name=name)

    def decoder(self, x: str, name: str, *, tied: bool) -> str:
        """See `Products.decoder`; Gemm reads the table as it lies, so a tied one is stored once."""
        return self.emitter.node("Gemm", [x, self._table(name, tied=tied)], name=name, transB=1)

    def words(self, ids: str) -> str:
        """See `Products.words`."""
        return self.emitter.node("Gather", [self._table("", tied=True), ids], name="embeddings/words", axis=0)

    def _table(self, name: str, *, tied: bool) -> str:
        source = f"{_TABLE if tied else name}.weight"
        return self.emitter.weight(source, lambda: self.weights.tensor(source))


class Float16Products(Products):
    """``fp16``: products on float16, saturating at its limits."""

    def __init__(self, emitter: GraphEmitter, weights: Weights) -> None:
        super().__init__(emitter, weights)
        # One activation feeds several products (query, key and value): it is converted once.
        self._converted: dict[str, str] = {}

    def linear(self, x: str, name: str, **quantization: bool | float | None) -> str:  # noqa: ARG002 - of int8
        """See `Products.linear`."""
        weight = self.emitter.weight(
            f"{name}.weight_t", lambda: to_float16(self.weights.tensor(f"{name}.weight"), name).T
        )
        product = self.emitter.node("MatMul", [self._enter(x), weight], name=name)
        return self._leave(product, name)

    def decoder(self, x: str, name: str, *, tied: bool) -> str:
        """See `Products.decoder`."""
        table = self._table(name, tied=tied)
        product = self.emitter.node("Gemm", [self._enter(x), table], name=name, transB=1)
        return self._leave(product, name)

    def words(self, ids: str) -> str:
        """See `Products.words`."""
        rows = self.emitter.node("Gather", [self._table("", tied=True), ids], name="embeddings/words", axis=0)
        return self.emitter.node("Cast", [rows], name="embeddings/words", to=TensorProto.FLOAT)

    def _enter(self, x: str) -> str:
        if x not in self._converted:
            name = f"{x}/to_float16"
            clamped = self.emitter.node("Clip", [x, *self._limits()], name=name)
            self._converted[x] = self.emitter.node("Cast", [clamped], name=name, to=TensorProto.FLOAT16)
        return self._converted[x]

    def _leave(self, x: str, name: str) -> str:
        wide = self.emitter.node("Cast", [x], name=name, to=TensorProto.FLOAT)
        return self.emitter.node("Clip", [wide, *self._limits()], name=name)

    def _limits(self) -> list[str]:
        return [self.emitter.scalar(-FLOAT16_LARGEST), self.emitter.scalar(FLOAT16_LARGEST)]

    def _table(self, name: str, *, tied: bool) -> str:
        source = f"{_TABLE if tied else name}.weight"
        return self.emitter.weight(source, lambda: to_float16(self.weights.tensor(source), source))


class _Quantized(NamedTuple):
    """Names of an activation's uint8 values, its float32 scale for each row, and its zero point."""

    values: str
    scale: str
    zero_point: str


class Int8Products(Products):
    """``int8``: int8 weights, activations quantised for each token."""

    def __init__(self, emitter: GraphEmitter, weights: Weights, dialect: Dialect) -> None:
        super().__init__(emitter, weights)
        self._dialect = dialect
        # One activation feeds several products (query, key and value): it is quantised once.
        self._quantized: dict[str, _Quantized] = {}

    def linear(self, x: str, name: str, *, quantize: bool = True, lowest: float | None = None) -> str:
        """See `Products.linear`."""
        if not quantize:
            return Float32Products(self.emitter, self.weights).linear(x, name)
        weight = _Once(lambda: quantize_per_channel(self.weights.tensor(f"{name}.weight")))
        values = self.emitter.weight(f"{name}.weight_q", lambda: weight().values.T)
        scale = self.emitter.weight(f"{name}.weight_scale", lambda: weight().scale)
        return self._product(self._quantize(x, lowest), values, scale, name)

    def decoder(self, x: str, name: str, *, tied: bool) -> str:
        """See `Products.decoder`; the table is stored once and turned when the engine is loaded."""
        values, scale = self._table(name, tied=tied)
        turned = self.emitter.node("Transpose", [values], name=name, perm=[1, 0])
        return self._product(self._quantize(x, None, may_be_empty=True), turned, scale, name)

    def words(self, ids: str) -> str:
        """See `Products.words`."""
        name = "embeddings/words"
        table, scales = self._table("", tied=True)
        values = self.emitter.node("Gather", [table, ids], name=name, axis=0)
        scale = self.emitter.node("Gather", [scales, ids], name=name, axis=0)
        column = self.emitter.node("Unsqueeze", [scale, self.emitter.integers(-1)], name=name)
        wide = self.emitter.node("Cast", [values], name=name, to=TensorProto.FLOAT)
        return self.emitter.node("Mul", [wide, column], name=name)

    def _table(self, name: str, *, tied: bool) -> tuple[str, str]:
        source = f"{_TABLE if tied else name}.weight"
        weight = _Once(lambda: quantize_per_channel(self.weights.tensor(source)))
        values = self.emitter.weight(f"{source}_q", lambda: weight().values)
        return values, self.emitter.weight(f"{source}_scale", lambda: weight().scale)

    def _quantize(self, x: str, lowest: float | None, *, may_be_empty: bool = False) -> _Quantized:
        if x not in self._quantized:
            emitter, name = self.emitter, f"{x}/quantize"
            if lowest is None:
                # Symmetric around the middle.
                zero, steps, floor = 128, 127, _SMALLEST_SCALE
                magnitude = emitter.node("Abs", [x], name=name)
            else:
                # Just enough steps below zero for the lowest value at the finest scale that is allowed.
                zero = 0 if lowest == 0 else _STEPS_BELOW_ZERO
                steps, floor = 255 - zero, max(_SMALLEST_SCALE, -lowest / _STEPS_BELOW_ZERO)
                magnitude = x
            if may_be_empty:
                largest = emitter.reduce_rows("ReduceMax", magnitude, name=name)
            else:
                largest = emitter.node("ReduceMax", [magnitude, emitter.integers(-1)], name=name, keepdims=1)
            scale = emitter.node("Mul", [largest, emitter.scalar(1 / steps)], name=name)
            # The floor also gives a row of zeros a scale that can divide.
            scale = emitter.node("Max", [scale, emitter.scalar(floor)], name=name)
            unit = emitter.node("Div", [x, scale], name=name)
            zero_point = emitter.constant(f"uint8_{zero}", np.array(zero, np.uint8))
            values = emitter.node("QuantizeLinear", [unit, emitter.scalar(1.0), zero_point], name=name)
            self._quantized[x] = _Quantized(values, scale, zero_point)
        return self._quantized[x]

    def _product(self, x: _Quantized, weight: str, weight_scale: str, name: str) -> str:
        if self._dialect == "ort":
            inputs = [x.values, weight, self.emitter.scalar(1.0), weight_scale, x.zero_point]
            product = self.emitter.node("MatMulIntegerToFloat", inputs, name=name, domain=MICROSOFT)
        else:
            whole = self.emitter.node("MatMulInteger", [x.values, weight, x.zero_point], name=name)
            wide = self.emitter.node("Cast", [whole], name=name, to=TensorProto.FLOAT)
            product = self.emitter.node("Mul", [wide, weight_scale], name=name)
        return self.emitter.node("Mul", [product, x.scale], name=name)


def make_products(
    precision: Precision, dialect: Dialect, emitter: GraphEmitter, weights: Weights
) -> Float32Products | Float16Products | Int8Products:
    """The products of a precision."""
    if precision == "fp32":
        return Float32Products(emitter, weights)
    if precision == "fp16":
        return Float16Products(emitter, weights)
    return Int8Products(emitter, weights, dialect)


class _Once:
    """Quantises when first asked and remembers, so that values and scales come from one pass."""

    def __init__(self, make: Callable[[], QuantizedWeight]) -> None:
        self._make = make
        self._result: QuantizedWeight | None = None

    def __call__(self) -> QuantizedWeight:
        if self._result is None:
            self._result = self._make()
        return self._result


def to_float16(values: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.float16]:
    """Round a weight to float16.

    Raises:
        ExportError: it reaches beyond float16's range.
    """
    check_float16(values, name, "fp32 or int8")
    return values.astype(np.float16)


def check_float16(values: npt.NDArray[np.float32], name: str, others: str) -> None:
    """See to it that a weight lies within float16; ``others`` are precisions that do without.

    Raises:
        ExportError: it reaches beyond.
    """
    largest = float(np.abs(values).max())
    if largest > FLOAT16_LARGEST:
        raise ExportError(
            f"the weights of {name!r} reach {largest:.4g}, float16 ends at {FLOAT16_LARGEST:.0f}; "
            f"export with --precision {others}"
        )
