"""Plans of TensorRT for RTX, which builds them without a GPU: what is in the folder, and what the report says."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from bertrt.backends.parts import CANDIDATES
from bertrt.backends.tensorrt.check import check_header
from bertrt.backends.tensorrt.library import find_library, library_logger, library_version
from bertrt.folder import EngineFolder, sha256
from bertrt.manifest import Manifest
from bertrt.plans import Plan, Profile
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.plans import build as build_module
from bertrt_export.plans import build_plans, default_profiles
from bertrt_export.plans.builder import make_builder
from bertrt_export.plans.profiles import Range, check_profiles, input_ranges, mlm_rows

RTX = "tensorrt_rtx"
FEW = (Profile.parse("1x1..1x8"),)
PARTS = ("encoder", "mlm", "pooler")


def build(path: Path, **options: Any) -> Manifest:
    return build_plans(EngineFolder.open(path), library=RTX, **options)


def plan_of(manifest: Manifest) -> Plan:
    assert manifest.plan is not None
    return manifest.plan


def parse(path: Path) -> tuple[ModuleType, Any]:
    """The network of a graph, by the library's own parser and nothing of ours."""
    module = find_library(RTX)
    network = module.Builder(library_logger(module)).create_network()
    assert module.OnnxParser(network, library_logger(module)).parse_from_file(str(path))
    return module, network


def layers(network: Any) -> list[Any]:
    return [network.get_layer(index) for index in range(network.num_layers)]


def fused_attention(path: Path) -> int:
    """Attention layers of a graph that may not be taken apart, which is what a layer is until it is told."""
    module, network = parse(path)
    inputs = [layer for layer in layers(network) if layer.type == module.LayerType.ATTENTION_INPUT]
    for layer in inputs:
        layer.__class__ = module.IAttentionInputLayer
    return sum(not layer.attention.decomposable for layer in inputs)


def quantized_products(path: Path, data_type: int) -> list[str]:
    """Products of a graph both of whose operands come from a DequantizeLinear of values of a type, by onnx alone."""
    graph = onnx.load(str(path), load_external_data=False).graph
    makers = {output: node for node in graph.node for output in node.output}
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}

    def is_quantized(name: str) -> bool:
        maker = makers.get(name)
        if maker is None or maker.op_type != "DequantizeLinear":
            return False
        source = makers.get(maker.input[0])
        zero = maker.input[0] if source is None else source.input[2]
        return stored[zero] == data_type

    return [
        node.name for node in graph.node if node.op_type == "MatMul" and all(map(is_quantized, node.input))
    ]


