"""Checkpoints: BERT weights from a local folder, the hub, the built-in demo, or a random generator."""

from bertrt_export.checkpoints.checkpoint import Checkpoint
from bertrt_export.checkpoints.opening import open_checkpoint, reopen
from bertrt_export.checkpoints.random_weights import RANDOM_MODELS

__all__ = ["RANDOM_MODELS", "Checkpoint", "open_checkpoint", "reopen"]
