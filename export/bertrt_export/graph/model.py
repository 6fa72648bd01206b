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
from collections.abc import Mapping
from typing import Literal, Protocol

import onnx
from onnx import TensorProto

from bertrt.architecture import BertArchitecture
from bertrt.backends.onnxruntime.sessions import ARCHITECTURE_KEY
from bertrt.errors import ExportError
from bertrt.manifest import Dialect, Heads, Precision
from bertrt_export.graph.dialects import LOWEST, OnnxOperators, Operators, OrtOperators, make_operators
from bertrt_export.graph.emitter import MICROSOFT, GraphEmitter, WeightFile, count_operators
from bertrt_export.graph.products import Products, Weights, make_products

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
    emitter = GraphEmitter(weights, opset=opset)
    products = make_products(precision, dialect, emitter, model)
    operators = make_operators(dialect, emitter, products, model.architecture)
    # One node looks the words up itself, in float32.
    word_table = dialect == "ort" and precision == "fp32"
    kind = f"{precision}, {dialect} dialect"
    builder = GraphBuilder(model, emitter, products, operators, kind, word_table=word_table)
    graph = builder.standard() if interface == "standard" else builder.engine()
    check_fused(
        graph, operators.fused(mlm=model.heads.mlm, word_table=word_table), f"{interface} graph, {kind}"
    )
    return graph


def check_fused(
    graph: onnx.ModelProto, expected: Mapping[str, int], what: str, *, at_least: bool = False
) -> None:
    """Compare the numbers of a graph's nodes with what its architecture implies.

    Raises:
        ExportError: they differ, a defect of the builder.
    """
    found = count_operators(graph)
    for operator, count in expected.items():
        built = found.get(operator, 0)
        if built < count if at_least else built != count:
            raise ExportError(f"[{what}] expected {count} nodes {operator}, built {built}")


