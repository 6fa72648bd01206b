"""A graph's twin for CPUs: each operator computes in float32, and its results are rounded to the types they had.

ONNX Runtime's CPU provider has no kernels for most operators in float16 and bfloat16. For float16 it puts casts around
them by itself, and takes out those that it finds between two such operators, with the rounding that they stand for; for
bfloat16 it gives up. In the twin every value still has the type and the rounding of the original, so that its drift is
that of a device that adds up in float32, as GPUs' matrix units do.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import onnx
import onnxruntime
from onnx import TensorProto, helper

from bertrt.backends.onnxruntime.parts import SessionParts
from bertrt.backends.onnxruntime.sessions import NAME, first_line, graph_path, session_options
from bertrt.backends.padded import PaddedBackend
from bertrt.backends.parts import PartsRunner, parts_of
from bertrt.errors import ExportError
from bertrt.folder import EngineFolder
from bertrt.machine import usable_cpus
from bertrt.manifest import Manifest

_NARROW = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})
# What changes a type, or says it in an attribute, is run as it stands.
_CASTS = frozenset({"Cast", "QuantizeLinear", "DequantizeLinear", "Identity"})


def float32_twin(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite a graph; weights in external files stay where they are.

    Args:
        model: a graph without subgraphs, all types of which ONNX can infer.

    Raises:
        ExportError: a value's type is unknown, or an operator holds a graph.
    """
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    types = _types(model)
    nodes: list[onnx.NodeProto] = []
    widened: dict[str, str] = {}
    counter = itertools.count()
    for node in model.graph.node:
        if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
            raise ExportError(
                f"[twin] {node.op_type} {node.name!r} holds a graph; expected plain operators only: export the engine "
                "again with this version"
            )
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        if node.op_type in _CASTS or not any(
            _type(types, name) in _NARROW for name in (*node.input, *node.output)
        ):
            nodes.append(copy)
            continue
        for index, name in enumerate(node.input):
            if _type(types, name) in _NARROW:
                if name not in widened:
                    widened[name] = f"{name}/float32"
                    nodes.append(_cast(name, widened[name], TensorProto.FLOAT, next(counter)))
                copy.input[index] = widened[name]
        nodes.append(copy)
        for index, name in enumerate(node.output):
            if (kind := _type(types, name)) in _NARROW:
                copy.output[index] = f"{name}/wide"
                nodes.append(_cast(copy.output[index], name, kind, next(counter)))
    del twin.graph.node[:]
    twin.graph.node.extend(nodes)
    # The operators' results have other types now, which are inferred again where they are needed.
    del twin.graph.value_info[:]
    return twin


def _types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {tensor.name: tensor.data_type for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.output, *inferred.value_info):
        types[value.name] = value.type.tensor_type.elem_type
    return types


def _type(types: dict[str, int], name: str) -> int:
    if not name:
        return TensorProto.UNDEFINED
    if not types.get(name):
        raise ExportError(
            f"[twin] the type of {name!r} cannot be inferred; expected a graph of standard operators: export the "
            "engine again with this version"
        )
    return types[name]


def _cast(value: str, result: str, to: int, number: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [value], [result], name=f"twin/Cast_{number}", to=to)


def read_graph(path: Path) -> onnx.ModelProto:
    """A graph without its weights, which stay in their file."""
    return onnx.load_model(str(path), load_external_data=False)


def open_session(
    model: onnx.ModelProto, folder: Path, manifest: Manifest, *, threads: int
) -> onnxruntime.InferenceSession:
    """A session on a graph in memory, whose weights lie in a folder.

    Raises:
        ExportError: ONNX Runtime cannot load it.
    """
    options = session_options(manifest, threads)
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder.resolve())
    )
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} cannot load the graph {model.graph.name!r} of {str(folder)!r}: "
            f"{first_line(error)}; export the engine again, or update onnxruntime"
        ) from error


class TwinBackend(PaddedBackend):
    """An engine in parts on a CPU, every value rounded as the graphs say: what its drift is measured with.

    Args:
        folder: an engine for GPUs.
        threads: of each run; by default the CPUs that the process may use.
    """

    # What stands beside the backend's name in a report.
    isa = "each operator in float32, rounded to its type"

    def __init__(self, folder: EngineFolder, threads: int | None = None) -> None:
        manifest, threads = folder.manifest, threads or usable_cpus()
        sessions = {
            part: open_session(
                float32_twin(read_graph(graph_path(folder, part))), folder.path, manifest, threads=threads
            )
            for part in parts_of(manifest.heads)
        }
        runner = PartsRunner(SessionParts(sessions), manifest.architecture)
        super().__init__(
            NAME, runner, architecture=manifest.architecture, heads=manifest.heads, threads=threads
        )
