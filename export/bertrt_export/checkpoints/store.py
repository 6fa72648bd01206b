"""The contract between a checkpoint and whatever holds its tensors."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from bertrt.backends.base import Float32

# What a weight may be stored as. Integers would be quantised weights, whose scales nobody here knows; float64
# and the 8-bit floats occur in no BERT.
FLOAT_TYPES = ("float32", "float16", "bfloat16")

# Longer than any name that BERT has.
_LONGEST_SHOWN = 120


def quote(value: object) -> str:
    """Write what a file says for a message: without control characters, and of bounded length."""
    short = reprlib.Repr()
    short.maxstring = _LONGEST_SHOWN
    return short.repr(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """What is known of a tensor before it is read.

    Attributes:
        shape: its dimensions.
        dtype: NumPy's name of its stored type, or ``bfloat16``.
    """

    shape: tuple[int, ...]
    dtype: str


class TensorStore(Protocol):
    """Tensors under the names that they are stored by; reading one does not read the others."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Shape and type of each tensor by its stored name."""
        ...

    def read(self, name: str) -> Float32:
        """Read a tensor whose type is among `FLOAT_TYPES`; the array is the caller's.

        Raises:
            CheckpointError: it can no longer be read.
        """
        ...

    def close(self) -> None:
        """Release the files; calling it again does nothing."""
        ...
