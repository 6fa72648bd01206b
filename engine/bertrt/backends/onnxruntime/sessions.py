"""Sessions of ONNX Runtime on an engine's graphs: how they are loaded, checked and run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import onnxruntime

from bertrt.backends.parts import part_inputs, part_outputs, parts_of
from bertrt.errors import (
    BackendRunError,
    DeviceError,
    DeviceLostError,
    DeviceMemoryError,
    ManifestError,
    ShapeMismatchError,
)
from bertrt.folder import EngineFolder
from bertrt.manifest import Manifest
from bertrt.plans import Shape

NAME: Final = "onnxruntime"
# Under this key of its metadata a graph says, in JSON, which architecture it was built for.
ARCHITECTURE_KEY: Final = "bertrt.architecture"
CPU_PROVIDER: Final = "CPUExecutionProvider"
# A graph that was checked when it was exported is seldom to blame for what fails on a GPU.
GPU_REMEDY: Final = (
    "see whether the driver ('nvidia-smi') and the libraries ('bertrt doctor') are those that onnxruntime wants, or "
    "take the provider cpu"
)
_WEIGHTS: Final = "weights"
# How ONNX Runtime, cuBLAS, cuDNN and TensorRT say that a GPU has not enough memory ...
_NO_MEMORY: Final = re.compile(
    r"out of memory|outofmemory|failed to allocate memory|is smaller than requested bytes|alloc_failed|"
    r"cudaErrorMemoryAllocation",
    re.IGNORECASE,
)
# ... and, by the number or the words of CUDA's error, that it is lost: the same ones as `bertrt.backends.cuda` counts.
_CUDA_ERROR: Final = re.compile(r"CUDA (?:failure|error) (\d+)\b", re.IGNORECASE)
_LOST_NUMBERS: Final = frozenset(
    (3, 46, 100, 201, 214, 220, 226, 700, 702, 709, 710, *range(714, 720), 721, 806, 810, 911, 999)
)
_LOST: Final = re.compile(
    r"illegal memory access|illegal instruction|misaligned address|invalid program counter|"
    r"unspecified launch failure|launch timed out|hardware stack error|device-side assert|uncorrectable|"
    r"context is destroyed|invalid device context|no CUDA-capable device|CUDA-capable device\(s\)|"
    r"MPS client|global/shared address space|(?:device|GPU) is lost",
    re.IGNORECASE,
)

# Providers in the order of their precedence, with their options.
Providers = Sequence[tuple[str, Mapping[str, str]]]


def load_graph(
    folder: EngineFolder, role: str, threads: int, providers: Providers | None = None
) -> onnxruntime.InferenceSession:
    """Load the graph of a role of an engine's backend ``onnxruntime``, and check its interface.

    Args:
        folder: the engine.
        role: of the graph.
        threads: of each run on the CPU.
        providers: for a GPU; by default the CPU's.

    Raises:
        ManifestError: the manifest names no such graph, or no weights.
        BackendRunError: ONNX Runtime cannot load it; a `DeviceError` where it is the GPU that refuses.
        ShapeMismatchError: it is not the one of the manifest's architecture.
    """
    path = graph_path(folder, role)
    options = session_options(folder.manifest, threads)
    if providers:
        # What the library fuses is made for its kernels for GPUs.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        # Read by `bertrt.backends.onnxruntime.providers.check_providers`.
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = onnxruntime.InferenceSession(
            path,
            options,
            providers=[(name, dict(settings)) for name, settings in providers or ((CPU_PROVIDER, {}),)],
            # Else it prints an error and takes the CPU.
            enable_fallback=0,
        )
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        doing = f"onnxruntime {onnxruntime.__version__} cannot load {path.name!r} of {str(folder.path)!r}"
        if providers and (failure := device_failure(error, doing)):
            raise failure from error
        remedy = GPU_REMEDY if providers else "export the engine again, or update onnxruntime"
        raise BackendRunError(f"{doing}: {first_line(error)}; {remedy}") from error
    check_interface(session, folder.manifest, role)
    return session


def graph_path(folder: EngineFolder, role: str) -> Path:
    """Where the graph of a role of the backend ``onnxruntime`` lies.

    Raises:
        ManifestError: the manifest names no such graph, or no weights.
    """
    roles = folder.manifest.backends[NAME]
    for needed in (role, _WEIGHTS):
        if needed not in roles:
            raise ManifestError(f"engine.json: backend {NAME!r} names no {needed!r}; export the engine again")
    return folder.file(roles[role])


def run_session(
    session: onnxruntime.InferenceSession, names: Sequence[str], feeds: Mapping[str, Any], shape: Shape
) -> dict[str, Any]:
    """Run a session on a block of a shape; the named outputs.

    Raises:
        BackendRunError: ONNX Runtime failed.
    """
    try:
        return dict(zip(names, session.run(list(names), dict(feeds)), strict=True))
    except Exception as error:  # as above
        raise BackendRunError(
            f"onnxruntime {onnxruntime.__version__} failed on {shape[0]} sequences of up to {shape[1]} tokens: "
            f"{first_line(error)}; ask for less at once (token_budget), or update onnxruntime"
        ) from error


def device_failure(error: Exception, doing: str) -> DeviceError | None:
    """The error of ours for a GPU's that ONNX Runtime only wraps in its text, or ``None`` for any other.

    Args:
        error: what was raised.
        doing: what failed, the beginning of a sentence.
    """
    text = f"{doing}: {first_line(error)}"
    number = _CUDA_ERROR.search(str(error))
    if _LOST.search(str(error)) or (number and int(number[1]) in _LOST_NUMBERS):
        return DeviceLostError(
            f"{text}; the GPU is lost and the engine closed. Only a new process can use it again; if that fails too, "
            "see 'nvidia-smi' and the kernel's log"
        )
    if _NO_MEMORY.search(str(error)):
        return DeviceMemoryError(
            f"{text}; ask for less at once (token_budget), free memory on the GPU ('nvidia-smi' shows who holds it), "
            "or take another (devices)"
        )
    return None


def session_options(manifest: Manifest, threads: int) -> onnxruntime.SessionOptions:
    """How an engine's graph is run, whatever loads it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # The exporter has fused what pays; what the library would fuse beyond that is slower (kernels/NOTES.md).
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    # Every failure is raised, so nothing needs to be printed beside it.
    options.log_severity_level = 4
    # A pattern is kept for each shape ever seen, and we see many.
    options.enable_mem_pattern = False
    # Of target cpu only: with the option the library spoils the scales of the other graphs when it fuses.
    if manifest.precision == "int8" and manifest.target == "cpu":
        # Without VNNI the kernels for u8 x s8 add pairs of products in 16 bits and saturate. With this, ONNX
        # Runtime takes the exact ones for u8 x u8 on such a processor, and changes nothing on others.
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def check_interface(session: onnxruntime.InferenceSession, manifest: Manifest, role: str) -> None:
    """Compare a graph's inputs and outputs with what the manifest implies for its role.

    Raises:
        ShapeMismatchError: they differ.
    """
    file = repr(manifest.backends[NAME].get(role, role))
    again = "the file is not the one of this engine.json: export the engine again"
    try:
        built_for = json.loads(session.get_modelmeta().custom_metadata_map.get(ARCHITECTURE_KEY, "{}"))
    except ValueError:
        built_for = {}
    for name, value in manifest.architecture.to_json().items():
        if built_for.get(name) != value:
            raise ShapeMismatchError(
                f"{file} was built for {name} {built_for.get(name, 'unknown')}, the manifest's architecture says "
                f"{value}; {again}"
            )
    inputs, outputs = _interface(manifest, role)
    found = {output.name: output.shape[-1] for output in session.get_outputs() if output.shape}
    for name, width in outputs.items():
        if found.get(name) != width:
            raise ShapeMismatchError(
                f"the output {name!r} of {file} has width {found.get(name, 'none: it is absent')}, the manifest's "
                f"architecture says {width}; {again}"
            )
    if (given := {value.name for value in session.get_inputs()}) != inputs:
        raise ShapeMismatchError(
            f"the inputs of {file} are {', '.join(sorted(given))}; the manifest's heads imply "
            f"{', '.join(sorted(inputs))}; {again}"
        )


def _interface(manifest: Manifest, role: str) -> tuple[set[str], dict[str, int]]:
    """The inputs of the graph of a role, and the widths of its outputs."""
    sizes, heads = manifest.architecture, manifest.heads
    if role in parts_of(heads):
        return set(part_inputs(role)), part_outputs(role, sizes, heads)
    inputs, outputs = {"input_ids", "attention_mask", "token_type_ids"}, {"hidden_states": sizes.hidden_size}
    if heads.mlm:
        inputs |= {"mlm_positions", "mlm_candidates", "mlm_top_k"}
        outputs["mlm_logits"] = sizes.vocab_size
    if heads.pooler:
        inputs |= {"pooled_sequences"}
        outputs["pooled"] = sizes.hidden_size
    if heads.nsp:
        outputs["nsp_logits"] = 2
    return inputs, outputs


def first_line(error: Exception) -> str:
    """What went wrong, in one line."""
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # "... Status Message:" announces the line that says it.
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
