"""The reference of the drift check where transformers is not installed: our own plain PyTorch in float32."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bertrt.backends.base import Int64, TokenBatch
from bertrt.errors import ReferenceUnavailableError
from bertrt.manifest import Heads
from bertrt_export.checkpoints import Checkpoint
from bertrt_export.drift.reference import Reference, ReferenceOutput, open_reference


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenReference:
    """A reference, and what a report says that it is."""

    reference: Reference
    description: str


class PlainReference:
    """A `bertrt_bench.gpu.model.TorchBert` with plain attention: a `bertrt_export.drift.reference.Reference`."""

    def __init__(self, model: Any, heads: Heads, device: str) -> None:
        self._model = model
        self._heads = heads
        self._device = device

    def run(self, batch: TokenBatch, positions: Int64, *, layers: bool) -> ReferenceOutput:
        """See `bertrt_export.drift.reference.Reference`.

        Raises:
            ReferenceUnavailableError: the reference itself gives NaN or infinity.
        """
        import torch

        lengths, model, heads = batch.lengths, self._model, self._heads
        real = np.arange(int(lengths.max()))[None, :] < lengths[:, None]
        # Row-major order of the mask is the order of the packed tokens.
        ids, segments = np.zeros(real.shape, np.int64), np.zeros(real.shape, np.int64)
        ids[real], segments[real] = batch.input_ids, batch.token_type_ids
        present, rows = (torch.from_numpy(array).to(self._device) for array in (real, positions))
        with torch.inference_mode():
            states = model.layers(
                torch.from_numpy(ids).to(self._device), torch.from_numpy(segments).to(self._device), present
            )
            hidden, first = states[-1][present], states[-1][:, 0]
            result = ReferenceOutput(
                hidden_states=hidden.cpu().numpy(),
                layers=tuple(state[present].cpu().numpy() for state in states) if layers else (),
                mlm_logits=model.masked_lm(hidden[rows]).cpu().numpy() if heads.mlm else None,
                pooled=model.pool(first).cpu().numpy() if heads.pooler else None,
                nsp_logits=model.next_sentence(first).cpu().numpy() if heads.nsp else None,
            )
        for array in (result.hidden_states, result.mlm_logits, result.pooled, result.nsp_logits):
            if array is not None and not np.isfinite(array).all():
                raise ReferenceUnavailableError(
                    "PyTorch itself gives NaN or infinity for this checkpoint; there is nothing to compare "
                    "with: look for overflow in its weights"
                )
        return result


@contextlib.contextmanager
def open_any_reference(checkpoint: Checkpoint, *, threads: int, device: str) -> Iterator[OpenReference]:
    """Open transformers' model on the CPU where it is installed, as ``bertrt drift`` does; elsewhere our own.

    Args:
        checkpoint: what the engine was made from.
        threads: of transformers.
        device: of our own, ``cpu`` or ``cuda``.

    Raises:
        ReferenceUnavailableError: PyTorch is missing, or transformers cannot load the checkpoint.
    """
    if importlib.util.find_spec("torch") is None:
        raise ReferenceUnavailableError('the drift check needs PyTorch; pip install "bertrt[torch]"')
    if importlib.util.find_spec("transformers") is not None:
        with open_reference(checkpoint, checkpoint.heads, threads=threads) as reference:
            yield OpenReference(reference=reference, description="transformers in float32 on the CPU")
        return
    import torch

    from bertrt_bench.gpu.model import load_model

    # The ten bits of TF32, which a GPU may take for float32, would be half of what is measured.
    torch.set_float32_matmul_precision("highest")
    model = load_model(checkpoint, attention="eager", dtype=torch.float32, device=device)
    plain = PlainReference(model, checkpoint.heads, device)
    yield OpenReference(
        reference=plain, description=f"plain PyTorch in float32 on the {device}, without transformers"
    )
