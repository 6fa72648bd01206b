"""What cannot be built: each has its own error, which names the file or the node, and leaves the folder as it was."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

from bertrt.backends.tensorrt.library import Messages, find_library
from bertrt.errors import (
    BackendUnavailableError,
    HashMismatchError,
    InputError,
    MissingFileError,
    PlanBuildError,
)
from bertrt.folder import EngineFolder, record_files
from bertrt.plans import Profile
from bertrt_export.plans import build_plans
from bertrt_export.plans.complaints import describe_messages

RTX = "tensorrt_rtx"
FEW = (Profile.parse("1x1..1x8"),)
PRODUCT = "encoder.layer.1.intermediate.dense/MatMul"


def build(path: Path, **options: Any) -> None:
    build_plans(EngineFolder.open(path, verify=False), **{"library": RTX, "profiles": FEW, **options})


def snapshot(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.iterdir()}


@pytest.fixture
def spoil(small_parts: Callable[..., Path]) -> Callable[..., Path]:
    """A function that changes an engine in parts; the manifest's sizes and hashes then say what is there."""

    def change(edit: Callable[[Path], None], precision: str = "fp16") -> Path:
        path = small_parts(precision)
        manifest = EngineFolder.open(path).manifest
        edit(path)
        EngineFolder(path, manifest).replace_manifest(replace(manifest, files=record_files(path)))
        return path

    return change


def edit_graph(path: Path, change: Callable[[onnx.GraphProto], None], name: str = "encoder.onnx") -> None:
    model = onnx.load(str(path / name), load_external_data=False)
    change(model.graph)
    (path / name).write_bytes(model.SerializeToString())


