"""The graphs of an engine in parts (see `bertrt.backends.parts`), every value with its type (see `typed`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from bertrt.backends.parts import CANDIDATES, ENCODER, MLM, POOLER, TOP_K, parts_of
from bertrt.manifest import Precision
from bertrt_export.graph.emitter import GraphEmitter, WeightFile
from bertrt_export.graph.model import FLOAT, INT32, INT64, GraphBuilder, Model, check_fused
from bertrt_export.graph.typed import (
    ActivationScale,
    FusedQueries,
    TypedOperators,
    TypedProducts,
    make_typed_products,
)

Scales = Mapping[str, ActivationScale]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartGraph:
    """A part's graph.

    Attributes:
        model: the graph.
        inputs: for each product that int8 and fp8 engines quantise, the value that enters it.
    """

    model: onnx.ModelProto
    inputs: Mapping[str, str]


def build_parts(
    model: Model, weights: WeightFile, *, precision: Precision, scales: Scales | None = None
) -> dict[str, PartGraph]:
    """Build all parts that a model has; their large tensors go to ``weights``.

    Args:
        model: the checkpoint.
        weights: where tensors are written.
        precision: of the products.
        scales: of the activations, for int8 and fp8.

    Raises:
        ExportError: a scale is missing, or the number of fused nodes is not what the architecture implies.
    """
    return {
        part: build_part(model, weights, part, precision=precision, scales=scales)
        for part in parts_of(model.heads)
    }


def build_part(
    model: Model, weights: WeightFile, part: str, *, precision: Precision, scales: Scales | None = None
) -> PartGraph:
    """Build one part; see `build_parts`."""
    builder = _typed_builder(model, weights, precision, scales)
    build = {ENCODER: builder.encoder, MLM: builder.masked_lm, POOLER: builder.pooler}[part]
    graph = build()
    check_fused(graph, builder.fused(part), f"{part}, {precision}")
    return PartGraph(model=graph, inputs=builder.products.inputs)


def build_typed_standard(
    model: Model, weights: WeightFile, *, precision: Precision, scales: Scales | None = None
) -> onnx.ModelProto:
    """``model.onnx``: all parts in one graph with the interface that optimum, trtexec and bare sessions know."""
    builder = _typed_builder(model, weights, precision, scales)
    graph = builder.standard()
    check_fused(graph, builder.fused(ENCODER), f"standard, {precision}", at_least=True)
    return graph


def _typed_builder(
    model: Model, weights: WeightFile, precision: Precision, scales: Scales | None
) -> _TypedBuilder:
    emitter = GraphEmitter(weights, opset=TypedOperators.opset)
    products = make_typed_products(precision, emitter, FusedQueries(model, model.architecture), scales)
    operators = TypedOperators(emitter, products, model.architecture)
    return _TypedBuilder(model, emitter, products, operators, f"{precision}, typed")


class _TypedBuilder(GraphBuilder):
    products: TypedProducts

    def fused(self, part: str) -> dict[str, int]:
        """The fused nodes that a part must have, and its quantised operands."""
        layers = self.architecture.num_hidden_layers
        if part == MLM:
            return {"LayerNormalization": 1, "Gemm": 1}
        if part == POOLER:
            return {"Tanh": 1}
        counts = self.operators.fused(mlm=False, word_table=False)
        if self.products.quantizes:
            counts |= {"QuantizeLinear": 4 * layers, "DequantizeLinear": 8 * layers}
        return counts

    def encoder(self) -> onnx.ModelProto:
        """The part `ENCODER`."""
        shape: list[int | str] = ["batch", "sequence"]
        ids, mask, segments = (
            self.emitter.input(name, INT32, shape)
            for name in ("input_ids", "attention_mask", "token_type_ids")
        )
        hidden = self._encoder(ids, mask, segments)
        self.emitter.output(hidden, "hidden_states", FLOAT, [*shape, self.architecture.hidden_size])
        return self._build("BERT's encoder")

    def masked_lm(self) -> onnx.ModelProto:
        """The part `MLM`."""
        emitter, sizes, name = self.emitter, self.architecture, "cls.predictions"
        hidden = self._hidden_input()
        positions = emitter.input("mlm_positions", INT64, ["positions"])
        candidates = emitter.input("mlm_candidates", INT64, ["positions", CANDIDATES])
        rows = emitter.node("Gather", [hidden, positions], name="cls/rows", axis=0)
        logits = self._vocabulary(rows)
        emitter.output(logits, "mlm_logits", FLOAT, ["positions", sizes.vocab_size])
        total = emitter.node(
            "ReduceLogSumExp", [logits, emitter.integers(-1)], name=f"{name}/log_normalizer", keepdims=1
        )
        count = min(TOP_K, sizes.vocab_size)
        best = emitter.node(
            "TopK", [logits, emitter.integers(count)], name="cls/top", outputs=2, output="cls/top:0", axis=-1
        )
        chosen = emitter.node("GatherElements", [logits, candidates], name="cls/candidates", axis=-1)
        emitter.output("cls/top/TopK:1", "mlm_top_ids", INT64, ["positions", count])
        for value, output, width in (
            (best, "mlm_top_log_probs", count),
            (chosen, "mlm_candidate_log_probs", CANDIDATES),
        ):
            log_probs = emitter.node("Sub", [value, total], name=output)
            emitter.output(log_probs, output, FLOAT, ["positions", width])
        return self._build("BERT's masked-LM head")

    def pooler(self) -> onnx.ModelProto:
        """The part `POOLER`."""
        hidden = self._hidden_input()
        rows = self.emitter.input("pooled_rows", INT64, ["pooled"])
        first = self.emitter.node("Gather", [hidden, rows], name="pooler/rows", axis=0)
        pooled = self._pooler(first)
        self.emitter.output(pooled, "pooled", FLOAT, ["pooled", self.architecture.hidden_size])
        if self.model.heads.nsp:
            self.emitter.output(self._next_sentence(pooled), "nsp_logits", FLOAT, ["pooled", 2])
        return self._build("BERT's pooler")

    def _hidden_input(self) -> str:
        return self.emitter.input("hidden_states", FLOAT, ["tokens", self.architecture.hidden_size])