class GraphBuilder:
    """Puts the steps of a model together; the products and the operators say how each is computed."""

    def __init__(
        self,
        model: Model,
        emitter: GraphEmitter,
        products: Products,
        operators: Operators,
        kind: str,
        *,
        word_table: bool = False,
    ) -> None:
        self.model = model
        self.architecture = model.architecture
        self.emitter = emitter
        self.products = products
        self.operators = operators
        self._kind = kind
        self._one_node_embeddings = word_table

    def standard(self) -> onnx.ModelProto:
        """The graph that optimum and plain onnxruntime sessions run."""
        emitter, heads, sizes = self.emitter, self.model.heads, self.architecture
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
            pooled = self._pooler(self._first_tokens(hidden))
            emitter.output(pooled, "pooler_output", FLOAT, ["batch", sizes.hidden_size])
            if heads.nsp:
                relation = self._next_sentence(pooled)
                emitter.output(relation, "seq_relationship_logits", FLOAT, ["batch", 2])
        return self._build("BERT")

    def engine(self) -> onnx.ModelProto:
        """The graph that the runtime runs: heads on the rows that are named."""
        emitter, heads, sizes = self.emitter, self.model.heads, self.architecture
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
            pooled = self._pooler(self._first_tokens(chosen))
            emitter.output(pooled, "pooled", FLOAT, ["pooled", sizes.hidden_size])
            if heads.nsp:
                emitter.output(self._next_sentence(pooled), "nsp_logits", FLOAT, ["pooled", 2])
        return self._build("BERT for the BertRT runtime")

    def _build(self, what: str) -> onnx.ModelProto:
        return self.emitter.build(
            "bert",
            doc=f"{what}, {self._kind}",
            metadata={ARCHITECTURE_KEY: json.dumps(self.architecture.to_json())},
        )

    def _masked_lm(self, hidden: str) -> None:
        emitter, sizes = self.emitter, self.architecture
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

    def _encoder(self, ids: str, mask: str, segments: str) -> str:
        hidden = self._embeddings(ids, segments)
        mask = self.operators.mask(mask)
        for layer in range(self.architecture.num_hidden_layers):
            hidden = self._layer(hidden, mask, f"encoder.layer.{layer}")
        return hidden

    def _embeddings(self, ids: str, segments: str) -> str:
        emitter, products, output = self.emitter, self.products, "embeddings.output"
        position_table = products.vector("embeddings.position_embeddings.weight")
        segment_table = products.vector("embeddings.token_type_embeddings.weight")
        if self._one_node_embeddings:
            words = emitter.weight(
                "embeddings.word_embeddings.weight",
                lambda: self.model.tensor("embeddings.word_embeddings.weight"),
            )
            norm = [products.vector(f"embeddings.LayerNorm.{part}") for part in ("weight", "bias")]
            return emitter.node(
                "EmbedLayerNormalization",
                [ids, segments, words, position_table, segment_table, *norm],
                name="embeddings",
                domain=MICROSOFT,
                outputs=2,
                output=output,
                shape=["batch", "sequence", self.architecture.hidden_size],
                epsilon=self.architecture.layer_norm_eps,
            )
        length = emitter.node("Shape", [ids], name="embeddings/length", start=1, end=2)
        positions = emitter.node(
            "Slice",
            [position_table, emitter.integers(0), length, emitter.integers(0)],
            name="embeddings/positions",
        )
        words = emitter.node("Add", [products.words(ids), positions], name="embeddings")
        types = emitter.node("Gather", [segment_table, segments], name="embeddings/segments", axis=0)
        return self.operators.add_layer_norm(words, types, "embeddings.LayerNorm", bias=None, output=output)

    def _layer(self, hidden: str, mask: str, name: str) -> str:
        products, operators, sizes = self.products, self.operators, self.architecture
        attention = f"{name}.attention.self"
        context = operators.attention(hidden, mask, attention)
        projected = products.linear(context, f"{name}.attention.output.dense")
        attended = operators.add_layer_norm(
            projected,
            hidden,
            f"{name}.attention.output.LayerNorm",
            bias=f"{name}.attention.output.dense",
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
            bias=f"{name}.output.dense",
            output=f"{name}.output",
        )

    def _vocabulary(self, rows: str) -> str:
        """Logits ``[rows, vocab]`` of hidden states ``[rows, hidden]``."""
        emitter, products, head = self.emitter, self.products, "cls.predictions"
        # A small product before a large one: in int8 it would cost half a point of top-1 agreement.
        x = products.linear(rows, f"{head}.transform.dense", quantize=False)
        x = self.operators.bias_activation(
            x, f"{head}.transform.dense", ["rows", self.architecture.hidden_size]
        )
        norm = f"{head}.transform.LayerNorm"
        x = emitter.node(
            "LayerNormalization",
            [x, products.vector(f"{norm}.weight"), products.vector(f"{norm}.bias")],
            name=norm,
            epsilon=self.architecture.layer_norm_eps,
        )
        x = products.decoder(x, f"{head}.decoder", tied=self.model.tied_decoder)
        return emitter.node("Add", [x, products.bias(head)], name=f"{head}.decoder")

    def _first_tokens(self, hidden: str) -> str:
        """``[sequences, hidden]``: the first token of each of ``[sequences, tokens, hidden]``."""
        return self.emitter.node(
            "Gather", [hidden, self.emitter.constant_index(0)], name="pooler/first", axis=1
        )

    def _pooler(self, rows: str) -> str:
        """Pooled output ``[sequences, hidden]`` from the hidden states of the first tokens."""
        # One row a sequence: nothing to win by quantising it.
        x = self.products.linear(rows, "pooler.dense", quantize=False)
        x = self.emitter.node("Add", [x, self.products.bias("pooler.dense")], name="pooler")
        return self.emitter.node("Tanh", [x], name="pooler")

    def _next_sentence(self, pooled: str) -> str:
        name = "cls.seq_relationship"
        x = self.products.linear(pooled, name, quantize=False)
        return self.emitter.node("Add", [x, self.products.bias(name)], name=name)