@pytest.fixture
def engine(export_parts: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function that copies an engine in parts of the demo model."""

    def copy(precision: str) -> Path:
        return shutil.copytree(export_parts(precision), tmp_path / f"demo-{precision}")

    return copy


@pytest.mark.parametrize(
    ("precision", "operands", "capabilities"),
    [
        ("fp32", "float32", {"8.0", "8.6", "8.9", "12.0", "12.1"}),
        ("fp16", "float16", {"8.0", "8.6", "8.9", "12.0", "12.1"}),
        ("bf16", "bfloat16", {"8.0", "8.6", "8.9", "12.0", "12.1"}),
        ("int8", "int8", {"8.0", "8.6", "8.9", "12.0", "12.1"}),
        ("fp8", "fp8", {"8.9", "12.0", "12.1"}),
    ],
)
def test_every_precision(
    precision: str, operands: str, capabilities: set[str], engine: Callable[..., Path]
) -> None:
    path = engine(precision)
    exported = EngineFolder.open(path).manifest
    manifest = build(path)
    plan, report = plan_of(manifest), plan_of(manifest).report
    assert list(report) == list(PARTS)
    encoder = report["encoder"]
    in_float32 = precision == "fp32"
    assert encoder["fused_attention"] == (0 if in_float32 else 4)
    assert encoder["decomposed_attention"] == (4 if in_float32 else 0)
    assert fused_attention(path / "encoder.onnx") == 4
    assert len(encoder["products"]) == 16
    assert {product["operands"] for product in encoder["products"]} == {operands}
    if precision in {"int8", "fp8"}:
        data_type = {"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}[precision]
        expected = quantized_products(path / "encoder.onnx", data_type)
        assert [product["name"] for product in encoder["products"]] == expected
        assert len(expected) == 16
    table = "float32" if in_float32 else "float16"
    assert [product["operands"] for product in report["mlm"]["products"]] == ["float32", table]
    assert [product["operands"] for product in report["pooler"]["products"]] == ["float32", "float32"]
    for part in PARTS:
        assert report[part]["layers"] == parse(path / f"{part}.onnx")[1].num_layers
        assert report[part]["plan_bytes"] == (path / f"{part}.plan").stat().st_size
        assert report[part]["workspace_limit"] > 0
        assert report[part]["seconds"] > 0
        assert "inspector" not in report[part]
    assert (plan.library, plan.version) == (RTX, library_version(find_library(RTX)))
    assert plan.device is None
    assert capabilities <= set(plan.compute_capabilities)
    assert plan.profiles == default_profiles(manifest.architecture)
    assert plan.mlm_rows == 1024
    # All else is as it was exported.
    assert manifest.backends == {**exported.backends, "tensorrt": {part: f"{part}.plan" for part in PARTS}}
    assert exported.files.items() <= manifest.files.items()
    assert manifest.files.keys() - exported.files.keys() == {f"{part}.plan" for part in PARTS}
    assert EngineFolder.open(path).manifest == manifest


def test_what_a_plan_file_begins_with(small_parts: Callable[..., Path]) -> None:
    """The header that plans are refused by is the one that the library writes."""
    path = small_parts()
    manifest = build(path, profiles=FEW)
    for part in PARTS:
        data = (path / f"{part}.plan").read_bytes()
        tag, layout = struct.unpack_from("<4sI", data)
        assert (tag, layout) == (b"vtrt", 0)
        assert ".".join(map(str, data[24:28])) == plan_of(manifest).version
        check_header(plan_of(manifest), data[:64], path=path, name=f"{part}.plan")


def test_plans_are_the_same_each_time_and_at_each_level(small_parts: Callable[..., Path]) -> None:
    """As the help says of TensorRT for RTX."""
    path = small_parts()
    found = set()
    for level in (None, 0, 5):
        build(path, profiles=FEW, optimization_level=level)
        found.add(sha256(path / "encoder.plan"))
    assert len(found) == 1


def test_the_options_reach_the_library(
    small_parts: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own configuration, as it is when it builds: profiles, GPUs, level, TensorFloat-32."""
    seen: list[dict[str, Any]] = []
    module = find_library(RTX)

    class Watched:
        """The real builder, whose every build is looked at."""

        def __init__(self, builder: Any) -> None:
            self.builder = builder

        def __getattr__(self, name: str) -> Any:
            return getattr(self.builder, name)

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            count = config.num_compute_capabilities
            seen.append(
                {
                    "profiles": config.num_optimization_profiles,
                    "capabilities": [config.get_compute_capability(index).name for index in range(count)],
                    "level": config.builder_optimization_level,
                    "tf32": config.get_flag(module.BuilderFlag.TF32),
                    "allocates": not config.get_flag(module.BuilderFlag.REQUIRE_USER_ALLOCATION),
                    "typed": network.get_flag(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
                }
            )
            return self.builder.build_serialized_network(network, config)

    monkeypatch.setattr(build_module, "make_builder", lambda module: Watched(make_builder(module)))
    profiles = [Profile.parse("1x1..1x8"), Profile.parse("1x1..2x4..4x8")]
    manifest = build(
        small_parts("fp16"), profiles=profiles, compute_capabilities=["12.0", "8.9"], optimization_level=2
    )
    assert plan_of(manifest).compute_capabilities == ("8.9", "12.0")
    common = {"capabilities": ["SM89", "SM120"], "level": 2, "tf32": True, "typed": True}
    # So that a run can be captured.
    common["allocates"] = False
    assert seen == [{"profiles": count, **common} for count in (2, 1, 1)]
    seen.clear()
    build(small_parts("fp32"), profiles=profiles, compute_capabilities=["8.9"])
    assert [entry["tf32"] for entry in seen] == [False] * 3


def test_building_again_replaces_the_plan(small_parts: Callable[..., Path]) -> None:
    path = small_parts()
    first = build(path, profiles=FEW)
    second = build(path, profiles=[Profile.parse("1x1..4x16")], compute_capabilities=["8.9"])
    assert plan_of(second).profiles != plan_of(first).profiles
    assert plan_of(second).compute_capabilities == ("8.9",)
    assert second.files["encoder.plan"] != first.files["encoder.plan"]
    assert EngineFolder.open(path).manifest == second
    assert not [entry.name for entry in path.iterdir() if entry.name.startswith(".")]


def test_an_engine_without_heads_has_one_plan(
    small_bert: Callable[..., Any],
    save_checkpoint: Callable[..., Path],
    export_parts: Callable[..., Path],
    tmp_path: Path,
) -> None:
    bare = small_bert(hidden_size=48, num_attention_heads=3).bert
    bare.pooler = None
    path = shutil.copytree(export_parts("fp16", save_checkpoint(bare)), tmp_path / "engine")
    manifest = build(path, profiles=FEW, compute_capabilities=["7.5"])
    # The oldest GPUs multiply no float32, which heads alone do.
    assert manifest.backends["tensorrt"] == {"encoder": "encoder.plan"}
    assert plan_of(manifest).mlm_rows == 0
    assert list(plan_of(manifest).report) == ["encoder"]


def test_a_drift_report_is_of_one_plan(small_parts: Callable[..., Path]) -> None:
    path = small_parts()
    for backend, kept in (("onnxruntime", True), ("tensorrt", False)):
        folder = EngineFolder.open(path)
        folder.replace_manifest(folder.manifest.with_drift({"backend": backend}))
        assert (build(path, profiles=FEW).drift is not None) is kept


def test_progress_counts_the_builders_steps(small_parts: Callable[..., Path]) -> None:
    steps: list[None] = []
    build(small_parts(), profiles=FEW, progress=lambda: steps.append(None))
    # The copying of the network alone takes one for each of its layers.
    assert len(steps) > 100


def test_the_manifest_keeps_the_report(small_parts: Callable[..., Path]) -> None:
    path = small_parts("int8")
    manifest = build(path, profiles=FEW)
    written = json.loads((path / "engine.json").read_text(encoding="utf-8"))["plan"]
    assert written["report"] == plan_of(manifest).report
    assert written["library"] == RTX
    assert written["profiles"] == ["1x1..1x8..1x8"]


class TestBertBaseCased:
    """The size that the product is for, with random weights: its plan depends on shapes and types alone."""

    @pytest.mark.parametrize(("precision", "operands"), [("fp16", "float16"), ("int8", "int8")])
    def test_twelve_fused_layers(
        self, precision: str, operands: str, export_parts: Callable[..., Path], tmp_path: Path
    ) -> None:
        # A build replaces files and changes none, so that links will do.
        exported = export_parts(precision, "bert-base-cased", random=True)
        path = shutil.copytree(exported, tmp_path / "engine", copy_function=os.link)
        report = plan_of(build(path)).report["encoder"]
        assert report["fused_attention"] == 12
        assert report["decomposed_attention"] == 0
        assert fused_attention(path / "encoder.onnx") == 12
        assert [product["operands"] for product in report["products"]] == [operands] * 48
        if precision == "int8":
            assert len(quantized_products(path / "encoder.onnx", onnx.TensorProto.INT8)) == 48


class TestShapes:
    """What the runtime relies on."""

    def test_the_default_profiles_hold_what_the_model_can(self) -> None:
        with open_checkpoint("demo") as checkpoint:
            first, second = default_profiles(checkpoint.architecture)
            assert check_profiles((), checkpoint.architecture) == (first, second)
        assert first == Profile.parse("1x1..1x64..1x512")
        assert second == Profile.parse("1x1..8x128..32x512")

    def test_the_default_profiles_of_a_short_model(self, fusable: Path) -> None:
        with open_checkpoint(fusable) as checkpoint:
            first, second = default_profiles(checkpoint.architecture)
        assert first == Profile.parse("1x1..1x50..1x50")
        assert second == Profile.parse("1x1..8x50..32x50")

    def test_each_parts_inputs(self) -> None:
        profiles = [Profile.parse("1x16..1x64"), Profile.parse("1x64..8x128..32x512")]
        with open_checkpoint("demo") as checkpoint:
            sizes, heads = checkpoint.architecture, checkpoint.heads
            encoder = input_ranges("encoder", profiles, sizes)
            (mlm,) = input_ranges("mlm", profiles, sizes)
            (pooler,) = input_ranges("pooler", profiles, sizes)
        names = ("input_ids", "attention_mask", "token_type_ids")
        assert encoder == [
            dict.fromkeys(names, Range((1, 16), (1, 64), (1, 64))),
            dict.fromkeys(names, Range((1, 64), (8, 128), (32, 512))),
        ]
        hidden = Range(*[(32 * 512, sizes.hidden_size)] * 3)
        assert mlm == {
            "hidden_states": hidden,
            "mlm_positions": Range((1,), (8,), (1024,)),
            "mlm_candidates": Range((1, CANDIDATES), (8, CANDIDATES), (1024, CANDIDATES)),
        }
        assert pooler == {"hidden_states": hidden, "pooled_rows": Range((1,), (8,), (32,))}
        assert mlm_rows(profiles, heads) == 1024

    def test_small_profiles_have_as_many_rows_as_tokens(self) -> None:
        profiles = [Profile.parse("1x1..3x2")]
        with open_checkpoint("demo") as checkpoint:
            assert mlm_rows(profiles, checkpoint.heads) == 6
            (mlm,) = input_ranges("mlm", profiles, checkpoint.architecture)
        assert mlm["mlm_positions"] == Range((1,), (3,), (6,))
