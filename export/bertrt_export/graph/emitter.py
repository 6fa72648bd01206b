"""Writing an ONNX graph node by node, with the weights in one external file that several graphs share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"
# The name that optimum gives to the weights beside model.onnx, so that its tools find them.
WEIGHTS_NAME = "model.onnx_data"
# Memory-mapped readers want large tensors on page boundaries; small ones only need to suit vector loads.
_PAGE, _LINE = 4096, 64

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Stored:
    dtype: int
    shape: tuple[int, ...]
    offset: int
    length: int


class WeightFile:
    """The external weights of an engine's graphs. Each tensor is computed and written once, by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] = path.open("xb")
        self._stored: dict[str, _Stored] = {}

    def add(self, name: str, make: Callable[[], Array]) -> None:
        """Write the tensor unless one of that name is there; ``make`` gives its values when they are needed."""
        if name in self._stored:
            return
        values = np.ascontiguousarray(make())
        align = _PAGE if values.nbytes >= _PAGE else _LINE
        offset = -(-self._file.tell() // align) * align
        self._file.write(b"\0" * (offset - self._file.tell()))
        # As bytes: the buffer protocol does not know bfloat16 and float8.
        self._file.write(values.reshape(-1).view(np.uint8).data)
        dtype = helper.np_dtype_to_tensor_dtype(values.dtype)
        self._stored[name] = _Stored(dtype, values.shape, offset, values.nbytes)

    def proto(self, name: str) -> TensorProto:
        """The initializer that refers to a stored tensor."""
        stored = self._stored[name]
        tensor = TensorProto(
            name=name,
            data_type=stored.dtype,
            dims=stored.shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (
            ("location", self.path.name),
            ("offset", str(stored.offset)),
            ("length", str(stored.length)),
        ):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
        return tensor

    def close(self) -> None:
        """Close the file; nothing can be added any more."""
        self._file.close()


class GraphEmitter:
    """Collects the nodes, initializers, inputs and outputs of one graph."""

    def __init__(self, weights: WeightFile, *, opset: int) -> None:
        self._weights = weights
        self._opset = opset
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._values: list[onnx.ValueInfoProto] = []
        self._names: Counter[str] = Counter()

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """Declare a graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, value: str, name: str, dtype: int, shape: Sequence[int | str]) -> None:
        """Declare a value as a graph output under another name."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=f"{name}/Identity"))
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def weight(self, name: str, make: Callable[[], Array]) -> str:
        """An initializer whose values lie in the weight file."""
        if name not in self._initializers:
            self._weights.add(name, make)
            self._initializers[name] = self._weights.proto(name)
        return name

    def constant(self, name: str, values: Array) -> str:
        """A small initializer inside the graph (shapes, scalars)."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.asarray(values), name)
        return name

    def integers(self, *values: int) -> str:
        """A one-dimensional int64 constant, named by its values."""
        return self.constant("int64_" + "_".join(map(str, values)), np.array(values, np.int64))

    def constant_index(self, value: int) -> str:
        """An int64 scalar: Gather with it drops the axis."""
        return self.constant(f"index_{value}", np.array(value, np.int64))

    def scalar(self, value: float) -> str:
        """A float32 scalar constant, named by its value."""
        return self.constant(f"float32_{value!r}", np.array(value, np.float32))

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        *,
        name: str,
        domain: str = "",
        outputs: int = 1,
        output: str | None = None,
        shape: Sequence[int | str] | None = None,
        dtype: int = TensorProto.FLOAT,
        **attributes: Any,
    ) -> str:
        """Add a node and return its first output.

        Args:
            operator: the operator's name.
            inputs: its inputs; an empty string leaves one out.
            name: the part of the model that the node belongs to; made unique by the operator's name and a count.
            domain: the operator set, ONNX's own by default.
            outputs: how many outputs the node has.
            output: a name for the first output, where others refer to it.
            shape: the first output's shape, for operators whose schema ONNX does not know.
            dtype: the first output's type, used with ``shape``.
            attributes: of the operator.
        """
        base = f"{name}/{operator}"
        self._names[base] += 1
        unique = base if self._names[base] == 1 else f"{base}_{self._names[base]}"
        first = output or f"{unique}:0"
        names = [first, *(f"{unique}:{index}" for index in range(1, outputs))]
        self._nodes.append(
            helper.make_node(operator, inputs, names, name=unique, domain=domain, **attributes)
        )
        if shape is not None:
            self._values.append(helper.make_tensor_value_info(first, dtype, shape))
        return first

    def reduce_rows(self, operator: str, x: str, *, name: str) -> str:
        """Reduce each row of ``[rows, width]`` to ``[rows, 1]``, also where there are no rows.

        Releases of ONNX Runtime up to 1.29 give ``[0, width]`` for no rows, which then fits nothing: hence the Reshape.
        """
        reduced = self.node(operator, [x, self.integers(-1)], name=name, keepdims=1)
        return self.node("Reshape", [reduced, self.integers(-1, 1)], name=name)

    def build(self, name: str, *, doc: str, metadata: dict[str, str]) -> onnx.ModelProto:
        """The finished model; ``metadata`` is what a session shows of it."""
        graph = helper.make_graph(
            self._nodes,
            name,
            self._inputs,
            self._outputs,
            initializer=list(self._initializers.values()),
            value_info=self._values,
        )
        domains = {node.domain for node in self._nodes}
        opsets = [helper.make_opsetid("", self._opset)]
        if MICROSOFT in domains:
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for([helper.make_opsetid("", self._opset)]),
            producer_name="bertrt",
            doc_string=doc,
        )
        helper.set_model_props(model, metadata)
        return model


def count_operators(model: onnx.ModelProto) -> dict[str, int]:
    """How often each operator occurs in a model."""
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))
