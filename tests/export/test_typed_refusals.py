"""Graphs with a type for every value: what cannot be built."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bertrt.errors import CalibrationError, ExportError
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.graph import parts as graph_parts
from bertrt_export.graph.emitter import WeightFile
from bertrt_export.graph.parts import build_parts
from bertrt_export.graph.typed import ActivationScale

PRODUCTS = ("attention.self.qkv", "attention.output.dense", "intermediate.dense", "output.dense")


@pytest.mark.parametrize("scale", [0.03, 0.0, -1.0, float("nan"), float("inf"), 1e-9, 70000.0])
def test_a_scale_that_float16_does_not_hold(scale: float) -> None:
    with pytest.raises(CalibrationError, match="must be a positive float16 number, got .*float16_scales"):
        ActivationScale(scale=scale)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_scale_that_is_missing(
    precision: str, small_bert: Any, save_checkpoint: Any, tmp_path: Path
) -> None:
    with open_checkpoint(save_checkpoint(small_bert())) as checkpoint:
        weights = WeightFile(tmp_path / "weights")
        message = "calibration gave no scale for the input of 'encoder.layer.0.attention.self.qkv'"
        with pytest.raises(ExportError, match=re.escape(message)):
            build_parts(checkpoint, weights, precision=precision)
        weights.close()


@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8"])
def test_weights_beyond_float16(
    precision: str, small_bert: Any, save_checkpoint: Any, tmp_path: Path
) -> None:
    model = small_bert()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = 70000.0
    with open_checkpoint(save_checkpoint(model)) as checkpoint:
        weights = WeightFile(tmp_path / "weights")
        layers = checkpoint.architecture.num_hidden_layers
        scales = {
            f"encoder.layer.{layer}.{name}": ActivationScale(scale=0.5)
            for layer in range(layers)
            for name in PRODUCTS
        }
        message = r"reach 7e\+04, float16 ends at 65504; export with --precision fp32"
        with pytest.raises(ExportError, match=message):
            build_parts(checkpoint, weights, precision=precision, scales=scales)
        weights.close()


def test_a_fused_node_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, small_bert: Any, save_checkpoint: Any, tmp_path: Path
) -> None:
    def unfused(self: Any, hidden: str, mask: str, name: str) -> str:
        return str(self._emitter.node("Identity", [hidden], name=name))

    monkeypatch.setattr(graph_parts.TypedOperators, "attention", unfused)
    with open_checkpoint(save_checkpoint(small_bert())) as checkpoint:
        weights = WeightFile(tmp_path / "weights")
        with pytest.raises(ExportError, match=r"\[encoder, fp16\] expected 3 nodes Attention, built 0"):
            build_parts(checkpoint, weights, precision="fp16")
        weights.close()
