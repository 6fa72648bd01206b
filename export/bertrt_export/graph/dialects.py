"""Each fused step of BERT in the operators of a dialect.

``ort`` uses ONNX Runtime's fused operators (domain ``com.microsoft``); ``onnx`` uses standard operators only, with
the ``Attention`` operator of opset 23, which other runtimes and TensorRT's parser know.

Both add the attention mask as a finite number, half of float32's range: added to any score it neither overflows nor
leaves a masked score in reach of the exponential, and a row whose keys are all masked gives a uniform softmax
instead of NaN.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from onnx import TensorProto

from bertrt.architecture import Activation, BertArchitecture
from bertrt.manifest import Dialect
from bertrt_export.graph.emitter import MICROSOFT, GraphEmitter
from bertrt_export.graph.products import Products

MASKED = float(np.finfo(np.float32).min / 2)
# Below what no activation goes: the minimum of the exact GELU is -0.16997, of its tanh approximation -0.17004.
LOWEST: dict[Activation, float] = {"gelu": -0.1701, "gelu_new": -0.1701, "relu": 0.0}
PROJECTIONS = ("query", "key", "value")
Shape = list[int | str]


class Operators(Protocol):
    """The fused steps. Activations are float32 ``[batch, sequence, ...]``."""

    opset: int

    def mask(self, attention_mask: str) -> str:
        """What `attention` takes, from an int32 ``[batch, sequence]`` mask of ones and zeros."""
        ...

    def attention(self, hidden: str, mask: str, name: str) -> str:
        """Multi-head attention of the hidden state with itself, its projections (``{name}.query`` ...) included."""
        ...

    def add_layer_norm(self, x: str, skip: str, norm: str, *, bias: str | None, output: str | None) -> str:
        """LayerNorm of ``x + {bias}.bias + skip`` with the parameters of ``norm``."""
        ...

    def bias_activation(self, x: str, name: str, shape: Shape) -> str:
        """The model's activation of ``x`` plus ``{name}.bias``."""
        ...

    def fused(self, *, mlm: bool, word_table: bool) -> dict[str, int]:
        """How many of each fused operator a graph must have; ``word_table``: the embeddings are one node."""
        ...


class _Common:
    """What the dialects say in the same words."""

    def __init__(self, emitter: GraphEmitter, products: Products, architecture: BertArchitecture) -> None:
        self._emitter = emitter
        self._products = products
        self._architecture = architecture

    def add_layer_norm(self, x: str, skip: str, norm: str, *, bias: str | None, output: str | None) -> str:
        """See `Operators.add_layer_norm`.

        Not ``com.microsoft.SkipLayerNormalization``, which on a CPU takes several times as long as its parts.
        """
        emitter, vector = self._emitter, self._products.vector
        if bias:
            x = emitter.node("Add", [x, self._products.bias(bias)], name=norm)
        return emitter.node(
            "LayerNormalization",
            [
                emitter.node("Add", [x, skip], name=norm),
                vector(f"{norm}.weight"),
                vector(f"{norm}.bias"),
            ],
            name=norm,
            output=output,
            epsilon=self._architecture.layer_norm_eps,
        )


class OrtOperators(_Common):
    """The ``ort`` dialect."""

    opset = 21

    def mask(self, attention_mask: str) -> str:
        """See `Operators.mask`: the operator takes it as it is."""
        return attention_mask

    def attention(self, hidden: str, mask: str, name: str) -> str:
        """See `Operators.attention`: MultiHeadAttention adds the biases itself."""
        projections = [self._products.linear(hidden, f"{name}.{part}") for part in PROJECTIONS]
        weights = self._products.weights
        bias = self._emitter.weight(
            f"{name}.qkv.bias",
            lambda: np.concatenate([weights.tensor(f"{name}.{part}.bias") for part in PROJECTIONS]),
        )
        return self._emitter.node(
            "MultiHeadAttention",
            [*projections, bias, mask],
            name=name,
            domain=MICROSOFT,
            shape=["batch", "sequence", self._architecture.hidden_size],
            num_heads=self._architecture.num_attention_heads,
            mask_filter_value=MASKED,
        )

    def bias_activation(self, x: str, name: str, shape: Shape) -> str:
        """See `Operators.bias_activation`: BiasGelu (erf) or FastGelu (tanh)."""
        bias = self._products.bias(name)
        activation = self._architecture.hidden_act
        if activation == "relu":
            return self._emitter.node("Relu", [self._emitter.node("Add", [x, bias], name=name)], name=name)
        operator = "BiasGelu" if activation == "gelu" else "FastGelu"
        return self._emitter.node(operator, [x, bias], name=name, domain=MICROSOFT, shape=shape)

    def fused(self, *, mlm: bool, word_table: bool) -> dict[str, int]:
        """See `Operators.fused`."""
        layers = self._architecture.num_hidden_layers
        counts = {
            "MultiHeadAttention": layers,
            "LayerNormalization": 2 * layers + (0 if word_table else 1) + (1 if mlm else 0),
            "EmbedLayerNormalization": 1 if word_table else 0,
        }
        activations = layers + (1 if mlm else 0)
        match self._architecture.hidden_act:
            case "gelu":
                counts["BiasGelu"] = activations
            case "gelu_new":
                counts["FastGelu"] = activations
            case "relu":
                counts["Relu"] = activations
        return counts


