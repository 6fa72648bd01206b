"""The demo checkpoint and a held-out text, as package data; see the model card beside this file."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def demo_folder() -> Path:
    """The folder of the demo checkpoint: a small cased BERT in Hugging Face's layout, read-only."""
    return Path(str(resources.files(__name__)))


def evaluation_text() -> Path:
    """Prose that the demo checkpoint has not seen: UTF-8, a paragraph a line, a blank line after a chapter."""
    return demo_folder() / "evaluation.txt"
