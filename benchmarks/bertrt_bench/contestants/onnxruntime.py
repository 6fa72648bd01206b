"""ONNX Runtime on its CPU provider, in the best shape that its own tools give BERT.

The float32 graph has the runtime's fused operators, with query, key and value in one product (``Attention``), as
``onnxruntime.transformers.optimizer`` makes it of a plain export; int8 is what ``quantize_dynamic`` makes of that,
with a scale for each channel of the weights. Measured against the same without the joined product, against the
optimizer's own output, and each at every optimisation level: none was faster (kernels/NOTES.md).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime

from bertrt.errors import MeasurementError
from bertrt.machine import describe
from bertrt.manifest import Precision
from bertrt.tokenization import WordPieceTokenizer
from bertrt_bench.cases import Question
from bertrt_bench.contestants.base import Run, Setup, check_threads
from bertrt_bench.contestants.conversion import OUTPUTS, convert, write_float32
from bertrt_bench.contestants.parts import Block, best_tokens, fastest_budget, padded_run, told_of

if TYPE_CHECKING:
    import onnx

_VNNI: Final = frozenset({"avx_vnni", "avx512_vnni"})


class OnnxRuntimeContestant:
    """A session for each kind of task, opened when its first question is prepared."""

    def __init__(self, setup: Setup, reference: str) -> None:
        self._setup = setup
        self._reference = reference
        self._folder = Path(tempfile.mkdtemp())
        self._tokenizer = WordPieceTokenizer.from_folder(Path(setup.engine))
        self._sessions: dict[str, Any] = {}
        self.threads: int | None = None
        self.versions: Mapping[str, str] = {"onnxruntime": onnxruntime.__version__}
        self.details: dict[str, str] = {"precision": setup.precision}

    def prepare(self, question: Question) -> Run:
        """Convert the model and open the session if this is the first question of its kind."""
        session = self._session(OUTPUTS[question.case.task])

        def forward(block: Block) -> npt.NDArray[Any]:
            output: npt.NDArray[Any] = session.run(None, block.feeds())[0]
            return output

        budget = fastest_budget(question, forward)
        self.details.update(told_of(question, budget))
        return padded_run(question, forward, token_budget=budget, rank=best_tokens, tokenizer=self._tokenizer)

    def _session(self, output: str) -> Any:
        if output not in self._sessions:
            folder = self._folder / output
            folder.mkdir()
            arguments = {
                "reference": self._reference,
                "folder": str(folder),
                "output": output,
                "precision": self._setup.precision,
            }
            convert(f"{__name__}:write_model", arguments)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self._setup.threads
            options.inter_op_num_threads = 1
            # More would fuse the activations' quantisation into each product, where query, key and value, or a
            # product and its neighbour, now share one.
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.log_severity_level = 3
            session = onnxruntime.InferenceSession(
                folder / "model.onnx", options, providers=["CPUExecutionProvider"]
            )
            # As it was set: the library does not say how many threads its pool has.
            self.threads = int(session.get_session_options().intra_op_num_threads)
            check_threads("ONNX Runtime", self.threads, self._setup.threads)
            self._sessions[output] = session
        return self._sessions[output]


def open_onnxruntime(setup: Setup) -> OnnxRuntimeContestant:
    """Make the contestant."""
    if setup.reference is None:
        raise MeasurementError("the onnxruntime contestant needs a reference checkpoint")
    return OnnxRuntimeContestant(setup, setup.reference)


def write_model(reference: str, folder: str, output: str, precision: Precision) -> None:
    """Write ``model.onnx`` into a folder."""
    # In the process of the conversion only, as is what follows.
    import onnx

    source = write_float32(reference, Path(folder), output, "ort")
    graph = onnx.load(source)
    join_projections(graph)
    target = Path(folder) / "model.onnx"
    if precision != "int8":
        onnx.save(graph, target, save_as_external_data=True, location="model.weights")
        return
    from onnxruntime.quantization import QuantType, quantize_dynamic

    joined = Path(folder) / "joined.onnx"
    onnx.save(graph, joined, save_as_external_data=True, location="joined.weights")
    quantize_dynamic(
        joined,
        target,
        weight_type=QuantType.QInt8,
        per_channel=True,
        # Without VNNI, sums of two products saturate at 16 bits: weights of 7 bits, as its documentation says.
        reduce_range=not _VNNI & set(describe().instruction_sets),
        # The type of what comes out of fused operators, which ONNX's own shape inference does not know.
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )


def join_projections(model: onnx.ModelProto) -> None:
    """Replace each MultiHeadAttention and the three products before it by one Attention.

    Raises:
        MeasurementError: the graph has no such nodes.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    producers = {output: node for node in graph.node for output in node.output}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    replaced: dict[str, onnx.NodeProto] = {}
    dropped: set[str] = set()
    for node in graph.node:
        if node.op_type != "MultiHeadAttention":
            continue
        products = [producers[name] for name in node.input[:3]]
        names = [product.input[1] for product in products]
        joined = np.concatenate([numpy_helper.to_array(weights[name]) for name in names], axis=1)
        graph.initializer.append(numpy_helper.from_array(joined, f"{node.name}/qkv"))
        replaced[node.name] = helper.make_node(
            "Attention",
            [products[0].input[0], f"{node.name}/qkv", node.input[3], node.input[4]],
            node.output,
            name=node.name,
            domain=node.domain,
        )
        replaced[node.name].attribute.extend(node.attribute)
        dropped.update(product.name for product in products)
        for name in names:
            graph.initializer.remove(weights[name])
    if not replaced:
        raise MeasurementError("the graph for onnxruntime has no attention to fuse; a defect of the exporter")
    nodes = [replaced.get(node.name, node) for node in graph.node if node.name not in dropped]
    del graph.node[:]
    graph.node.extend(nodes)
