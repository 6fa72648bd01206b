"""Fixtures of the exporter's tests: engines in parts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.exporter import export_engine
from bertrt_export.graph.typed import ActivationScale
from bertrt_export.quantize import float16_scales

QUANTIZED = ("attention.self.qkv", "attention.output.dense", "intermediate.dense", "output.dense")


def one_scale(layers: int) -> Any:
    """What calibration gives, with one scale for all: plans do not depend on its value."""
    names = [f"encoder.layer.{layer}.{name}" for layer in range(layers) for name in QUANTIZED]
    scale = float(float16_scales(0.05, "int8"))
    scales = {name: ActivationScale(scale=scale) for name in names}
    return SimpleNamespace(scales=scales, to_json=lambda: {"scales": dict.fromkeys(names, scale)})


@pytest.fixture(scope="session")
def export_parts(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that exports a checkpoint for TensorRT, once for each precision; do not change the folder."""
    engines: dict[tuple[str, str], Path] = {}

    def export(precision: str, source: str | Path = "demo", *, random: bool = False) -> Path:
        key = str(source), precision
        if key not in engines:
            out = tmp_path_factory.mktemp("parts") / "engine"
            with open_checkpoint(source, random=random) as checkpoint:
                layers = checkpoint.architecture.num_hidden_layers
                calibration = one_scale(layers) if precision in {"int8", "fp8"} else None
                export_engine(
                    checkpoint, out, precision=precision, target="tensorrt", calibration=calibration
                )
            engines[key] = out
        return engines[key]

    return export


@pytest.fixture(scope="session")
def fusable(
    small_bert: Callable[..., transformers.BertForPreTraining], save_checkpoint: Callable[..., Path]
) -> Path:
    """A small checkpoint with heads of 16, for which there is fused attention."""
    return save_checkpoint(small_bert(hidden_size=48, num_attention_heads=3, intermediate_size=80))


@pytest.fixture
def small_parts(export_parts: Callable[..., Path], fusable: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that copies an engine in parts of `fusable`, to be built and spoilt."""

    def copy(precision: str = "fp16") -> Path:
        return shutil.copytree(export_parts(precision, fusable), tmp_path / f"small-{precision}")

    return copy
