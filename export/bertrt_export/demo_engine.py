"""The engine that ``Engine.load("demo")`` makes when it is first asked for."""

from __future__ import annotations

from pathlib import Path

from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.exporter import export_engine


def export_demo_engine(out: Path) -> None:
    """Export the embedded demo checkpoint to ``out`` in float32, the precision nearest to its reference.

    Raises:
        ExportError: ``out`` exists or cannot be written.
    """
    with open_checkpoint("demo") as checkpoint:
        export_engine(checkpoint, out, precision="fp32")