class OnnxOperators(_Common):
    """The ``onnx`` dialect."""

    opset = 23

    def mask(self, attention_mask: str) -> str:
        """See `Operators.mask`: ``[batch, 1, sequence, sequence] float32``, 0 or `MASKED`.

        The operator would broadcast the queries' axis; ONNX Runtime's kernel wants it written out.
        """
        return self._expanded_mask(attention_mask, self._emitter.scalar(0.0), self._emitter.scalar(MASKED))

    def _expanded_mask(self, attention_mask: str, kept: str, masked: str) -> str:
        emitter, name = self._emitter, "attention_mask"
        there = emitter.node("Cast", [attention_mask], name=name, to=TensorProto.BOOL)
        added = emitter.node("Where", [there, kept, masked], name=name)
        added = emitter.node("Unsqueeze", [added, emitter.integers(1, 2)], name=name)
        batch = emitter.node("Shape", [attention_mask], name=name, start=0, end=1)
        length = emitter.node("Shape", [attention_mask], name=name, start=1, end=2)
        one = emitter.integers(1)
        shape = emitter.node("Concat", [batch, one, length, length], name=name, axis=0)
        return emitter.node("Expand", [added, shape], name=name)

    def attention(self, hidden: str, mask: str, name: str) -> str:
        """See `Operators.attention`: Attention takes finished projections."""
        emitter, heads = self._emitter, self._architecture.num_attention_heads
        products = [self._products.linear(hidden, f"{name}.{part}") for part in PROJECTIONS]
        parts = [
            emitter.node("Add", [x, self._products.bias(f"{name}.{part}")], name=f"{name}.{part}")
            for x, part in zip(products, PROJECTIONS, strict=True)
        ]
        return emitter.node("Attention", [*parts, mask], name=name, q_num_heads=heads, kv_num_heads=heads)

    def bias_activation(self, x: str, name: str, shape: Shape) -> str:  # noqa: ARG002 - ONNX infers the shape
        """See `Operators.bias_activation`."""
        summed = self._emitter.node("Add", [x, self._products.bias(name)], name=name)
        match self._architecture.hidden_act:
            case "gelu":
                return self._emitter.node("Gelu", [summed], name=name)
            case "gelu_new":
                return self._emitter.node("Gelu", [summed], name=name, approximate="tanh")
            case "relu":
                return self._emitter.node("Relu", [summed], name=name)

    def fused(self, *, mlm: bool, word_table: bool) -> dict[str, int]:  # noqa: ARG002 - there is no fused table
        """See `Operators.fused`."""
        layers, head = self._architecture.num_hidden_layers, 1 if mlm else 0
        activation = "Relu" if self._architecture.hidden_act == "relu" else "Gelu"
        return {
            "Attention": layers,
            "LayerNormalization": 2 * layers + 1 + head,
            activation: layers + head,
        }


def make_operators(
    dialect: Dialect, emitter: GraphEmitter, products: Products, architecture: BertArchitecture
) -> OrtOperators | OnnxOperators:
    """The operators of a dialect."""
    kind = OrtOperators if dialect == "ort" else OnnxOperators
    return kind(emitter, products, architecture)
