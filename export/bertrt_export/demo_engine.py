"""The engine that ``Engine.load("demo")`` makes when it is first asked for.

This module is imported whenever that engine is loaded, also from the cache: it imports the exporter, and onnx
with it, only when there is something to export.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


class DemoEngine:
    """Exports the embedded demo checkpoint."""

    def __call__(self, out: Path) -> None:
        """Export to ``out`` in float32, the precision nearest to the checkpoint's reference.

        Raises:
            ExportError: ``out`` exists or cannot be written.
        """
        from bertrt_export.checkpoints import open_checkpoint
        from bertrt_export.exporter import export_engine

        with open_checkpoint("demo") as checkpoint:
            export_engine(checkpoint, out, precision="fp32")

    @property
    def version(self) -> str:
        """Changes with what decides which engine is exported: the exporter's sources, and the weights."""
        here = Path(__file__).parent
        digest = hashlib.sha256()
        folders = (*sorted((here / "graph").glob("*.py")), *sorted((here / "native").glob("*.py")))
        for path in (*folders, here / "quantize.py", here / "exporter.py", here / "targets.py"):
            digest.update(path.read_bytes())
        # Their size only: to read them would take longer than all the rest.
        digest.update(str((here / "demo" / "model.safetensors").stat().st_size).encode())
        return digest.hexdigest()[:12]


export_demo_engine = DemoEngine()