def node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    (found,) = [node for node in graph.node if node.name == name]
    return found


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"profiles": [Profile.parse("1x1..1x51")]},
                "sequences of 51 tokens, but the model has 50 positions",
            ),
            (
                {"profiles": [Profile.parse("1x1..40000x50")]},
                "blocks of 2,000,000 tokens; give at most 1,048,576",
            ),
            ({"profiles": [*FEW, *FEW]}, "the profile 1x1..1x8..1x8 is given twice"),
            (
                {"profiles": [Profile.parse(f"1x1..{count}x8") for count in range(1, 18)]},
                "17 profiles are too many: give at most 16",
            ),
            (
                {"compute_capabilities": ["8.9", "9.0"]},
                "does not build for compute capability 9.0, but for 7.5, 8.0",
            ),
            ({"compute_capabilities": ["Ada"]}, "'Ada' is no compute capability"),
            ({"optimization_level": 6}, "a whole number from 0 to 5, got 6"),
            ({"optimization_level": True}, "a whole number from 0 to 5, got True"),
            ({"timing_cache": Path("cache")}, "tensorrt_rtx has no timing cache"),
            ({"library": "openvino"}, "there is no TensorRT library 'openvino'"),
        ],
    )
    def test_each_is_checked_before_the_work(
        self, options: dict[str, Any], message: str, small_parts: Callable[..., Path]
    ) -> None:
        path = small_parts()
        before = snapshot(path)
        with pytest.raises(InputError, match=re.escape(message)):
            build(path, **options)
        assert snapshot(path) == before

    def test_the_name_of_the_library_without_that_gpu_is_given(
        self, small_parts: Callable[..., Path]
    ) -> None:
        with pytest.raises(InputError, match="or build with tensorrt where that GPU is$"):
            build(small_parts(), compute_capabilities=["10.0"])

    @pytest.mark.parametrize(
        ("precision", "capability", "least"), [("fp8", "8.6", "8.9"), ("bf16", "7.5", "8.0")]
    )
    def test_gpus_that_lack_the_precision(
        self, precision: str, capability: str, least: str, small_parts: Callable[..., Path]
    ) -> None:
        message = f"{precision} needs compute capability {least} or later, got {capability}"
        with pytest.raises(InputError, match=re.escape(message)):
            build(small_parts(precision), compute_capabilities=[capability, "12.0"])

    def test_a_library_that_is_not_installed(
        self, small_parts: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("bertrt.backends.tensorrt.library.is_installed", lambda name: False)
        with pytest.raises(BackendUnavailableError, match=r"bertrt\[tensorrt-rtx\]"):
            build(small_parts(), library=None)


def test_an_engine_for_cpus(demo_engine: Callable[..., Path]) -> None:
    with pytest.raises(
        PlanBuildError, match=r"exported for cpu.*bertrt export SOURCE OUT --target tensorrt --precision int8"
    ):
        build(demo_engine("int8"))


class TestFilesThatAreNotThoseOfTheExport:
    """Found by their hashes, before the library reads them."""

    @pytest.mark.parametrize("name", ["encoder.onnx", "pooler.onnx", "model.onnx_data"])
    def test_a_changed_byte(self, name: str, small_parts: Callable[..., Path]) -> None:
        path = small_parts()
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 1
        (path / name).write_bytes(data)
        before = snapshot(path)
        with pytest.raises(HashMismatchError, match=f"'{name}'.*SHA-256"):
            build(path)
        assert snapshot(path) == before

    def test_a_missing_file(self, small_parts: Callable[..., Path]) -> None:
        path = small_parts()
        folder = EngineFolder.open(path)
        (path / "model.onnx_data").unlink()
        with pytest.raises(MissingFileError, match="model.onnx_data"):
            build_plans(folder, library=RTX, profiles=FEW)


class TestFilesThatAManifestVouchesFor:
    """A folder whose hashes are right, and whose graphs are not."""

    @pytest.mark.parametrize("kind", ["garbage", "truncated", "empty"])
    @pytest.mark.parametrize("name", ["encoder.onnx", "mlm.onnx"])
    def test_no_graph(self, kind: str, name: str, spoil: Callable[..., Path]) -> None:
        def edit(path: Path) -> None:
            whole = (path / name).read_bytes()
            half = whole[: len(whole) // 2]
            (path / name).write_bytes({"garbage": b"\xff" * 999, "truncated": half, "empty": b""}[kind])

        path = spoil(edit)
        before = snapshot(path)
        problem = (
            "it has inputs none and outputs none" if kind == "empty" else "it is corrupt: not an ONNX graph"
        )
        with pytest.raises(PlanBuildError, match=f"cannot build a plan of '{name}'.*{problem}"):
            build(path)
        assert snapshot(path) == before

    def test_weights_that_end_too_early(self, spoil: Callable[..., Path]) -> None:
        def edit(path: Path) -> None:
            (path / "model.onnx_data").write_bytes((path / "model.onnx_data").read_bytes()[:5000])

        with pytest.raises(PlanBuildError, match=r"'encoder.onnx'.*out of range.*file size=5000"):
            build(spoil(edit))

    @pytest.mark.parametrize("place", ["../secret", "/etc/hostname", "unlisted"])
    def test_weights_outside_of_the_folder(self, place: str, spoil: Callable[..., Path]) -> None:
        def edit(path: Path) -> None:
            (path.parent / "secret").write_bytes(b"\0" * 100_000)

            def change(graph: onnx.GraphProto) -> None:
                tensor = next(tensor for tensor in graph.initializer if tensor.external_data)
                tensor.external_data[0].value = place

            edit_graph(path, change)

        with pytest.raises(PlanBuildError, match=f"read from '{place}', which is none of the folder's files"):
            build(spoil(edit))

    def test_weights_outside_of_the_folder_inside_of_a_node(self, spoil: Callable[..., Path]) -> None:
        def change(graph: onnx.GraphProto) -> None:
            tensor = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[1])
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="../secret")
            graph.node.append(onnx.helper.make_node("Constant", [], ["unused"], value=tensor))

        with pytest.raises(PlanBuildError, match=r"tensor 'hidden' is read from '\.\./secret'"):
            build(spoil(lambda path: edit_graph(path, change)))

    def test_a_node_that_the_library_does_not_know(self, spoil: Callable[..., Path]) -> None:
        def change(graph: onnx.GraphProto) -> None:
            node(graph, "encoder.layer.1.intermediate.dense/Gelu").op_type = "Frobnicate"

        with pytest.raises(
            PlanBuildError,
            match=r"'encoder.onnx'.*node 'encoder.layer.1.intermediate.dense/Gelu' \(Frobnicate\): .*Plugin not found",
        ) as caught:
            build(spoil(lambda path: edit_graph(path, change)))
        assert "\n" not in str(caught.value)

    def test_a_product_of_shapes_that_do_not_fit(self, spoil: Callable[..., Path]) -> None:
        def change(graph: onnx.GraphProto) -> None:
            weight = node(graph, PRODUCT).input[1]
            (tensor,) = [tensor for tensor in graph.initializer if tensor.name == weight]
            tensor.dims[:] = [tensor.dims[0] // 2, tensor.dims[1] * 2]

        with pytest.raises(
            PlanBuildError, match=rf"node '{PRODUCT}' \(MatMul\): API Usage Error \({PRODUCT}: .*must match"
        ) as caught:
            build(spoil(lambda path: edit_graph(path, change)))
        # Where in NVIDIA's sources it arose, and that there is no GPU, helps nobody.
        assert not re.search(r"/_src/|catchCudaError|Invalid Node|Error Code", str(caught.value))

    def test_operands_of_two_types(self, spoil: Callable[..., Path]) -> None:
        def change(graph: onnx.GraphProto) -> None:
            makers = {output: node for node in graph.node for output in node.output}
            cast = makers[node(graph, PRODUCT).input[0]]
            assert cast.op_type == "Cast"
            cast.attribute[0].i = TensorProto.FLOAT

        with pytest.raises(PlanBuildError, match=rf"node '{PRODUCT}' \(MatMul\).*must have same input types"):
            build(spoil(lambda path: edit_graph(path, change)))

    def test_a_product_that_has_lost_its_quantised_input(self, spoil: Callable[..., Path]) -> None:
        def change(graph: onnx.GraphProto) -> None:
            """Past QuantizeLinear and DequantizeLinear, through a cast."""
            product = node(graph, PRODUCT)
            makers = {output: node for node in graph.node for output in node.output}
            quantize = makers[makers[product.input[0]].input[0]]
            assert quantize.op_type == "QuantizeLinear"
            cast = onnx.helper.make_node("Cast", [quantize.input[0]], ["past"], to=TensorProto.FLOAT16)
            graph.node.insert(list(graph.node).index(product), cast)
            product.input[0] = "past"

        with pytest.raises(
            PlanBuildError,
            match=rf"of 12 matrix products 1 have lost their int8 operands: {PRODUCT} \(float16 x int8\); export",
        ):
            build(spoil(lambda path: edit_graph(path, change), "int8"))

    def test_attention_that_is_missing(self, spoil: Callable[..., Path]) -> None:
        def change(graph: onnx.GraphProto) -> None:
            attention = node(graph, "encoder.layer.2.attention.self/Attention")
            attention.op_type = "Identity"
            del attention.input[1:], attention.attribute[:]

        with pytest.raises(
            PlanBuildError, match="2 attention layers that can be fused, the model has 3 layers"
        ):
            build(spoil(lambda path: edit_graph(path, change)))

    def test_a_product_too_many(self, spoil: Callable[..., Path]) -> None:
        def change(graph: onnx.GraphProto) -> None:
            product = node(graph, PRODUCT)
            again = onnx.helper.make_node("MatMul", product.input, ["again"], name="again")
            graph.node.insert(list(graph.node).index(product), again)
            both = onnx.helper.make_node("Add", ["again", product.output[0]], ["both"])
            place = list(graph.node).index(product)
            for later in list(graph.node)[place + 1 :]:
                later.input[:] = ["both" if name == product.output[0] else name for name in later.input]
            graph.node.insert(place + 1, both)

        with pytest.raises(PlanBuildError, match="13 matrix products instead of 12"):
            build(spoil(lambda path: edit_graph(path, change)))

    def test_the_graph_of_another_part(self, spoil: Callable[..., Path]) -> None:
        def edit(path: Path) -> None:
            (path / "mlm.onnx").write_bytes((path / "pooler.onnx").read_bytes())

        with pytest.raises(
            PlanBuildError,
            match=r"'mlm.onnx'.*has inputs hidden_states, pooled_rows .*part 'mlm' has hidden_states",
        ):
            build(spoil(edit))


def test_attention_without_a_fused_kernel(
    small_bert: Callable[..., Any],
    save_checkpoint: Callable[..., Path],
    export_parts: Callable[..., Path],
    tmp_path: Path,
) -> None:
    source = save_checkpoint(small_bert())
    with pytest.raises(
        PlanBuildError,
        match=r"no fused attention for 3 heads of 8 in fp16, node 'encoder.layer.0.attention.self/Attention'; .*fp32",
    ):
        build(export_parts("fp16", source))
    # And so it is.
    build(shutil.copytree(export_parts("fp32", source), tmp_path / "engine"))


def test_what_the_builder_refuses(small_parts: Callable[..., Path]) -> None:
    path = small_parts()
    before = snapshot(path)
    with pytest.raises(
        PlanBuildError,
        match=r"'mlm.onnx'.*refuses: .*Cannot compile operation 'cls.predictions.transform.dense/MatMul' for Turing",
    ) as caught:
        build(path, compute_capabilities=["7.5"])
    assert not re.search(r"/_src/|Error Code|pass\.cpp", str(caught.value))
    assert snapshot(path) == before


def test_a_library_that_says_nothing() -> None:
    assert "it gives no reason" in describe_messages(Messages())
    assert "it gives no reason" in describe_messages(Messages(errors=["[5] x catchCudaError y"]))


def test_a_builder_that_cannot_be_made(
    small_parts: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(logger: Any) -> None:
        logger.log(logger.ERROR, "the driver is gone")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(find_library(RTX), "Builder", refuse)
    with pytest.raises(PlanBuildError, match="tensorrt_rtx cannot build plans here: the driver is gone"):
        build(small_parts())
