"""The weights of an engine as a folder that its rivals can read."""

from __future__ import annotations

from pathlib import Path

from bertrt.errors import InputError
from bertrt.manifest import Source


def reference_folder(source: Source, reference: str | None, scratch: Path) -> Path:
    """Find or write the Hugging Face folder that an engine was made from.

    Which one that is, `bertrt_export.checkpoints.reopen` says.

    Args:
        source: the engine's, from its manifest.
        reference: a checkpoint (``demo``, a folder, a hub name), or ``None``.
        scratch: a folder that weights are written to if they lie in none.

    Raises:
        InputError: no checkpoint was named and none is known, or it holds other weights.
        CheckpointError: the checkpoint cannot be read.
    """
    # The exporter needs onnx and safetensors; a measurement without rivals does not.
    from bertrt_export.checkpoints import reopen

    with reopen(source, reference) as checkpoint:
        found = checkpoint.source.weights_sha256
        if found != source.weights_sha256:
            raise InputError(
                f"the checkpoint {reference or source.name!r} has weights of SHA-256 "
                f"{(found or 'none')[:16]}…, the engine was made from "
                f"{(source.weights_sha256 or 'none')[:16]}…; "
                "name the checkpoint that it was made from"
            )
        if checkpoint.folder is not None:
            return checkpoint.folder.absolute()
        folder = scratch / "reference"
        checkpoint.materialize(folder)
        return folder
