"""TensorRT plans of an engine folder: one for each of its parts, built by ``tensorrt`` or ``tensorrt_rtx``."""

from bertrt_export.plans.build import build_plans
from bertrt_export.plans.profiles import default_profiles

__all__ = ["build_plans", "default_profiles"]
