"""Drift: how far an engine is from PyTorch float32, on real text, and whether that is too far."""

from bertrt_export.drift.budgets import DEFAULT_BUDGETS, Violation
from bertrt_export.drift.compare import DriftOptions, measure_drift
from bertrt_export.drift.keep import keep_in_engine, keep_in_folder
from bertrt_export.drift.report import DriftReport

__all__ = [
    "DEFAULT_BUDGETS",
    "DriftOptions",
    "DriftReport",
    "Violation",
    "keep_in_engine",
    "keep_in_folder",
    "measure_drift",
]
