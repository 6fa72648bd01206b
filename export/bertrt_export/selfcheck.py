"""What every new engine must pass before it takes its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from bertrt.backends.onnxruntime import session_options
from bertrt.errors import ExportError
from bertrt.manifest import Manifest

# The two graphs share weights and operators; they differ in the shape of their products only, hence in the order
# of float32 sums. Larger differences would mean that they are two models.
_TOLERANCE = 1e-3


def check_engine(folder: Path, manifest: Manifest, graphs: dict[str, onnx.ModelProto]) -> None:
    """Validate the graphs and run them once.

    The run holds a sequence of one token, a full one and one that is nothing but padding: no output may be NaN or
    infinite, and the runtime's graph must agree with the standard one.

    Raises:
        ExportError: a graph is invalid, cannot be run, gives NaN, or the two disagree.
    """
    for name in graphs:
        try:
            onnx.checker.check_model(str(folder / name), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"{name} is not valid ONNX: {str(error).splitlines()[0]}") from error
    standard, engine = (_run(folder / name, manifest) for name in ("model.onnx", "engine.onnx"))
    for graph, outputs in (("model.onnx", standard), ("engine.onnx", engine)):
        for output, values in outputs.items():
            if not np.isfinite(values).all():
                raise ExportError(
                    f"{graph} gives {int((~np.isfinite(values)).sum())} values that are not finite in {output!r}; "
                    f"the checkpoint's weights are out of reach of {manifest.precision}: try another precision"
                )
    for ours, theirs in (
        ("hidden_states", "last_hidden_state"),
        ("mlm_logits", "logits"),
        ("pooled", "pooler_output"),
        ("nsp_logits", "seq_relationship_logits"),
    ):
        if ours not in engine:
            continue
        expected = standard[theirs].reshape(engine[ours].shape)
        difference = np.abs(engine[ours] - expected).max() / max(1.0, np.abs(expected).max())
        if difference > _TOLERANCE:
            raise ExportError(f"the two graphs disagree about {ours} by {difference:.2g} (relative)")


def _run(path: Path, manifest: Manifest) -> dict[str, Any]:
    sizes = manifest.architecture
    length = min(8, sizes.max_position_embeddings)
    generator = np.random.default_rng(0)
    ids = generator.integers(0, sizes.vocab_size, (3, length))
    mask = np.ones((3, length), np.int64)
    mask[1, 1:] = 0
    mask[2] = 0
    segments = np.minimum(np.arange(3 * length).reshape(3, length) % 2, sizes.type_vocab_size - 1)
    try:
        session = onnxruntime.InferenceSession(
            path, session_options(manifest, threads=0), providers=["CPUExecutionProvider"]
        )
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}
        extra = {
            "mlm_positions": np.arange(3 * length),
            "mlm_candidates": np.zeros((3 * length, 1), np.int64),
            "mlm_top_k": np.array([min(5, sizes.vocab_size)], np.int64),
            "pooled_sequences": np.arange(3),
        }
        inputs = {given.name: given.type for given in session.get_inputs()}
        feeds = {
            name: feed.astype(np.int32 if inputs[name] == "tensor(int32)" else np.int64)
            for name, feed in (feeds | extra).items()
            if name in inputs
        }
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        raise ExportError(f"onnxruntime cannot run {path.name}: {str(error).splitlines()[0]}") from error
