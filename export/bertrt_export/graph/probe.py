"""Looking inside an engine: the hidden states after the embeddings and after each layer."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from bertrt.backends.base import Float32, TokenBatch, Wanted, check_request
from bertrt.backends.onnxruntime.backend import graph_feeds
from bertrt.backends.onnxruntime.sessions import NAME, graph_path
from bertrt.backends.padded import PaddedBlock
from bertrt.backends.parts import ENCODER
from bertrt.errors import BackendRunError, EngineFolderError
from bertrt.folder import EngineFolder
from bertrt.machine import usable_cpus
from bertrt_export.graph.twin import float32_twin, open_session, read_graph


class LayerProbe:
    """Runs an engine's own graph with every layer's output exposed.

    The fused nodes end where a layer ends, so exposing an output changes nothing before it. Of an engine in parts the
    encoder's twin is run (see `bertrt_export.graph.twin`).

    Args:
        folder: the engine.
        threads: of each run; by default the CPUs that the process may use.

    Raises:
        EngineFolderError: the graph lacks a layer's output, so it was not written by this exporter.
    """

    def __init__(self, folder: EngineFolder, threads: int | None = None) -> None:
        manifest = self._manifest = folder.manifest
        self._role = ENCODER if ENCODER in manifest.backends[NAME] else "graph"
        graph = read_graph(graph_path(folder, self._role))
        layers = manifest.architecture.num_hidden_layers
        self._names = ["embeddings.output", *(f"encoder.layer.{layer}.output" for layer in range(layers))]
        produced = {output for node in graph.graph.node for output in node.output}
        if missing := [name for name in self._names if name not in produced]:
            raise EngineFolderError(
                f"the engine's graph has no {missing[0]!r}; export the engine again with this version"
            )
        shape: list[int | str] = ["batch", "sequence", manifest.architecture.hidden_size]
        for name in self._names:
            graph.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        model = float32_twin(graph) if self._role == ENCODER else graph
        self._session = open_session(model, folder.path, manifest, threads=threads or usable_cpus())

    def run(self, batch: TokenBatch) -> list[Float32]:
        """The embeddings' output and each layer's, ``[tokens, hidden]`` each, packed as the batch is.

        Raises:
            BackendRunError: ONNX Runtime failed.
            InputError: see `bertrt.backends.base.check_request`.
        """
        manifest = self._manifest
        check_request(batch, Wanted(), manifest.architecture, manifest.heads)
        block = PaddedBlock(batch, np.arange(batch.num_sequences), Wanted())
        feeds = (
            block.encoder_feeds() if self._role == ENCODER else graph_feeds(block, Wanted(), manifest.heads)
        )
        try:
            outputs = self._session.run(self._names, feeds)
        except Exception as error:  # ONNX Runtime's exceptions have no common base but this
            raise BackendRunError(f"onnxruntime failed to run the engine's layers: {error}") from error
        return [states[block.real] for states in outputs]

    def close(self) -> None:
        """Release the session."""
        del self._session
