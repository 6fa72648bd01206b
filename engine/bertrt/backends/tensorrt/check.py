"""Whether a plan fits this machine, found out before the library is given a byte of it.

A plan is read by the very release of the library that built it, and on the GPUs that it was built for. Deserialising
another one ends in an error of the library at best.

Source of the header's layout: TensorRT's own ``trtexec --getPlanVersionOnly`` (``samples/common/sampleEngines.cpp``).
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection
from types import ModuleType
from typing import Any, Final, NoReturn

from bertrt.backends.tensorrt import library as trt_library
from bertrt.errors import BackendUnavailableError, PlanMismatchError
from bertrt.plans import Plan, rebuild_command

# What `check_header` reads of a plan; its caller need not read more.
HEADER_SIZE: Final = 64
_TAGS: Final = {b"ftrt": trt_library.TENSORRT, b"vtrt": trt_library.TENSORRT_RTX}
_LAYOUT: Final = slice(4, 8)
_VERSION: Final = slice(24, 28)
_PLAN_AT_FAULT: Final = frozenset({"VERSION_MISMATCH", "UNSUPPORTED_CC", "MALFORMED_ENGINE"})


def find_plan_library(plan: Plan) -> ModuleType:
    """The library that built a plan, or if it is not installed the best that is; `check_plan` then says what to do.

    Raises:
        BackendUnavailableError: no library is installed, or it does not work.
    """
    return trt_library.find_library(plan_library_name(plan))


def plan_library_name(plan: Plan) -> str | None:
    """The library that built a plan, if it is installed; else ``None``, which stands for the best that is."""
    known = plan.library in trt_library.LIBRARIES
    return plan.library if known and trt_library.is_installed(plan.library) else None


def check_plan(
    plan: Plan,
    *,
    path: str | os.PathLike[str],
    library: str,
    version: str,
    compute_capability: str,
    builds_for: Collection[str] | None = None,
) -> None:
    """Compare what the manifest says about a plan with the machine.

    Args:
        plan: from the manifest.
        path: the engine folder, for the command that rebuilds the plan.
        library: that will read it, ``tensorrt`` or ``tensorrt_rtx``.
        version: of the library.
        compute_capability: of the GPU that will run it, such as ``8.9``.
        builds_for: the GPUs that the library could build it for; ``None``: this one.

    Raises:
        PlanMismatchError: another library or release built it, or for other GPUs; with the command that rebuilds it.
    """
    able = builds_for is None or compute_capability in builds_for
    builder = library if able else trt_library.TENSORRT
    command = rebuild_command(plan, path, library=builder, compute_capability=compute_capability)
    advice = f"build it again: {command}"
    if not able:
        advice = (
            f'{library} builds none for this GPU: load the engine with backend="onnxruntime", provider="cuda", or '
            f"install {builder} ({trt_library.install_line(builder)}) and build it again: {command}"
        )
    if plan.library != library:
        _refuse(f"was built by {plan.library} {plan.version}, here is {library} {version}", advice)
    if plan.version != version:
        _refuse(f"was built by {library} {plan.version}, which alone reads it; here is {version}", advice)
    if compute_capability not in plan.compute_capabilities:
        made_for = ", ".join(plan.compute_capabilities)
        _refuse(f"was built for compute capability {made_for}; this GPU has {compute_capability}", advice)


def warn_of_another_gpu(plan: Plan, *, path: str | os.PathLike[str], index: int, name: str) -> None:
    """Say so if a plan's kernels were chosen on a GPU of another kind, of the same compute capability.

    Args:
        plan: from the manifest.
        path: the engine folder.
        index: of the GPU that will run it.
        name: of that, such as ``NVIDIA L4``.
    """
    if plan.device not in {None, name}:
        warnings.warn(
            f"the TensorRT plan was built on another kind of GPU, {plan.device}; GPU {index} is {name}, where it may "
            f"be slow or fail; build it again: {rebuild_command(plan, path)}",
            RuntimeWarning,
            stacklevel=1,
        )


def check_header(plan: Plan, header: bytes, *, path: str | os.PathLike[str], name: str) -> None:
    """Compare the first bytes of a plan's file with what the manifest says about it.

    Args:
        plan: from the manifest.
        header: the first `HEADER_SIZE` bytes of the file, or all that it has.
        path: the engine folder.
        name: of the file.

    Raises:
        PlanMismatchError: not a plan, or that of another library or release; with the command that rebuilds it.
    """
    advice = f"build it again: {rebuild_command(plan, path)}"
    tag, layout = bytes(header[:4]), bytes(header[_LAYOUT])
    if len(header) < _VERSION.stop or tag not in _TAGS:
        _refuse("is none: it does not begin as plans do", advice, name)
    if _TAGS[tag] != plan.library:
        _refuse(f"is one of {_TAGS[tag]}, the manifest says {plan.library}", advice, name)
    # Other layouts are the library's own affair: it looks again when it reads the plan.
    found = bytes(header[_VERSION])
    if layout == bytes(4) and found != _version_bytes(plan.version):
        _refuse(f"is of version {'.'.join(map(str, found))}, the manifest says {plan.version}", advice, name)


def check_validity(
    module: ModuleType, runtime: Any, plan: Plan, header: bytes, *, path: str | os.PathLike[str], name: str
) -> None:
    """Ask the library what it thinks of a plan's header; ``tensorrt_rtx`` can tell, ``tensorrt`` cannot.

    Args:
        module: the library.
        runtime: its ``Runtime``.
        plan: from the manifest.
        header: the first `HEADER_SIZE` bytes of the file.
        path: the engine folder.
        name: of the file.

    Raises:
        PlanMismatchError: it is of another release, for other GPUs, or malformed; with the command that rebuilds it.
        BackendUnavailableError: the plan is not to blame: the driver is too old, or there is too little memory.
    """
    if not hasattr(runtime, "get_engine_validity"):
        return
    with trt_library.collect_messages() as messages:
        validity, diagnostics = runtime.get_engine_validity(bytes(header))
    if validity != module.EngineValidity.INVALID:
        return
    flags = module.EngineInvalidityDiagnostics.__members__.items()
    reasons = [flag for flag, value in flags if int(value) & int(diagnostics)]
    said = ", ".join(reason.lower().replace("_", " ") for reason in reasons) or " ".join(messages.errors[:1])
    refused = f"is refused by {module.__name__} ({said or 'it gives no reason'})"
    if _PLAN_AT_FAULT & set(reasons):
        _refuse(refused, f"build it again: {rebuild_command(plan, path)}", name)
    raise BackendUnavailableError(
        f"the TensorRT plan {name!r} {refused}; check the NVIDIA driver and the GPU's free memory with 'nvidia-smi'"
    )


def _version_bytes(version: str) -> bytes:
    return bytes(int(number) & 0xFF for number in re.findall(r"\d+", version)[:4])


def _refuse(problem: str, advice: str, name: str | None = None) -> NoReturn:
    what = "the TensorRT plan" if name is None else f"the TensorRT plan {name!r}"
    raise PlanMismatchError(f"{what} {problem}; {advice}")
