"""Results on their way from a GPU to arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt

from bertrt.backends.cuda.objects import Event, PinnedBuffer, Stream, aligned

Array = npt.NDArray[Any]
# Where in the pinned piece, from which address of the device, into which bytes.
_Copy = tuple[int, int, Array]


class Downloads:
    """Copies from the device to arrays, through two pieces of pinned memory in turn.

    Args:
        stream: behind whose work the copies are.
        piece: bytes of each; less does for less.
        made: to which is added what has to be given back.
    """

    def __init__(self, stream: Stream, piece: int, made: ExitStack) -> None:
        self._stream = stream
        self._size = aligned(piece)
        self._pieces: list[tuple[PinnedBuffer, Event]] = []
        for _ in range(2):
            pinned = PinnedBuffer(self._size)
            made.callback(pinned.close)
            event = Event()
            made.callback(event.close)
            self._pieces.append((pinned, event))

    def fetch(self, wanted: Sequence[tuple[int, Array]]) -> None:
        """Fill arrays with what lies at addresses of the device, and wait until they are full."""
        previous: tuple[int, list[_Copy]] | None = None
        for number, copies in enumerate(self._loads(wanted)):
            pinned, event = self._pieces[number % 2]
            for place, address, target in copies:
                self._stream.copy(pinned.address + place, address, len(target))
            event.record(self._stream)
            if previous:
                self._empty(*previous)
            previous = number, copies
        if previous:
            self._empty(*previous)

    def _empty(self, number: int, copies: Sequence[_Copy]) -> None:
        pinned, event = self._pieces[number % 2]
        event.synchronize()
        for place, _, target in copies:
            target[...] = pinned.array(np.uint8, len(target), place)

    def _loads(self, wanted: Sequence[tuple[int, Array]]) -> Iterator[list[_Copy]]:
        """The copies, as many as a piece holds at a time."""
        load: list[_Copy] = []
        place = 0
        for address, array in wanted:
            whole = array.reshape(-1).view(np.uint8)
            begin = 0
            while begin < len(whole):
                if place == self._size:
                    yield load
                    load, place = [], 0
                count = min(len(whole) - begin, self._size - place)
                load.append((place, address + begin, whole[begin : begin + count]))
                begin, place = begin + count, aligned(place + count)
        if load:
            yield load
