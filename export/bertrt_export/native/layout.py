"""How the native kernels want arrays to lie: rows, and panels of 32 outputs; see ``kernels/FORMAT.md``."""

from __future__ import annotations

from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

Dtype = Literal["float32", "bfloat16", "int8", "int32"]
Array = npt.NDArray[Any]

# bfloat16 has no type in NumPy: its bits are the upper half of a float32's.
NUMPY_TYPES: Final[dict[Dtype, npt.DTypeLike]] = {
    "float32": "<f4",
    "bfloat16": "<u2",
    "int8": "i1",
    "int32": "<i4",
}
PANEL: Final = 32
_TILE_ROWS = 16
_PIECE_BYTES = 64
_ROW_ELEMENTS = 64
# The largest finite bfloat16.
BFLOAT16_LARGEST: Final = float(np.uint32(0x7F7F0000).view(np.float32))


def round_up(value: int, to: int) -> int:
    """The smallest multiple of ``to`` that is not below ``value``."""
    return -(-value // to) * to


def element_bytes(dtype: Dtype) -> int:
    """The size of an element."""
    return np.dtype(NUMPY_TYPES[dtype]).itemsize


def rows_bytes(rows: int, columns: int, dtype: Dtype) -> int:
    """The size of ``[rows, columns]`` in rows."""
    return rows * round_up(columns, _ROW_ELEMENTS) * element_bytes(dtype)


def panels_bytes(outputs: int, inputs: int, dtype: Dtype) -> int:
    """The size of ``[outputs, inputs]`` in panels."""
    return round_up(outputs, PANEL) * round_up(inputs * element_bytes(dtype), _PIECE_BYTES)


def pack_rows(values: Array) -> Array:
    """Pad each row of ``[rows, columns]``, or a vector, with zeros to a multiple of 64 elements."""
    values = np.atleast_2d(values)
    return np.pad(values, ((0, 0), (0, round_up(values.shape[1], _ROW_ELEMENTS) - values.shape[1])))


def pack_panels(values: Array) -> Array:
    """Panels ``[panels, steps, 2, 16, 16] uint32`` of ``[outputs, inputs]``; bfloat16 comes as uint16 bits.

    A uint32 holds the 4, 2 or 1 neighbouring inputs of one output that the kernels multiply at once.
    """
    outputs, inputs = values.shape
    group = 4 // values.itemsize
    padded = np.zeros(
        (round_up(outputs, PANEL), round_up(inputs, _PIECE_BYTES // values.itemsize)), values.dtype
    )
    padded[:outputs, :inputs] = values
    panels, steps = padded.shape[0] // PANEL, padded.shape[1] // group // _TILE_ROWS
    grouped = padded.view(np.uint32).reshape(panels, PANEL // _TILE_ROWS, _TILE_ROWS, steps, _TILE_ROWS)
    return np.ascontiguousarray(grouped.transpose(0, 3, 1, 4, 2))


def unpack_panels(panels: Array, outputs: int, inputs: int, dtype: Dtype) -> Array:
    """The ``[outputs, inputs]`` that `pack_panels` packed; takes the panels in any shape."""
    words = np.ascontiguousarray(panels).reshape(-1).view(np.uint32)
    count = round_up(outputs, PANEL) // PANEL
    tiles = words.reshape(count, -1, PANEL // _TILE_ROWS, _TILE_ROWS, _TILE_ROWS)
    rows = np.ascontiguousarray(tiles.transpose(0, 2, 4, 1, 3)).reshape(count * PANEL, -1)
    return rows.view(NUMPY_TYPES[dtype])[:outputs, :inputs]


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of finite values in bfloat16, rounded to nearest, ties to even; large ones become infinite."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + (np.uint32(0x7FFF) + odd)) >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The values of bfloat16 bits, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
