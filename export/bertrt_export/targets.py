"""Which backends an engine folder is made for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from bertrt.architecture import BertArchitecture
from bertrt.backends import native
from bertrt.backends.registry import ONNXRUNTIME, TENSORRT
from bertrt.errors import ExportError
from bertrt.manifest import Precision, Target
from bertrt_export.native import native_problem

NATIVE: Final = native.NAME
# Those that can compute in a precision on a CPU, best first.
TARGETS: Final[dict[Precision, tuple[str, ...]]] = {
    "fp32": (NATIVE, ONNXRUNTIME),
    "fp16": (ONNXRUNTIME,),
    "bf16": (NATIVE,),
    "int8": (NATIVE, ONNXRUNTIME),
    "fp8": (),
}
# Those of the target tensorrt, whose graphs are the same in every precision.
ON_GPU: Final = (TENSORRT, ONNXRUNTIME)
NAMES: Final = (NATIVE, ONNXRUNTIME)


def choose_targets(
    precision: Precision, architecture: BertArchitecture, asked: Sequence[str] | None, target: Target = "cpu"
) -> tuple[str, ...]:
    """The backends to write files for, best first.

    Args:
        precision: of the matrix products.
        architecture: the model's dimensions.
        asked: the backends that must be there; by default all that can run such a model in this precision.
        target: ``cpu``, or ``tensorrt``, whose backends cannot be chosen: they share their files.

    Raises:
        ExportError: an unknown backend, none at all, or one that cannot run such a model in this precision.
    """
    if target == "tensorrt":
        if asked is not None:
            raise ExportError(
                f"with target tensorrt the folder is for {' and '.join(ON_GPU)}, which share its graphs; leave the "
                "backends out"
            )
        return ON_GPU
    able = TARGETS[precision]
    if not able:
        raise ExportError(
            f"no backend computes in {precision} on a CPU; export with target tensorrt, or in int8"
        )
    if asked is None:
        targets = tuple(name for name in able if not target_problem(name, architecture))
        if not targets:
            problem = target_problem(able[0], architecture)
            raise ExportError(
                f"of the backends only {able[0]} computes in {precision}, and it cannot run this model: {problem}; "
                "choose another precision"
            )
        return targets
    if not asked:
        raise ExportError(f"an engine is made for one backend at least; choose among {', '.join(NAMES)}")
    for name in asked:
        if name not in NAMES:
            raise ExportError(f"there is no backend {name!r}; choose among {', '.join(NAMES)}")
        if name not in able:
            others = ", ".join(other for other in TARGETS if name in TARGETS[other])
            raise ExportError(
                f"the backend {name} does not compute in {precision}, but in {others}; choose another precision, "
                f"or leave the backend to the exporter ({', '.join(able)})"
            )
        problem = target_problem(name, architecture)
        if problem:
            others = " or ".join(other for other in able if other != name)
            hint = f"export for {others}" if others else "choose another precision"
            raise ExportError(f"the backend {name} cannot run this model: {problem}; {hint}")
    return tuple(name for name in able if name in asked)


def target_problem(name: str, architecture: BertArchitecture) -> str | None:
    """Why a backend cannot run models of these dimensions, or ``None``."""
    return native_problem(architecture) if name == NATIVE else None
