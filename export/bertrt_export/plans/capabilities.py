"""Which GPUs a plan is built for.

``tensorrt`` builds for the GPU of this machine, on which it tries its kernels. ``tensorrt_rtx`` needs none: it compiles
kernels when the plan is loaded, and a plan can be for several compute capabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Final

from bertrt.backends import cuda
from bertrt.backends.tensorrt.library import TENSORRT, capabilities_built_for, library_version
from bertrt.errors import BackendUnavailableError, InputError
from bertrt.manifest import Precision
from bertrt.plans import parse_compute_capability

# Where a precision's products begin to be there.
_LEAST: Final[dict[Precision, tuple[int, int]]] = {"bf16": (8, 0), "fp8": (8, 9)}
# TensorRT for RTX leaves older ones out by default too: it multiplies no float32 on them, which the heads do.
_LEAST_BY_DEFAULT: Final = (8, 0)


def choose_capabilities(module: ModuleType, asked: Sequence[str], precision: Precision) -> tuple[str, ...]:
    """The compute capabilities to build for, rising.

    Args:
        module: the library.
        asked: such as ``["8.9", "12.0"]``. None: of ``tensorrt`` the GPU's; of ``tensorrt_rtx`` all that it knows
            from 8.0 on and that have the precision. (A float16 plan of the demo model for five of them is 24 bytes
            larger than one for one of them.)
        precision: of the engine.

    Raises:
        InputError: not written as a compute capability, or one that the library does not build for, or that lacks
            the precision.
        BackendUnavailableError: ``tensorrt`` without a GPU.
    """
    wanted = sorted({_numbers(parse_compute_capability(text)) for text in asked})
    if module.__name__ == TENSORRT:
        chosen = [_of_this_machine(module, wanted)]
    else:
        known = [_numbers(text) for text in capabilities_built_for(module) or ()]
        for capability in wanted:
            if capability not in known:
                raise InputError(
                    f"{module.__name__} {library_version(module)} does not build for compute capability "
                    f"{_text(capability)}, but for {', '.join(map(_text, known))}; choose among them, or build with "
                    f"{TENSORRT} where that GPU is"
                )
        least = max(_LEAST_BY_DEFAULT, _LEAST.get(precision, _LEAST_BY_DEFAULT))
        chosen = wanted or [capability for capability in known if capability >= least]
    least = _LEAST.get(precision, (0, 0))
    for capability in chosen:
        if capability < least:
            raise InputError(
                f"{precision} needs compute capability {_text(least)} or later, got {_text(capability)}; leave it out, "
                "or export the engine with --precision fp16"
            )
    return tuple(map(_text, chosen))


def member_name(capability: str) -> str:
    """The name of a compute capability in the library's enumeration, such as ``SM89``."""
    return "SM" + capability.replace(".", "")


def present_capability() -> str | None:
    """The compute capability of the first GPU, or ``None`` if none can be used."""
    return None if cuda.problem() else cuda.device_properties(0).compute_capability


def tried_device(module: ModuleType) -> str | None:
    """The name of the GPU on which a library tries its kernels when it builds; ``None`` if it tries none."""
    return cuda.device_properties(0).name if module.__name__ == TENSORRT else None


def _of_this_machine(module: ModuleType, wanted: list[tuple[int, int]]) -> tuple[int, int]:
    if problem := cuda.problem():
        raise BackendUnavailableError(
            f"{TENSORRT} builds plans on the GPU that runs them, and there is none: {problem}; build there, or build "
            "with tensorrt_rtx (--library tensorrt_rtx), which needs no GPU"
        )
    here = _numbers(cuda.device_properties(0).compute_capability)
    if wanted and wanted != [here]:
        others = ", ".join(_text(capability) for capability in wanted if capability != here)
        raise InputError(
            f"{TENSORRT} {library_version(module)} builds for the GPU of this machine only, compute capability "
            f"{_text(here)}, not for {others}; build where that GPU is, or with --library tensorrt_rtx"
        )
    return here


def _numbers(capability: str) -> tuple[int, int]:
    major, _, minor = capability.partition(".")
    return int(major), int(minor)


def _text(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
