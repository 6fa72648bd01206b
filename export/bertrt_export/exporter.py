"""From a checkpoint to an engine folder."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path

import onnx

from bertrt.architecture import BertArchitecture
from bertrt.backends.parts import ENCODER, parts_of
from bertrt.backends.registry import ONNXRUNTIME, TENSORRT
from bertrt.errors import ExportError
from bertrt.folder import MANIFEST_NAME, check_target, record_files, write_folder
from bertrt.manifest import Dialect, Manifest, Precision, Target
from bertrt_export.calibration import Calibration, calibrate, default_text
from bertrt_export.checkpoints import Checkpoint
from bertrt_export.graph.emitter import WEIGHTS_NAME, WeightFile, count_operators
from bertrt_export.graph.model import build_graph
from bertrt_export.graph.parts import Scales, build_parts, build_typed_standard
from bertrt_export.native import write_weight_file
from bertrt_export.selfcheck import check_engine
from bertrt_export.targets import NATIVE, choose_targets

NATIVE_WEIGHTS = "model.bertrt"
STANDARD_GRAPH = "model.onnx"
ENGINE_GRAPH = "engine.onnx"
# What says how an engine's nodes were fused and quantised, kept in the manifest.
_NOTABLE = (
    "Attention",
    "MultiHeadAttention",
    "EmbedLayerNormalization",
    "LayerNormalization",
    "BiasGelu",
    "FastGelu",
    "Gelu",
    "MatMulIntegerToFloat",
    "MatMulInteger",
    "QuantizeLinear",
    "DequantizeLinear",
    "MatMul",
    "Gemm",
)
_BUILT_WITH = ("bertrt", "numpy", "onnx", "onnxruntime")


def export_engine(
    checkpoint: Checkpoint,
    out: Path,
    *,
    precision: Precision = "int8",
    target: Target = "cpu",
    dialect: Dialect | None = None,
    backends: Sequence[str] | None = None,
    calibration: Calibration | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Build an engine from a checkpoint, check it, and put it at ``out``, whole or not at all.

    Weights are read, converted and written one at a time: memory stays near the size of the largest few.

    Args:
        checkpoint: an open checkpoint.
        out: the engine folder to make.
        precision: of the matrix products.
        target: ``cpu``, or ``tensorrt``: graphs in parts with a type for every value, for TensorRT and for ONNX
            Runtime on a GPU. `bertrt_export.plans.build_plans` makes plans of them.
        dialect: of the graphs for CPUs: ``ort`` (default) for ONNX Runtime's fused operators, ``onnx`` for standard
            operators only, which those of target ``tensorrt`` always have.
        backends: whose files the folder shall hold; by default those of all that can run the model in this
            precision.
        calibration: scales of the activations, for ``int8`` and ``fp8`` of target ``tensorrt``; by default found
            with the built-in text, or with random tokens for random weights.
        overwrite: replace an engine folder that is there.

    Returns:
        The manifest of the new engine.

    Raises:
        ExportError: ``out`` exists or cannot be written, a backend cannot run the model in this precision, an
            option does not suit the target, or the engine failed its own check.
        CheckpointError: a tensor is missing, has the wrong shape or is not finite.
    """
    targets = check_request(
        checkpoint.architecture,
        out,
        precision=precision,
        target=target,
        dialect=dialect,
        backends=backends,
        overwrite=overwrite,
    )
    quantizes = needs_calibration(precision, target)
    if calibration is not None and not quantizes:
        raise ExportError("calibration is for int8 and fp8 of target tensorrt only; leave it out")
    if quantizes and calibration is None:
        calibration = calibrate(checkpoint, default_text(checkpoint), precision=precision)
    with write_folder(out, overwrite=overwrite) as folder:
        files: dict[str, dict[str, str]] = {}
        graphs: dict[str, onnx.ModelProto] = {}
        if NATIVE in targets:
            write_weight_file(checkpoint, folder / NATIVE_WEIGHTS, precision)
            files[NATIVE] = {"weights": NATIVE_WEIGHTS}
        if target == "tensorrt":
            scales = calibration.scales if calibration else None
            graphs = _write_parts(checkpoint, folder, precision=precision, scales=scales)
            parts = {part: f"{part}.onnx" for part in parts_of(checkpoint.heads)}
            # The plan is built later, on the machine or for the GPU that will run it.
            files = {TENSORRT: {}, ONNXRUNTIME: {**parts, "weights": WEIGHTS_NAME}}
        elif ONNXRUNTIME in targets:
            graphs = _write_graphs(checkpoint, folder, precision=precision, dialect=dialect or "ort")
            files[ONNXRUNTIME] = {"graph": ENGINE_GRAPH, "weights": WEIGHTS_NAME}
        _write_json(folder / "config.json", checkpoint.config)
        (folder / "tokenizer.json").write_text(checkpoint.tokenizer.to_json(), encoding="utf-8")
        _write_json(folder / "tokenizer_config.json", checkpoint.tokenizer.settings.to_config())
        manifest = Manifest(
            source=checkpoint.source,
            architecture=checkpoint.architecture,
            precision=precision,
            target=target,
            dialect=("onnx" if target == "tensorrt" else dialect or "ort") if graphs else None,
            heads=checkpoint.heads,
            backends=files,
            files=record_files(folder),
            graph=_count(graphs.get(ENGINE_GRAPH) or graphs[f"{ENCODER}.onnx"]) if graphs else {},
            versions={name: _version(name) for name in _BUILT_WITH},
            calibration=calibration.to_json() if calibration else None,
        )
        (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        check_engine(folder, manifest, graphs)
    return manifest


def needs_calibration(precision: Precision, target: Target) -> bool:
    """Whether an engine has scales for its activations that are found beforehand."""
    return target == "tensorrt" and precision in {"int8", "fp8"}


def check_request(
    architecture: BertArchitecture,
    out: Path,
    *,
    precision: Precision,
    target: Target,
    dialect: Dialect | None,
    backends: Sequence[str] | None,
    overwrite: bool,
) -> tuple[str, ...]:
    """Refuse what cannot be exported before anything is done for it, such as minutes of calibration.

    Args:
        architecture: the model's dimensions.
        out: see `export_engine`, as all that follow.
        precision: of the matrix products.
        target: what the engine is for.
        dialect: of the graphs.
        backends: whose files the folder shall hold.
        overwrite: replace an engine folder that is there.

    Returns:
        The backends to write files for, best first.

    Raises:
        ExportError: see `export_engine`.
    """
    targets = choose_targets(precision, architecture, backends, target)
    if target == "tensorrt" and dialect == "ort":
        raise ExportError("target tensorrt has standard operators only; leave the dialect out, or take onnx")
    check_target(out, overwrite=overwrite)
    return targets


def _write_graphs(
    checkpoint: Checkpoint, folder: Path, *, precision: Precision, dialect: Dialect
) -> dict[str, onnx.ModelProto]:
    weights = WeightFile(folder / WEIGHTS_NAME)
    try:
        graphs = {
            STANDARD_GRAPH: build_graph(
                checkpoint, weights, precision=precision, dialect=dialect, interface="standard"
            ),
            ENGINE_GRAPH: build_graph(
                checkpoint, weights, precision=precision, dialect=dialect, interface="engine"
            ),
        }
    finally:
        weights.close()
    for name, graph in graphs.items():
        (folder / name).write_bytes(graph.SerializeToString(deterministic=True))
    return graphs


def _write_parts(
    checkpoint: Checkpoint, folder: Path, *, precision: Precision, scales: Scales | None
) -> dict[str, onnx.ModelProto]:
    weights = WeightFile(folder / WEIGHTS_NAME)
    try:
        parts = build_parts(checkpoint, weights, precision=precision, scales=scales)
        graphs = {f"{part}.onnx": graph.model for part, graph in parts.items()}
        graphs[STANDARD_GRAPH] = build_typed_standard(checkpoint, weights, precision=precision, scales=scales)
    finally:
        weights.close()
    for name, graph in graphs.items():
        (folder / name).write_bytes(graph.SerializeToString(deterministic=True))
    return graphs


def _count(graph: onnx.ModelProto) -> dict[str, object]:
    counts = count_operators(graph)
    return {
        "opset": graph.opset_import[0].version,
        "nodes": sum(counts.values()),
        "operators": {name: counts[name] for name in _NOTABLE if name in counts},
    }


def _write_json(path: Path, value: object) -> None:
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ExportError(f"cannot write {path.name}: {error}") from error
    path.write_text(text + "\n", encoding="utf-8")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
