"""A part's graph as the library has parsed it, and what is found in it: fused attention, types of the products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # comes with onnx

from bertrt.backends.parts import ENCODER, part_inputs, part_outputs
from bertrt.backends.tensorrt.library import collect_messages, library_logger
from bertrt.errors import PlanBuildError
from bertrt.folder import EngineFolder
from bertrt.manifest import Manifest
from bertrt_export.plans.complaints import describe_parser_errors

_QUANTIZED: Final = frozenset({"int8", "fp8"})
# Products of a layer: query, key and value at once; the attention's output; the two of the feed-forward network.
_PRODUCTS_OF_A_LAYER: Final = 4
_TYPE_NAMES: Final = {"HALF": "float16", "FLOAT": "float32", "BF16": "bfloat16", "INT8": "int8", "FP8": "fp8"}
# What may lie between a product and the DequantizeLinear of its operand.
_TRANSPARENT: Final = ("CAST", "SHUFFLE", "SQUEEZE", "UNSQUEEZE", "IDENTITY")


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product: its name, and the type of its operands, such as ``int8`` or ``float16``."""

    name: str
    operands: str


@dataclass(frozen=True, slots=True)
class ParsedPart:
    """A parsed graph.

    Attributes:
        part: which.
        file: it was read from.
        network: the library's ``INetworkDefinition``.
        parser: has the weights, so that it must live as long as the network.
        attention: the name of each attention layer, and whether it may be taken apart.
        products: in the order of the graph.
    """

    part: str
    file: Path
    network: Any
    parser: Any
    attention: dict[str, bool]
    products: tuple[Product, ...]

    @property
    def fused_attention(self) -> int:
        """Attention layers that become one kernel, or no plan is built."""
        return list(self.attention.values()).count(False)


def parse_part(module: ModuleType, builder: Any, folder: EngineFolder, part: str) -> ParsedPart:
    """Parse the graph of a part; in float32 its attention may be taken apart, for there are no fused kernels.

    Args:
        module: the library.
        builder: the library's ``Builder``.
        folder: the engine.
        part: which.

    Raises:
        PlanBuildError: the file is corrupt, names weights that are none of the folder's files, has a node that the
            library does not know, has other inputs and outputs than the part, or does not have the fused attention
            and the quantised products that the manifest promises; with the node's name.
        EngineFolderError: the file cannot be read.
    """
    manifest = folder.manifest
    file = folder.file(manifest.backends["onnxruntime"][part])
    data = _read_graph(file, folder)
    network = builder.create_network()
    parser = module.OnnxParser(network, library_logger(module))
    with collect_messages() as messages:
        parsed = parser.parse(data, path=str(file))
    if not parsed or parser.num_errors:
        raise _cannot(file, f"{module.__name__} does not read it: {describe_parser_errors(parser, messages)}")
    _check_interface(network, part, file, manifest)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    attention = _find_attention(module, layers, decomposable=manifest.precision == "fp32")
    found = ParsedPart(part, file, network, parser, attention, tuple(_find_products(layers)))
    if part == ENCODER:
        _check_encoder(found, manifest)
    return found


def _read_graph(file: Path, folder: EngineFolder) -> bytes:
    """The bytes of a graph that reads weights from files of the folder only."""
    try:
        data = file.read_bytes()
        model = onnx.load_model_from_string(data)
    except OSError as error:
        raise _cannot(file, f"it cannot be read: {error.strerror or error}") from error
    except DecodeError as error:
        raise _cannot(file, "it is corrupt: not an ONNX graph") from error
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    for tensor in (*model.graph.initializer, *_tensors(nodes)):
        for entry in tensor.external_data:
            if entry.key == "location":
                if entry.value not in folder.manifest.files:
                    raise _cannot(
                        file,
                        f"tensor {tensor.name!r} is read from {entry.value!r}, which is none of the folder's files",
                    )
                folder.file(entry.value)
    return data


def _tensors(nodes: list[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for graph in (attribute.g, *attribute.graphs):
            yield from graph.initializer
            yield from _tensors(list(graph.node))


def _check_interface(network: Any, part: str, file: Path, manifest: Manifest) -> None:
    expected = (
        list(part_inputs(part)),
        list(part_outputs(part, manifest.architecture, manifest.heads)),
    )
    found = (
        [network.get_input(index).name for index in range(network.num_inputs)],
        [network.get_output(index).name for index in range(network.num_outputs)],
    )
    if found != expected:
        raise _cannot(
            file,
            f"it has inputs {_names(found[0])} and outputs {_names(found[1])}; part {part!r} has "
            f"{_names(expected[0])} and {_names(expected[1])}: export the engine again",
        )


def _find_attention(module: ModuleType, layers: list[Any], *, decomposable: bool) -> dict[str, bool]:
    found = {}
    for layer in layers:
        if layer.type == module.LayerType.ATTENTION_INPUT:
            # The bindings give the base class; NVIDIA's own tools cast so too.
            layer.__class__ = module.IAttentionInputLayer
            attention = layer.attention
            if decomposable:
                attention.decomposable = True
            found[str(attention.name)] = bool(attention.decomposable)
    return found


def _find_products(layers: list[Any]) -> Iterator[Product]:
    makers = {layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)}
    for layer in layers:
        if layer.type.name == "MATRIX_MULTIPLY":
            types = [_operand_type(layer.get_input(index), makers) for index in range(2)]
            yield Product(str(layer.name), " x ".join(dict.fromkeys(types)))


def _operand_type(tensor: Any, makers: dict[str, Any]) -> str:
    """The type of an operand as it was before it was dequantised, if it was."""
    maker = makers.get(tensor.name)
    while maker is not None and maker.type.name in _TRANSPARENT:
        maker = makers.get(maker.get_input(0).name)
    if maker is not None and maker.type.name == "DEQUANTIZE":
        tensor = maker.get_input(0)
    name = str(tensor.dtype.name)
    return _TYPE_NAMES.get(name, name.lower())


def _check_encoder(found: ParsedPart, manifest: Manifest) -> None:
    layers, precision = manifest.architecture.num_hidden_layers, manifest.precision
    attention = len(found.attention) if precision == "fp32" else found.fused_attention
    if attention != layers:
        raise _cannot(
            found.file,
            f"it has {attention} attention layers that can be fused, the model has {layers} layers: export the "
            "engine again",
        )
    if len(found.products) != _PRODUCTS_OF_A_LAYER * layers:
        raise _cannot(
            found.file,
            f"it has {len(found.products)} matrix products instead of {_PRODUCTS_OF_A_LAYER * layers}: export the "
            "engine again",
        )
    others = [product for product in found.products if product.operands != precision]
    if precision in _QUANTIZED and others:
        named = ", ".join(f"{product.name} ({product.operands})" for product in others[:3])
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise _cannot(
            found.file,
            f"of {len(found.products)} matrix products {len(others)} have lost their {precision} operands: "
            f"{named}{more}; export the engine again",
        )


def _names(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _cannot(file: Path, problem: str) -> PlanBuildError:
    return PlanBuildError(f"cannot build a plan of {file.name!r} in {str(file.parent)!r}: {problem}")
