"""The backend on ONNX Runtime: its CPU provider, and those for CUDA and TensorRT.

It pads: sequences of similar length run together as one ``[batch, sequence]`` block. What is not asked for costs
nothing: in an engine for CPUs the heads run on named rows only (see ``bertrt_export.graph.model``), one for GPUs comes
in parts (see `bertrt.backends.parts`).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime

from bertrt.backends.base import Wanted
from bertrt.backends.buckets import BucketRunner, Buckets
from bertrt.backends.onnxruntime.devices import DeviceSessionParts
from bertrt.backends.onnxruntime.parts import SessionParts
from bertrt.backends.onnxruntime.providers import gpu_places, profiles_of, provider_problem
from bertrt.backends.onnxruntime.sessions import NAME, load_graph, run_session
from bertrt.backends.padded import BlockLimits, BlockRunner, PaddedBackend, PaddedBlock
from bertrt.backends.parts import ENCODER, PartsRunner, parts_of
from bertrt.backends.placement import Placement, Provider
from bertrt.errors import BackendUnavailableError
from bertrt.folder import EngineFolder
from bertrt.machine import usable_cpus
from bertrt.manifest import Heads
from bertrt.plans import Shape

__all__ = ["OnnxRuntimeBackend", "graph_feeds", "provider_problem"]

_LIMITS = BlockLimits(small=256)
_NO_ROWS = np.zeros(0, np.int64)


class OnnxRuntimeBackend(PaddedBackend):
    """Runs an engine folder's graphs with ``onnxruntime``.

    On GPUs blocks have the shapes of `bertrt.backends.buckets`. With ``cuda`` the first 64 shapes of each part are
    captured as CUDA graphs, those of single sequences while the engine is loaded. A capture can fail, and with it what
    disturbs it, when something else in the process, such as PyTorch, uses CUDA in another thread at that moment.

    With ``tensorrt``, engines are built while it is loaded, which can take minutes, and kept in the user's cache
    folder; they may compute float32 products in TF32, unless the environment has ``NVIDIA_TF32_OVERRIDE=0``.

    Args:
        folder: the engine.
        threads: of each run on the CPU; by default the CPUs that the process may use, and one beside a GPU.
        provider: ``cpu``, ``cuda`` or ``tensorrt``; the last two run engines that were exported for GPUs.
        devices: GPUs by number, one worker each; by default the first.

    Raises:
        BackendUnavailableError: the provider cannot be used here, or not for this engine.
        BackendRunError: ONNX Runtime cannot load a graph; a `DeviceError` where it is a GPU that refuses.
        InputError: there is no such GPU, or GPUs are named for ``cpu``.
        ShapeMismatchError: a graph is not the one of the manifest's architecture.
    """

    def __init__(
        self,
        folder: EngineFolder,
        *,
        threads: int | None = None,
        provider: Provider = "cpu",
        devices: Sequence[int] = (),
    ) -> None:
        placement = Placement.make(threads=threads, provider=provider, devices=devices)
        manifest = folder.manifest
        threads = threads or (1 if placement.on_gpu else usable_cpus())
        runner: BlockRunner
        if placement.on_gpu:
            runner = _on_gpus(folder, provider, placement.devices or (0,), threads)
        elif ENCODER in manifest.backends[NAME]:
            runner = _in_parts(folder, threads)
        else:
            runner = _GraphRunner(load_graph(folder, "graph", threads), manifest.heads)
        super().__init__(
            NAME, runner, architecture=manifest.architecture, heads=manifest.heads, threads=threads
        )


def _on_gpus(folder: EngineFolder, provider: Provider, devices: Sequence[int], threads: int) -> BlockRunner:
    manifest = folder.manifest
    if ENCODER not in manifest.backends[NAME]:
        raise BackendUnavailableError(
            f"the engine was exported for CPUs, which the provider {provider} is not for; export it again with "
            "--target tensorrt, or take the provider cpu"
        )
    if reason := provider_problem(provider):
        raise BackendUnavailableError(f"the provider {provider} cannot be used here: {reason}")
    # Imported here, with all that speaks to a GPU.
    from bertrt.backends import cuda

    for device in devices:
        cuda.device_properties(device)
    profiles = profiles_of(manifest.architecture)
    buckets = Buckets(profiles, rebuild=f"bertrt build {shlex.quote(str(folder.path))}")
    places = gpu_places(folder, provider, devices, threads, profiles)
    executor = DeviceSessionParts(places, buckets, manifest.architecture, manifest.heads)
    return BucketRunner(executor, manifest.architecture, buckets)


def _in_parts(folder: EngineFolder, threads: int) -> BlockRunner:
    manifest = folder.manifest
    if manifest.precision == "bf16":
        cuda = provider_problem("cuda") or "which can be used here"
        raise BackendUnavailableError(
            "onnxruntime computes no bfloat16 on a CPU, and this engine was exported in bf16 for GPUs; take the "
            f"provider cuda ({cuda}), or export the engine for CPUs with --backend native --precision bf16"
        )
    sessions = {part: load_graph(folder, part, threads) for part in parts_of(manifest.heads)}
    return PartsRunner(SessionParts(sessions), manifest.architecture)


class _GraphRunner:
    """Runs ``engine.onnx``, in which the heads work on rows that inputs name: a `BlockRunner`."""

    limits = _LIMITS

    def __init__(self, session: onnxruntime.InferenceSession, heads: Heads) -> None:
        self._session = session
        self._heads = heads

    def shape(self, sequences: int, longest: int) -> Shape:
        """No padding beyond the longest sequence."""
        return sequences, longest

    def run(self, block: PaddedBlock, wanted: Wanted, names: Sequence[str]) -> dict[str, Any]:
        """See `bertrt.backends.padded.BlockRunner.run`."""
        return run_session(self._session, names, graph_feeds(block, wanted, self._heads), block.shape)

    def close(self) -> None:
        """Nothing: whoever runs still has the session."""


def graph_feeds(block: PaddedBlock, wanted: Wanted, heads: Heads) -> dict[str, Any]:
    """The inputs of ``engine.onnx``."""
    feeds: dict[str, Any] = {**block.encoder_feeds()}
    if heads.mlm:
        candidates = wanted.mlm_candidates
        feeds["mlm_positions"] = block.positions
        # Log-probabilities are taken at as many positions as there are rows of candidates.
        scored = len(block.chosen) if wanted.mlm_top_k else 0
        feeds["mlm_candidates"] = (
            np.zeros((scored, 0), np.int64) if candidates is None else candidates[block.chosen]
        )
        feeds["mlm_top_k"] = np.array([wanted.mlm_top_k], np.int64)
    if heads.pooler:
        asked = wanted.pooled or wanted.nsp
        feeds["pooled_sequences"] = np.arange(len(block.sequences)) if asked else _NO_ROWS
    return feeds
