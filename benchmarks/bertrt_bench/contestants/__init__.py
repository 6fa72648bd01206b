"""The registry of contestants: the engine and the rivals that it can be measured against."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from bertrt_bench.contestants.base import (
    Answer,
    Contestant,
    ContestantKind,
    Factory,
    Run,
    Setup,
    load_factory,
)

ENGINE: Final = ContestantKind(
    name="engine",
    description="the engine folder, at Backend.run on a packed batch",
    factory="bertrt_bench.contestants.engine:open_engine",
)

# A rival is added by a module beside this one and a line here; nothing else knows the rivals by name.
RIVALS: Final[Mapping[str, ContestantKind]] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            ContestantKind(
                name="torch",
                description="PyTorch float32 through transformers, not compiled, inference mode",
                factory="bertrt_bench.contestants.pytorch:open_torch",
                modules=("torch", "transformers"),
                install='pip install "bertrt[torch]"',
                needs_reference=True,
            ),
        )
    }
)

__all__ = [
    "ENGINE",
    "RIVALS",
    "Answer",
    "Contestant",
    "ContestantKind",
    "Factory",
    "Run",
    "Setup",
    "load_factory",
]
