"""The weight file of the native kernels: its layouts, its tensors, and how it is written."""

from __future__ import annotations

from bertrt_export.native.file import write_weight_file
from bertrt_export.native.model import native_problem

__all__ = ["native_problem", "write_weight_file"]
