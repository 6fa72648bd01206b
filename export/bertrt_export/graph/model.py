"""The whole of BERT as an ONNX graph: embeddings, encoder layers, and the heads that a checkpoint has.

One set of weights, two graphs:

- ``model.onnx`` has the interface that optimum and transformers know: ``input_ids``, ``attention_mask`` and
  ``token_type_ids`` go in; ``logits`` at every position, ``last_hidden_state``, ``pooler_output`` and
  ``seq_relationship_logits`` come out.
- ``engine.onnx`` is what the runtime runs. Each head works on rows that are named in an input, and a head whose
  input is empty works on no rows: ONNX Runtime computes every output of a graph, asked for or not, so a head
  costs nothing only if it has nothing to do.
"""

from __future__ import annotations

import json
from typing import Literal, Protocol

import onnx
from onnx import TensorProto

from bertrt.architecture import BertArchitecture
from bertrt.backends.onnxruntime import ARCHITECTURE_KEY
from bertrt.errors import ExportError
from bertrt.manifest import Dialect, Heads, Precision
from bertrt_export.graph.dialects import LOWEST, OnnxOperators, OrtOperators, make_operators
from bertrt_export.graph.emitter import MICROSOFT, GraphEmitter, WeightFile, count_operators
from bertrt_export.graph.products import Weights, make_products

Interface = Literal["standard", "engine"]
FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64


class Model(Weights, Protocol):
    """What a graph is built from: a checkpoint."""

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


def build_graph(
    model: Model, weights: WeightFile, *, precision: Precision, dialect: Dialect, interface: Interface
) -> onnx.ModelProto:
    """Build one graph; its large tensors go to ``weights``.

    Raises:
        ExportError: the number of fused nodes is not what the architecture implies, a defect of this builder.
    """
    opset = OrtOperators.opset if dialect == "ort" else OnnxOperators.opset
    builder = _Builder(model, GraphEmitter(weights, opset=opset), precision, dialect)
    graph = builder.standard() if interface == "standard" else builder.engine()
    expected, found = builder.fused(), count_operators(graph)
    for operator, count in expected.items():
        if found.get(operator, 0) != count:
            raise ExportError(
                f"[{interface} graph, {dialect}] expected {count} nodes {operator}, built {found.get(operator, 0)}"
            )
    return graph


