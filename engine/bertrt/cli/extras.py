"""Which optional extra of the distribution brings which module, and the line that installs it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

EXTRA_OF_MODULE: Final = {
    "onnxruntime": "ort",
    "huggingface_hub": "export",
    "onnx": "export",
    "torch": "torch",
    "transformers": "torch",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "nncf": "bench",
    "openvino": "bench",
}


def install_line(extras: Iterable[str]) -> str:
    """The command that installs some extras."""
    return f'pip install "bertrt[{",".join(dict.fromkeys(extras))}]"'
