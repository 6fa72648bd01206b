"""The registry of contestants: the engine and the rivals that it can be measured against."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from bertrt_bench.contestants.base import (
    Answer,
    Contestant,
    ContestantKind,
    Factory,
    Run,
    Setup,
    check_threads,
    load_factory,
)

ENGINE: Final = ContestantKind(
    name="engine",
    description="the engine folder, at Backend.run on a packed batch",
    factory="bertrt_bench.contestants.engine:open_engine",
    precisions={"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "int8"},
)

# A rival is added by a module beside this one and a line here; nothing else knows the rivals by name.
RIVALS: Final[Mapping[str, ContestantKind]] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            ContestantKind(
                name="torch",
                description="PyTorch float32 through transformers, not compiled, inference mode",
                factory="bertrt_bench.contestants.pytorch:open_torch",
                modules=("torch", "transformers"),
                install='pip install "bertrt[torch]"',
                needs_reference=True,
            ),
            ContestantKind(
                name="onnxruntime",
                description="ONNX Runtime with its fused operators, int8 by its own quantize_dynamic",
                factory="bertrt_bench.contestants.onnxruntime:open_onnxruntime",
                modules=("onnx", "onnxruntime"),
                install='pip install "bertrt[bench]"',
                precisions={"int8": "int8"},
                needs_reference=True,
            ),
            ContestantKind(
                name="openvino",
                description="OpenVINO, int8 by NNCF, bfloat16 by hint, compiled for each shape",
                factory="bertrt_bench.contestants.openvino:open_openvino",
                modules=("onnx", "openvino", "nncf"),
                install='pip install "bertrt[bench]"',
                precisions={"int8": "int8", "bf16": "bf16"},
                needs_reference=True,
            ),
        )
    }
)

__all__ = [
    "ENGINE",
    "RIVALS",
    "Answer",
    "Contestant",
    "ContestantKind",
    "Factory",
    "Run",
    "Setup",
    "check_threads",
    "load_factory",
]
