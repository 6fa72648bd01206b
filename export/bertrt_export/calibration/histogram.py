"""A histogram of magnitudes whose range grows with what it is given."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from bertrt.backends.base import Float32

BINS: Final = 4096
# Elements that are worked on at once, so that what lies between two steps stays in a core's cache.
_CHUNK: Final = 1 << 16


class Histogram:
    """Counts magnitudes in `BINS` bins from 0 to a power of two.

    The range doubles, by adding up neighbouring bins, until it holds every value. The bins' width is a power of two,
    so that dividing by it rounds nothing: the result is the same in whatever order and batches the values come.

    Attributes:
        counts: ``[BINS] int64``.
        width: of a bin; 0 as long as every value was zero.
        largest: of the magnitudes.
    """

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.width = 0.0
        self.largest = 0.0

    def add(self, values: Float32) -> None:
        """Take in values of any shape, ``float32``, finite and positive or zero."""
        flat = values.reshape(-1)
        for start in range(0, flat.shape[0], _CHUNK):
            self._add(flat[start : start + _CHUNK])

    def _add(self, values: Float32) -> None:
        largest = float(values.max())
        if largest == 0:
            self.counts[0] += values.shape[0]
            return
        self.largest = max(self.largest, largest)
        # The power of two above: 2 ** e for m * 2 ** e with m in [0.5, 1). A bin of less than a subnormal's
        # distance could not be divided by.
        width = max(math.ldexp(1.0, math.frexp(largest)[1]) / BINS, float(np.finfo(np.float32).tiny))
        if not self.width:
            self.width = width
        while self.width < width:
            self.counts[: BINS // 2] = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts[BINS // 2 :] = 0
            self.width *= 2
        indices = (values * np.float32(1 / self.width)).astype(np.intp)
        self.counts += np.bincount(indices, minlength=BINS)
