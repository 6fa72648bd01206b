"""Tensors of a ``pytorch_model.bin``, read by PyTorch; nothing else in the exporter reads that format."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bertrt.backends.base import Float32
from bertrt.errors import CheckpointError, CorruptCheckpointError
from bertrt_export.checkpoints.store import TensorInfo, quote

if TYPE_CHECKING:
    import torch


class TorchFile:
    """A dictionary of tensors as ``torch.save`` writes it.

    It is unpickled with ``weights_only=True``, which builds tensors and containers and calls nothing else.
    Files of PyTorch 1.6 or later are mapped into memory; older ones are read whole.

    Raises:
        CorruptCheckpointError: not such a file, or it ends too early.
        CheckpointError: PyTorch is not installed, or the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            import torch
        except ImportError as error:
            raise CheckpointError(
                f"{path.name} can only be read with PyTorch, which is not installed: install it "
                "(pip install 'bertrt[torch]') or convert the checkpoint to safetensors"
            ) from error
        self._path = path
        try:
            mapped = zipfile.is_zipfile(path)
            with path.open("rb"):
                pass
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        try:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        # A broken file meets PyTorch's unpickler, zip reader and storages, each with exceptions of its own.
        except Exception as error:
            raise CorruptCheckpointError(
                f"{path} is not a file of tensors that PyTorch reads with weights_only=True "
                f"({type(error).__name__}); get the file anew"
            ) from error
        if not isinstance(values, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in values.items()
        ):
            raise CorruptCheckpointError(
                f"{path} does not hold a dictionary of tensors by name; save the model's state_dict()"
            )
        for name, value in values.items():
            if value.layout == torch.strided and not _is_whole(value):
                raise CorruptCheckpointError(
                    f"{path} holds {quote(name)} without a number of its own for each of its elements (a meta "
                    "tensor, an expanded or a lazily negated one); save the model's state_dict() anew"
                )
        self._tensors: dict[str, torch.Tensor] = values
        self._infos = {
            name: TensorInfo(
                shape=tuple(value.shape),
                dtype=str(value.dtype if value.layout == torch.strided else value.layout)[len("torch.") :],
            )
            for name, value in values.items()
        }

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Shape and type of each tensor by its stored name."""
        return self._infos

    def read(self, name: str) -> Float32:
        """Read a tensor of a float type, widened to float32."""
        import torch

        tensor = self._tensors[name].detach().to(torch.float32)
        return np.array(tensor.numpy(), dtype=np.float32, order="C")

    def close(self) -> None:
        """Let go of the mapped file."""
        self._tensors = {}


def _is_whole(tensor: torch.Tensor) -> bool:
    # An expanded tensor takes no room in the file, and any amount of memory once it is read.
    return (
        tensor.device.type == "cpu"
        and not tensor.is_neg()
        and not tensor.is_conj()
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
    )
