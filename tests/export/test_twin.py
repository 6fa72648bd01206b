"""A graph's twin for CPUs: the graphs that it cannot be made of, and the session that cannot be opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from bertrt.errors import ExportError
from bertrt.folder import EngineFolder
from bertrt_export.graph.twin import float32_twin, open_session

FLOAT16 = TensorProto.FLOAT16


def graph_of(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info("x", FLOAT16, [2])]
    outputs = [helper.make_tensor_value_info("y", FLOAT16, [2])]
    graph = helper.make_graph(nodes, "a graph", inputs, outputs)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.example", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10)


def test_an_operator_that_holds_a_graph() -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])],
        "branch",
        [],
        [helper.make_tensor_value_info("z", FLOAT16, [2])],
    )
    choice = helper.make_node("If", ["c"], ["y"], name="choice", then_branch=branch, else_branch=branch)
    condition = helper.make_node(
        "Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.BOOL, [], [1])
    )
    with pytest.raises(ExportError, match="If 'choice' holds a graph.*export the engine again"):
        float32_twin(graph_of(condition, choice))


def test_a_type_that_nobody_knows() -> None:
    unknown = helper.make_node("Mystery", ["x"], ["z"], domain="com.example")
    known = helper.make_node("Add", ["x", "z"], ["y"])
    with pytest.raises(ExportError, match="type of 'z' cannot be inferred.*export the engine again"):
        float32_twin(graph_of(unknown, known))


def test_a_graph_that_cannot_be_loaded(gpu_engine: Any) -> None:
    folder = EngineFolder.open(gpu_engine("fp32"))
    unknown = graph_of(helper.make_node("Mystery", ["x"], ["y"], domain="com.example"))
    message = (
        r"onnxruntime [\d.]+ cannot load the graph 'a graph' of .*Mystery.*export the engine again, or update"
    )
    with pytest.raises(ExportError, match=message):
        open_session(unknown, Path(folder.path), folder.manifest, threads=1)
