"""Features: hidden states of every token, or one vector for each text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from bertrt.arguments import check_choice
from bertrt.backends.base import Float32, Int64, Wanted
from bertrt.batching import pack
from bertrt.tasks.context import TaskContext, computed
from bertrt.tokenization import Encoded, Overflow

Pooling = Literal["none", "cls", "mean", "pooler"]
Float64 = npt.NDArray[np.float64]


def features(
    context: TaskContext,
    texts: Sequence[str],
    *,
    pooling: Pooling = "none",
    overflow: Overflow = "error",
    stride: int | None = None,
) -> list[Float32] | Float32:
    """Answer `Engine.features` for a list of texts: a list for ``"none"``, else ``[texts, hidden]``."""
    check_choice(pooling, name="pooling", choices=get_args(Pooling))
    check_choice(overflow, name="overflow", choices=("error", "truncate", "window"))
    if pooling == "pooler":
        context.require("pooler", "features with pooling='pooler'")
    # A quarter of a window: every token has at least an eighth of a window on either side in one of its
    # windows, save at the ends of the text, for a third more work.
    stride = context.stride(stride, default=(context.max_length - 2) // 4)
    encodings = (
        context.tokenizer.encode(texts, max_length=context.max_length, overflow=overflow, stride=stride)
        if texts
        else []
    )
    layouts = [_Layout.of(windows) for windows in encodings]
    if pooling == "none":
        return _stitched(context, layouts)
    return _pooled(context, layouts, pooling)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """How the windows of one text lie over its content tokens.

    Attributes:
        windows: of the text, in order.
        starts: ``[windows] int64``, place of each window's first content token in the text.
        ends: ``[windows] int64``, one past the place of its last.
    """

    windows: Sequence[Encoded]
    starts: Int64
    ends: Int64

    @classmethod
    def of(cls, windows: Sequence[Encoded]) -> _Layout:
        starts = np.array([window.start for window in windows], dtype=np.int64)
        content = np.array([window.content_length for window in windows], dtype=np.int64)
        return cls(windows=windows, starts=starts, ends=starts + content)

    @property
    def tokens(self) -> int:
        """Content tokens of the text and two special tokens."""
        return int(self.ends[-1]) + 2

    def weight(self, number: int) -> float:
        """A window's part in the mean over windows, by its tokens, special tokens included."""
        lengths = self.ends - self.starts + 2
        return float(lengths[number] / lengths.sum())

    def shares(self, number: int) -> Float64:
        """``[tokens of the window]``: each token's part in the stitched row of its place.

        A content token that several windows hold counts in each by an equal part; of the special tokens the
        first window's [CLS] and the last window's [SEP] count.
        """
        places = np.arange(self.starts[number], self.ends[number])
        holders = np.searchsorted(self.starts, places, "right") - np.searchsorted(self.ends, places, "right")
        first, last = float(number == 0), float(number == len(self.windows) - 1)
        return np.concatenate([[first], 1.0 / holders, [last]])


def _stitched(context: TaskContext, layouts: Sequence[_Layout]) -> list[Float32]:
    """``[tokens, hidden]`` per text: one row for each content token and for the two special tokens."""
    hidden = context.architecture.hidden_size
    answers = [np.zeros((layout.tokens, hidden), np.float32) for layout in layouts]
    for text, number, states in _run(context, layouts, Wanted(hidden_states=True)):
        start = layouts[text].starts[number]
        if len(layouts[text].windows) == 1:
            answers[text][:] = states
        else:
            shares = layouts[text].shares(number).astype(np.float32)
            answers[text][start : start + states.shape[0]] += states * shares[:, np.newaxis]
    return answers


def _pooled(context: TaskContext, layouts: Sequence[_Layout], pooling: Pooling) -> Float32:
    """``[texts, hidden]``."""
    # Sums are float64 and taken row by row, so that they depend neither on the batch nor on a BLAS.
    sums = np.zeros((len(layouts), context.architecture.hidden_size), np.float64)
    wanted = Wanted(pooled=True) if pooling == "pooler" else Wanted(hidden_states=True)
    for text, number, rows in _run(context, layouts, wanted):
        layout = layouts[text]
        if pooling == "mean":
            shares = layout.shares(number)[:, np.newaxis]
            sums[text] += np.add.reduce(rows * shares, axis=0) / layout.tokens
        else:
            sums[text] += rows[0] * layout.weight(number)
    return sums.astype(np.float32)


def _run(
    context: TaskContext, layouts: Sequence[_Layout], wanted: Wanted
) -> Iterator[tuple[int, int, Float32]]:
    """Run every window: its text, its number, and its hidden states or (``[1, hidden]``) pooled output."""
    jobs = [
        (text, number, window)
        for text, layout in enumerate(layouts)
        for number, window in enumerate(layout.windows)
    ]
    lengths = [window.input_ids.shape[0] for _, _, window in jobs]
    for indices in context.plan(lengths):
        batch = pack([jobs[index][2] for index in indices])
        output = context.backend.run(batch, wanted)
        rows = computed(output.pooled if wanted.pooled else output.hidden_states)
        offsets = np.arange(indices.shape[0] + 1) if wanted.pooled else batch.offsets
        for index, begin, end in zip(indices, offsets[:-1], offsets[1:], strict=True):
            text, number, _ = jobs[index]
            yield text, number, rows[begin:end]
