"""Looking inside an engine: the hidden states after the embeddings and after each layer."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from bertrt.backends.base import Float32, TokenBatch, Wanted, check_request
from bertrt.backends.onnxruntime import NAME, PaddedBlock, session_options
from bertrt.errors import BackendRunError, EngineFolderError
from bertrt.folder import EngineFolder
from bertrt.machine import usable_cpus


class LayerProbe:
    """Runs an engine's own graph with every layer's output exposed.

    The fused nodes end where a layer ends, so exposing an output changes nothing before it.

    Args:
        folder: the engine.
        threads: of each run; by default the CPUs that the process may use.

    Raises:
        EngineFolderError: the graph lacks a layer's output, so it was not written by this exporter.
    """

    def __init__(self, folder: EngineFolder, threads: int | None = None) -> None:
        self._manifest = folder.manifest
        graph = onnx.load_model(
            str(folder.file(folder.manifest.backends[NAME]["graph"])), load_external_data=False
        )
        layers = folder.manifest.architecture.num_hidden_layers
        self._names = ["embeddings.output", *(f"encoder.layer.{layer}.output" for layer in range(layers))]
        produced = {output for node in graph.graph.node for output in node.output}
        if missing := [name for name in self._names if name not in produced]:
            raise EngineFolderError(
                f"the engine's graph has no {missing[0]!r}; export the engine again with this version"
            )
        shape: list[int | str] = ["batch", "sequence", folder.manifest.architecture.hidden_size]
        for name in self._names:
            graph.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        options = session_options(folder.manifest, threads or usable_cpus())
        # The graph comes from memory, its weights from the folder.
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder.path.resolve())
        )
        self._session = onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, batch: TokenBatch) -> list[Float32]:
        """The embeddings' output and each layer's, ``[tokens, hidden]`` each, packed as the batch is.

        Raises:
            BackendRunError: ONNX Runtime failed.
            InputError: see `bertrt.backends.base.check_request`.
        """
        manifest = self._manifest
        check_request(batch, Wanted(), manifest.architecture, manifest.heads)
        block = PaddedBlock(batch, np.arange(batch.num_sequences), Wanted())
        feeds = block.feeds(Wanted(), mlm=manifest.heads.mlm, pooler=manifest.heads.pooler)
        try:
            outputs = self._session.run(self._names, feeds)
        except Exception as error:  # ONNX Runtime's exceptions have no common base but this
            raise BackendRunError(f"onnxruntime failed to run the engine's layers: {error}") from error
        return [states[block.real] for states in outputs]

    def close(self) -> None:
        """Release the session."""
        del self._session
