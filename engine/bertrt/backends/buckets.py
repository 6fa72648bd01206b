"""Length buckets: the few shapes in which blocks are run on a GPU, so that what is prepared for a shape is used again.

A block of ``b`` sequences of at most ``l`` tokens is padded to a step of a ladder in both directions, within a profile:

- tokens of a sequence: multiples of 16 to 128, of 32 to 256, of 64 beyond. From 65 tokens on less than a fifth is
  padding.
- sequences: powers of two and the halves between them (1, 2, 3, 4, 6, 8, 12, ...). Less than a third is padding.
- In both directions the least, the best and the most of the profile are steps too; nothing is smaller than its least.
"""

from __future__ import annotations

import bisect
import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np

from bertrt.architecture import BertArchitecture
from bertrt.backends.base import Int64, Wanted
from bertrt.backends.padded import BlockLimits, PaddedBlock
from bertrt.backends.parts import PartsExecutor, PartsRunner
from bertrt.errors import SequenceTooLongError
from bertrt.plans import Profile, Shape

# A block of so few tokens leaves most of a GPU idle: to cut it further, or to spread it over several, gains nothing.
_SMALL: Final = 1024
# Up to a length the tokens of a sequence are padded to multiples of a step; the last step has no end.
_STEPS: Final = ((128, 16), (256, 32), (None, 64))
# A profile that is tuned for a nearer shape is taken if its block is at most this much larger.
_MORE: Final = 1.25


