"""Looking inside an engine, whatever computes it: the outputs of its layers."""

from __future__ import annotations

from typing import Protocol

from bertrt.backends.base import Backend, Float32, TokenBatch
from bertrt.backends.native import NativeBackend
from bertrt.folder import EngineFolder


class Probe(Protocol):
    """Gives the outputs of an engine's layers."""

    def run(self, batch: TokenBatch) -> list[Float32]:
        """The embeddings and every layer's output, each ``[tokens, hidden] float32``."""
        ...

    def close(self) -> None:
        """Release what the probe holds, not the backend that it was made for."""
        ...


class NativeProbe:
    """Asks the native backend itself, which gives its layers' outputs on request."""

    def __init__(self, backend: NativeBackend) -> None:
        self._backend = backend

    def run(self, batch: TokenBatch) -> list[Float32]:
        """See `Probe.run`."""
        return list(self._backend.run_layers(batch))

    def close(self) -> None:
        """Nothing is held."""


def make_probe(folder: EngineFolder, backend: Backend) -> Probe | None:
    """A probe of what a backend computes from a folder; ``None`` for what runs on a GPU, which shows no layers.

    Raises:
        EngineFolderError: the engine does not show its layers.
    """
    if isinstance(backend, NativeBackend):
        return NativeProbe(backend)
    # Imported here: the native backend is measured without ONNX Runtime.
    from bertrt_export.graph.probe import LayerProbe
    from bertrt_export.graph.twin import TwinBackend

    if folder.manifest.target != "cpu" and not isinstance(backend, TwinBackend):
        return None
    return LayerProbe(folder, backend.threads)