class _Builder:
    def __init__(self, model: Model, emitter: GraphEmitter, precision: Precision, dialect: Dialect) -> None:
        self._model = model
        self._emitter = emitter
        self._precision = precision
        self._dialect = dialect
        self._architecture = model.architecture
        self._products = make_products(precision, dialect, emitter, model)
        self._operators = make_operators(dialect, emitter, self._products, model.architecture)

    def fused(self) -> dict[str, int]:
        """The fused nodes that the graph must have."""
        return self._operators.fused(mlm=self._model.heads.mlm, word_table=self._one_node_embeddings)

    def standard(self) -> onnx.ModelProto:
        """The graph that optimum and plain onnxruntime sessions run."""
        emitter, heads, sizes = self._emitter, self._model.heads, self._architecture
        batch: list[int | str] = ["batch", "sequence"]
        ids, mask, segments = (
            emitter.node("Cast", [emitter.input(name, INT64, batch)], name=name, to=INT32)
            for name in ("input_ids", "attention_mask", "token_type_ids")
        )
        hidden = self._encoder(ids, mask, segments)
        if heads.mlm:
            rows = emitter.node("Reshape", [hidden, emitter.integers(-1, sizes.hidden_size)], name="cls/rows")
            logits = self._vocabulary(rows)
            shape = emitter.node("Shape", [ids], name="cls/shape")
            shape = emitter.node("Concat", [shape, emitter.integers(-1)], name="cls/shape", axis=0)
            logits = emitter.node("Reshape", [logits, shape], name="cls/logits")
            emitter.output(logits, "logits", FLOAT, [*batch, sizes.vocab_size])
        emitter.output(hidden, "last_hidden_state", FLOAT, [*batch, sizes.hidden_size])
        if heads.pooler:
            pooled = self._pooler(hidden)
            emitter.output(pooled, "pooler_output", FLOAT, ["batch", sizes.hidden_size])
            if heads.nsp:
                relation = self._next_sentence(pooled)
                emitter.output(relation, "seq_relationship_logits", FLOAT, ["batch", 2])
        return self._build("BERT")

    def engine(self) -> onnx.ModelProto:
        """The graph that the runtime runs: heads on the rows that are named."""
        emitter, heads, sizes = self._emitter, self._model.heads, self._architecture
        batch: list[int | str] = ["batch", "sequence"]
        ids = emitter.input("input_ids", INT32, batch)
        mask = emitter.input("attention_mask", INT32, batch)
        segments = emitter.input("token_type_ids", INT32, batch)
        hidden = self._encoder(ids, mask, segments)
        emitter.output(hidden, "hidden_states", FLOAT, [*batch, sizes.hidden_size])
        if heads.mlm:
            self._masked_lm(hidden)
        if heads.pooler:
            sequences = emitter.input("pooled_sequences", INT64, ["pooled"])
            chosen = emitter.node("Gather", [hidden, sequences], name="pooler/rows", axis=0)
            pooled = self._pooler(chosen)
            emitter.output(pooled, "pooled", FLOAT, ["pooled", sizes.hidden_size])
            if heads.nsp:
                emitter.output(self._next_sentence(pooled), "nsp_logits", FLOAT, ["pooled", 2])
        return self._build("BERT for the BertRT runtime")

    def _build(self, what: str) -> onnx.ModelProto:
        return self._emitter.build(
            "bert",
            doc=f"{what}, {self._precision}, {self._dialect} dialect",
            metadata={ARCHITECTURE_KEY: json.dumps(self._architecture.to_json())},
        )

    def _masked_lm(self, hidden: str) -> None:
        emitter, sizes = self._emitter, self._architecture
        positions = emitter.input("mlm_positions", INT64, ["positions"])
        candidates = emitter.input("mlm_candidates", INT64, ["scored", "candidates"])
        top_k = emitter.input("mlm_top_k", INT64, [1])
        rows = emitter.node("Reshape", [hidden, emitter.integers(-1, sizes.hidden_size)], name="cls/rows")
        rows = emitter.node("Gather", [rows, positions], name="cls/rows", axis=0)
        logits = self._vocabulary(rows)
        emitter.output(logits, "mlm_logits", FLOAT, ["positions", sizes.vocab_size])
        # Who wants the logits alone sends no rows of candidates, and nothing below has any work.
        scored = emitter.node("Shape", [candidates], name="cls/scored", start=0, end=1)
        first = emitter.integers(0)
        logits = emitter.node("Slice", [logits, first, scored, first], name="cls/scored")
        total = emitter.reduce_rows("ReduceLogSumExp", logits, name="cls/log_normalizer")
        best = emitter.node(
            "TopK", [logits, top_k], name="cls/top", outputs=2, output="cls/top:values", axis=-1
        )
        chosen = emitter.node("GatherElements", [logits, candidates], name="cls/candidates", axis=-1)
        emitter.output("cls/top/TopK:1", "mlm_top_ids", INT64, ["scored", "top_k"])
        for value, output, width in (
            (best, "mlm_top_log_probs", "top_k"),
            (chosen, "mlm_candidate_log_probs", "candidates"),
        ):
            log_probs = emitter.node("Sub", [value, total], name=output)
            emitter.output(log_probs, output, FLOAT, ["scored", width])

    @property
    def _one_node_embeddings(self) -> bool:
        return self._dialect == "ort" and self._precision == "fp32"

    def _encoder(self, ids: str, mask: str, segments: str) -> str:
        hidden = self._embeddings(ids, segments)
        mask = self._operators.mask(mask)
        for layer in range(self._architecture.num_hidden_layers):
            hidden = self._layer(hidden, mask, f"encoder.layer.{layer}")
        return hidden

    def _embeddings(self, ids: str, segments: str) -> str:
        emitter, products, output = self._emitter, self._products, "embeddings.output"
        position_table = products.vector("embeddings.position_embeddings.weight")
        segment_table = products.vector("embeddings.token_type_embeddings.weight")
        if self._one_node_embeddings:
            # The fused node looks the words up itself.
            words = emitter.weight(
                "embeddings.word_embeddings.weight",
                lambda: self._model.tensor("embeddings.word_embeddings.weight"),
            )
            norm = [products.vector(f"embeddings.LayerNorm.{part}") for part in ("weight", "bias")]
            return emitter.node(
                "EmbedLayerNormalization",
                [ids, segments, words, position_table, segment_table, *norm],
                name="embeddings",
                domain=MICROSOFT,
                outputs=2,
                output=output,
                shape=["batch", "sequence", self._architecture.hidden_size],
                epsilon=self._architecture.layer_norm_eps,
            )
        length = emitter.node("Shape", [ids], name="embeddings/length", start=1, end=2)
        positions = emitter.node(
            "Slice",
            [position_table, emitter.integers(0), length, emitter.integers(0)],
            name="embeddings/positions",
        )
        words = emitter.node("Add", [products.words(ids), positions], name="embeddings")
        types = emitter.node("Gather", [segment_table, segments], name="embeddings/segments", axis=0)
        return self._operators.add_layer_norm(words, types, "embeddings.LayerNorm", bias=None, output=output)

    def _layer(self, hidden: str, mask: str, name: str) -> str:
        products, operators, sizes = self._products, self._operators, self._architecture
        attention = f"{name}.attention.self"
        query, key, value = (
            products.linear(hidden, f"{attention}.{part}") for part in ("query", "key", "value")
        )
        context = operators.attention(query, key, value, mask, attention)
        projected = products.linear(context, f"{name}.attention.output.dense")
        attended = operators.add_layer_norm(
            projected,
            hidden,
            f"{name}.attention.output.LayerNorm",
            bias=f"{name}.attention.output.dense.bias",
            output=f"{name}.attention.output",
        )
        wide = products.linear(attended, f"{name}.intermediate.dense")
        shape: list[int | str] = ["batch", "sequence", sizes.intermediate_size]
        wide = operators.bias_activation(wide, f"{name}.intermediate.dense", shape)
        narrow = products.linear(wide, f"{name}.output.dense", lowest=LOWEST[sizes.hidden_act])
        return operators.add_layer_norm(
            narrow,
            attended,
            f"{name}.output.LayerNorm",
            bias=f"{name}.output.dense.bias",
            output=f"{name}.output",
        )

    def _vocabulary(self, rows: str) -> str:
        """Logits ``[rows, vocab]`` of hidden states ``[rows, hidden]``."""
        emitter, products, head = self._emitter, self._products, "cls.predictions"
        # A small product before a large one: in int8 it would cost half a point of top-1 agreement.
        x = products.linear(rows, f"{head}.transform.dense", quantize=False)
        x = self._operators.bias_activation(
            x, f"{head}.transform.dense", ["rows", self._architecture.hidden_size]
        )
        norm = f"{head}.transform.LayerNorm"
        x = emitter.node(
            "LayerNormalization",
            [x, products.vector(f"{norm}.weight"), products.vector(f"{norm}.bias")],
            name=norm,
            epsilon=self._architecture.layer_norm_eps,
        )
        x = products.decoder(x, f"{head}.decoder", tied=self._model.tied_decoder)
        return emitter.node("Add", [x, products.bias(head)], name=f"{head}.decoder")

    def _pooler(self, hidden: str) -> str:
        """Pooled output ``[sequences, hidden]`` from the first token of ``[sequences, tokens, hidden]``."""
        first = self._emitter.constant_index(0)
        rows = self._emitter.node("Gather", [hidden, first], name="pooler/first", axis=1)
        # One row a sequence: nothing to win by quantising it.
        x = self._products.linear(rows, "pooler.dense", quantize=False)
        x = self._emitter.node("Add", [x, self._products.bias("pooler.dense")], name="pooler")
        return self._emitter.node("Tanh", [x], name="pooler")

    def _next_sentence(self, pooled: str) -> str:
        name = "cls.seq_relationship"
        x = self._products.linear(pooled, name, quantize=False)
        return self._emitter.node("Add", [x, self._products.bias(name)], name=name)