class Buckets:
    """The shapes of a plan, or of whatever runs fixed shapes.

    Args:
        profiles: between whose ``least`` and ``most`` the shapes lie; at least one.
        rebuild: the command that would make more profiles, for the message to whom none is long enough.
    """

    def __init__(self, profiles: Sequence[Profile], *, rebuild: str) -> None:
        self._profiles = tuple(profiles)
        self._rebuild = rebuild
        self._ladders = [
            (
                _ladder(_sequence_steps(profile.most[0]), profile, 0),
                _ladder(_token_steps(profile.most[1]), profile, 1),
            )
            for profile in self._profiles
        ]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that a profile holds."""
        return max(profile.most[1] for profile in self._profiles)

    def limits(self, *, workers: int = 1) -> BlockLimits:
        """The largest block of any profile.

        Profiles need not be a grid: one may hold many short sequences, another one long one. A block of many long ones
        is within these limits, and is cut by `BucketRunner`.
        """
        return BlockLimits(
            small=_SMALL,
            sequences=max(profile.most[0] for profile in self._profiles),
            tokens=max(profile.most[0] * profile.most[1] for profile in self._profiles),
            workers=workers,
        )

    def shape(self, sequences: int, longest: int) -> Shape | None:
        """The shape in which a block is run; ``None`` if no profile holds so many sequences of that length.

        Raises:
            SequenceTooLongError: no profile holds even one.
        """
        self.most_sequences(longest)
        shapes = {
            (batches[bisect.bisect_left(batches, sequences)], lengths[bisect.bisect_left(lengths, longest)])
            for batches, lengths in self._ladders
            if sequences <= batches[-1] and longest <= lengths[-1]
        }
        if not shapes:
            return None
        fewest = min(map(math.prod, shapes))
        near = [shape for shape in shapes if math.prod(shape) <= _MORE * fewest]
        return min(near, key=lambda shape: (_distance(self._nearest(shape), shape), math.prod(shape), shape))

    def most_sequences(self, longest: int) -> int:
        """The most sequences of this length in one block.

        Raises:
            SequenceTooLongError: no profile holds even one.
        """
        most = max((profile.most[0] for profile in self._profiles if longest <= profile.most[1]), default=0)
        if not most:
            one = Profile((1, 1), (1, longest), (1, longest))
            options = " ".join(f"--profile {profile}" for profile in (*self._profiles, one))
            raise SequenceTooLongError(
                f"a sequence has {longest} tokens, the plan's profiles hold at most {self.longest}; cut it, or build "
                f"the plan for it with: {self._rebuild} {options}"
            )
        return most

    def holds(self, shape: Shape) -> bool:
        """Whether a shape can be run as it is."""
        return any(profile.holds(shape) for profile in self._profiles)

    def profile(self, shape: Shape) -> int:
        """Which profile runs a shape that `shape` gave: the one tuned for the nearest shape, then the smallest."""
        return self._profiles.index(self._nearest(shape))

    def _nearest(self, shape: Shape) -> Profile:
        able = (profile for profile in self._profiles if profile.holds(shape))
        return min(able, key=lambda profile: (_distance(profile, shape), math.prod(profile.most)))


class BucketRunner(PartsRunner):
    """Runs blocks that no profile holds as several that one does: a `bertrt.backends.padded.BlockRunner`."""

    def __init__(self, executor: PartsExecutor, architecture: BertArchitecture, buckets: Buckets) -> None:
        super().__init__(executor, architecture)
        self._buckets = buckets

    def shape(self, sequences: int, longest: int) -> Shape:
        """The bucket; without padding for a block that will be cut.

        Raises:
            SequenceTooLongError: no profile holds even one such sequence.
        """
        return self._buckets.shape(sequences, longest) or (sequences, longest)

    def run(self, block: PaddedBlock, wanted: Wanted, names: Sequence[str]) -> dict[str, Any]:
        """See `bertrt.backends.padded.BlockRunner.run`."""
        sequences = block.shape[0]
        if self._buckets.holds(block.shape):
            return super().run(block, wanted, names)
        results: dict[str, Any] = {}
        lengths, begin = block.real.sum(axis=1), 0
        while begin < sequences:
            longest = int(lengths[begin:].max())
            end = min(begin + self._buckets.most_sequences(longest), sequences)
            piece = _rows(block, begin, end, self.shape(end - begin, longest))
            _gather(results, super().run(piece, wanted, names), block, begin, end)
            begin = end
        return results


def row_bucket(rows: int, most: int) -> int:
    """To how many rows those of a head are padded: a power of two, or ``most``, which ``rows`` does not exceed."""
    return min(1 << (rows - 1).bit_length(), most)


def pad_rows(values: Int64, rows: int) -> Int64:
    """As many rows; those that are added are 0."""
    padded = np.zeros((rows, *values.shape[1:]), np.int64)
    padded[: len(values)] = values
    return padded


def _rows(block: PaddedBlock, begin: int, end: int, shape: Shape) -> PaddedBlock:
    """Some sequences of a block, in another shape."""
    columns = min(block.shape[1], shape[1])
    piece = copy.copy(block)
    piece.sequences = block.sequences[begin:end]
    for name in ("real", "ids", "segments"):
        whole = getattr(block, name)
        part = np.zeros(shape, whole.dtype)
        part[: end - begin, :columns] = whole[begin:end, :columns]
        setattr(piece, name, part)
    row, column = np.divmod(block.positions, block.shape[1])
    inside = (begin <= row) & (row < end)
    piece.chosen = block.chosen[inside]
    piece.positions = (row[inside] - begin) * shape[1] + column[inside]
    return piece


def _gather(results: dict[str, Any], found: dict[str, Any], block: PaddedBlock, begin: int, end: int) -> None:
    """Put what was found for some of a block's sequences into the places of the whole block."""
    row = block.positions // block.shape[1]
    chosen = np.flatnonzero((begin <= row) & (row < end))
    for name, values in found.items():
        whole = results.get(name)
        if name == "hidden_states":
            if whole is None:
                whole = np.zeros((*block.shape, values.shape[-1]), values.dtype)
            columns = min(block.shape[1], values.shape[1])
            whole[begin:end, :columns] = values[: end - begin, :columns]
        elif name in {"pooled", "nsp_logits"}:
            if whole is None:
                whole = np.empty((len(block.sequences), values.shape[-1]), values.dtype)
            whole[begin:end] = values[: end - begin]
        else:
            if whole is None:
                whole = np.empty((len(block.chosen), values.shape[-1]), values.dtype)
            whole[chosen] = values
        results[name] = whole


def _ladder(steps: Iterable[int], profile: Profile, axis: int) -> list[int]:
    least, best, most = profile.least[axis], profile.best[axis], profile.most[axis]
    return sorted({least, best, most, *(step for step in steps if least <= step <= most)})


def _sequence_steps(most: int) -> Iterable[int]:
    power = 1
    while power <= most:
        yield power
        yield power * 3 // 2
        power *= 2


def _token_steps(most: int) -> Iterable[int]:
    tokens = 0
    for end, step in _STEPS:
        while tokens < (most if end is None else min(end, most)):
            tokens += step
            yield tokens


def _distance(profile: Profile, shape: Shape) -> float:
    """How many doublings lie between a shape and the one that a profile is tuned for."""
    return sum(abs(math.log2(size / best)) for size, best in zip(shape, profile.best, strict=True))
