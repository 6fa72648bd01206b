"""``bertrt doctor``: what this machine has, which backends can run, and why the others cannot."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from bertrt import __version__, c_library
from bertrt.backends import cuda
from bertrt.backends.native import ISA_VARIABLE, InstructionSet, instruction_sets
from bertrt.backends.placement import PROVIDERS
from bertrt.backends.registry import ONNXRUNTIME, BackendStatus, backend_status
from bertrt.builtin import cache_folder
from bertrt.cli.command import EXIT_CHECK_FAILED, EXIT_OK, Command
from bertrt.cli.console import emit, human_bytes, table
from bertrt.cli.extras import EXTRA_OF_MODULE, install_line
from bertrt.errors import BackendUnavailableError, BertRTError
from bertrt.machine import Machine, describe


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "What this machine has, which backends can run, and why the others cannot. "
        "Exit code 1 when no backend can."
    )


def _run(args: argparse.Namespace) -> int:
    machine, backends, packages, cache = describe(), backend_status(), _packages(), _cache()
    kernels, library, gpus = _kernels(), _c_library(), _gpus()
    providers = _providers(backends)
    if args.json:
        value = {
            "bertrt": __version__,
            "machine": machine.to_json(),
            "backends": [asdict(backend) for backend in backends],
            "gpus": gpus,
            "providers": providers,
            "kernels": [asdict(isa) for isa in kernels],
            "c_library": library,
            "packages": packages,
            "cache": cache,
        }
        emit(value, as_json=True)
    else:
        emit(
            "\n".join(_report(machine, backends, gpus, providers, kernels, library, packages, cache)),
            as_json=False,
        )
    return EXIT_OK if any(backend.available for backend in backends) else EXIT_CHECK_FAILED


def _gpus() -> dict[str, Any]:
    """The GPUs that CUDA can use, or why there are none."""
    problem = cuda.problem()
    devices = (
        [] if problem else [asdict(cuda.device_properties(index)) for index in range(cuda.device_count())]
    )
    return {"problem": problem, "devices": devices}


def _providers(backends: list[BackendStatus]) -> list[dict[str, Any]]:
    """What stands in the way of each of ONNX Runtime's execution providers; none where it is not installed."""
    if not any(backend.name == ONNXRUNTIME and backend.available for backend in backends):
        return []
    # Imported here: it loads the library.
    from bertrt.backends.onnxruntime.backend import provider_problem

    return [{"name": name, "problem": provider_problem(name)} for name in PROVIDERS]


def _packages() -> list[dict[str, str | None]]:
    """The optional packages: version if installed, and otherwise the line that installs them."""
    found: list[dict[str, str | None]] = []
    for module, extra in EXTRA_OF_MODULE.items():
        installed = importlib.util.find_spec(module) is not None
        found.append(
            {
                "name": module,
                "extra": extra,
                "version": _version(module) if installed else None,
                "install": None if installed else install_line([extra]),
            }
        )
    return found


def _version(module: str) -> str:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:  # another distribution brings the module
        return "installed"


def _kernels() -> list[InstructionSet]:
    """The instruction sets of the native kernels; none where they are not built, which their backend says."""
    try:
        return instruction_sets()
    except BackendUnavailableError:
        return []


def _c_library() -> dict[str, str | None]:
    """Where the header and the shared library lie."""
    found: dict[str, str | None] = {"include": None, "library_dir": None, "problem": None}
    places: dict[str, Callable[[], str]] = {
        "include": c_library.get_include,
        "library_dir": c_library.get_library_dir,
    }
    for name, place in places.items():
        try:
            found[name] = place()
        except BackendUnavailableError as error:
            found["problem"] = found["problem"] or str(error)
    return found


def _cache() -> dict[str, Any]:
    """Where built-in engines are kept, and what is there."""
    try:
        folder = cache_folder()
    except BertRTError as error:
        return {"path": None, "engines": [], "problem": str(error)}
    try:
        engines = sorted(path.name for path in folder.iterdir() if (path / "engine.json").is_file())
    except OSError:  # not there yet
        engines = []
    return {"path": str(folder), "engines": engines, "problem": None}


def _report(
    machine: Machine,
    backends: list[BackendStatus],
    gpus: dict[str, Any],
    providers: list[dict[str, Any]],
    kernels: list[InstructionSet],
    library: dict[str, str | None],
    packages: list[dict[str, str | None]],
    cache: dict[str, Any],
) -> Iterator[str]:
    yield f"bertrt {__version__}"
    yield table(
        [
            ("python", machine.python),
            ("system", machine.os),
            ("processor", f"{machine.cpu} ({machine.architecture})"),
            ("cores", _cores(machine)),
            ("instructions", ", ".join(machine.instruction_sets) or "unknown"),
            ("memory", _memory(machine)),
        ]
    )
    yield "backends"
    yield table(
        [
            (backend.name, backend.version or "-", _state(backend) if backend.available else backend.reason)
            for backend in backends
        ]
    )
    if providers:
        yield "providers of onnxruntime"
        yield table([(provider["name"], provider["problem"] or "available") for provider in providers])
    yield "GPUs"
    yield table(
        [
            (
                str(number),
                gpu["name"],
                f"compute capability {gpu['compute_capability']}",
                human_bytes(gpu["memory_bytes"]),
            )
            for number, gpu in enumerate(gpus["devices"])
        ]
        or [(gpus["problem"],)]
    )
    if kernels:
        yield "native kernels"
        yield table([(isa.name, _use(isa)) for isa in kernels])
        yield "C library"
        places = [(name, path) for name in ("include", "library_dir") if (path := library[name])]
        yield table([*places, *([("missing", library["problem"])] if library["problem"] else [])])
    yield "optional packages"
    yield table(
        [
            (package["name"] or "", package["version"] or "-", package["install"] or "installed")
            for package in packages
        ]
    )
    yield "built-in engines"
    held = ", ".join(cache["engines"]) or "none yet"
    yield table([(cache["problem"] or cache["path"], "" if cache["problem"] else held)])


def _state(backend: BackendStatus) -> str:
    return f"available, with {backend.isa}" if backend.isa else "available"


def _use(isa: InstructionSet) -> str:
    if isa.active:
        return "in use"
    return isa.reason or f"can be used: {ISA_VARIABLE}={isa.name}"


def _cores(machine: Machine) -> str:
    quota = "none" if machine.cpu_quota is None else f"{machine.cpu_quota:g}"
    return (
        f"{machine.usable_cpus} usable of {machine.logical_cpus} "
        f"(affinity {machine.affinity_cpus}, control-group quota {quota})"
    )


def _memory(machine: Machine) -> str:
    total, available, limit = (
        "unknown" if count is None else human_bytes(count)
        for count in (machine.memory_bytes, machine.memory_available_bytes, machine.memory_limit_bytes)
    )
    limit = "none" if machine.memory_limit_bytes is None else limit
    return f"{available} available of {total} (control-group limit {limit})"


COMMAND = Command(
    name="doctor",
    help="what this machine has, and which backends can run",
    example="""
bertrt doctor
bertrt doctor --json
""",
    add_arguments=_add_arguments,
    run=_run,
)
