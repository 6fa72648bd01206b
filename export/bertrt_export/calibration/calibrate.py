"""From a checkpoint and a text to the scales of its activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np

from bertrt.errors import CalibrationError, InputError
from bertrt.machine import usable_cpus
from bertrt.manifest import Precision
from bertrt_export.calibration.channels import ChannelRanges, Channels, balance
from bertrt_export.calibration.histogram import Histogram
from bertrt_export.calibration.inputs import DEFAULT_TEXTS, DEFAULT_TOKENS, CalibrationInputs, make_inputs
from bertrt_export.calibration.taps import Taps, open_taps
from bertrt_export.calibration.thresholds import (
    DEFAULT_PERCENTILE,
    METHODS,
    Method,
    entropy_threshold,
    mse_threshold,
    percentile_threshold,
)
from bertrt_export.checkpoints import Checkpoint
from bertrt_export.graph.typed import ActivationScale, FusedQueries
from bertrt_export.quantize import WeightType

# Sequences done since it was last called, and how many there are.
Progress = Callable[[int, int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How scales are found.

    Attributes:
        method: see `bertrt_export.calibration.thresholds`; ``max`` cuts nothing off.
        alpha: see `bertrt_export.calibration.channels.balance`, from 0 to 1, or ``None``.
        shift: whether the channels are moved; for int8 only, as the steps of fp8 are finest beside zero.
        percentile: of the method of that name, above 0, at most 100.

    Raises:
        InputError: a value out of range.
    """

    method: Method = "max"
    alpha: float | None = None
    shift: bool = False
    percentile: float = DEFAULT_PERCENTILE

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"the method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise InputError(f"alpha must be from 0 to 1, got {self.alpha}")
        if not 0 < self.percentile <= 100:
            raise InputError(f"the percentile must be above 0 and at most 100, got {self.percentile}")


_INT8_ALPHA: Final = 0.85


def default_recipe(kind: WeightType, method: Method | None = None) -> Recipe:
    """The recipe that drifts least, of all or of a method's."""
    method = "max" if method is None else method
    if kind == "fp8":
        return Recipe(method=method)
    return Recipe(method=method, alpha=_INT8_ALPHA, shift=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Scales, and how they were found.

    Attributes:
        precision: ``int8`` or ``fp8``.
        recipe: see `Recipe`.
        scales: of the input of each product that the precision quantises.
        text: its name.
        text_sha256: in hexadecimal, or ``None`` for random tokens.
        texts: that were read, or windows of them; none for random tokens.
        sequences: that were run.
        tokens: of them all, special tokens included.
        max_texts: see `make_inputs`, as all that follow: with them and the text it can be done again.
        max_tokens: of a sequence.
        seed: of the masks and the random tokens.
    """

    precision: WeightType
    recipe: Recipe
    scales: dict[str, ActivationScale]
    text: str
    text_sha256: str | None
    texts: int
    sequences: int
    tokens: int
    max_texts: int
    max_tokens: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """What the manifest keeps: all but the channels' shifts and divisors, which are among the weights."""
        recipe = self.recipe
        return {
            "method": recipe.method,
            **({"percentile": recipe.percentile} if recipe.method == "percentile" else {}),
            "precision": self.precision,
            "alpha": recipe.alpha,
            "shift": recipe.shift,
            "text": self.text,
            "text_sha256": self.text_sha256,
            "texts": self.texts,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "max_texts": self.max_texts,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "scales": {product: scale.scale for product, scale in self.scales.items()},
        }


def calibrate(
    checkpoint: Checkpoint,
    text: Path | str | None,
    *,
    precision: Precision,
    method: Method | None = None,
    recipe: Recipe | None = None,
    max_texts: int = DEFAULT_TEXTS,
    max_tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Find the scales of the activations.

    The float32 encoder runs over the texts once to find the ranges of the channels, and, for every method but ``max``,
    once more for histograms of the channels as they are after they were moved and divided. No more than one batch's
    activations are in memory at a time.

    Args:
        checkpoint: an open checkpoint.
        text: a file (``Path``) or the text itself (``str``), a text a line; see `make_inputs`. ``None`` for random
            weights.
        precision: ``int8`` or ``fp8``.
        method: with the best recipe of that method; by default the best of all.
        recipe: instead of ``method``, in every detail.
        max_texts: the first so many are used; the most sequences that are run.
        max_tokens: of each, special tokens included; longer ones are cut into several.
        seed: of the masks and the random tokens.
        threads: by default the CPUs that the process may use.
        progress: called with the number of sequences done since it was last called, and the number of them all; one
            that is run twice is done after the second time.

    Raises:
        CalibrationError: a precision without scales, too little text, or activations that are not finite.
        InputError: a value out of range, or a text that is not there.
        EmptyTextError: a text of blank lines.
        TextEncodingError: a text that is not UTF-8.
        CheckpointError: a tensor is missing, or not finite.
    """
    kind = _kind(precision)
    if recipe is not None and method is not None:
        raise InputError("a method was given and a recipe too, which says the method; give one of the two")
    if threads is not None and threads < 1:
        raise InputError(f"threads must be 1 or more, got {threads}")
    recipe = recipe or default_recipe(kind, method)
    if recipe.shift and kind == "fp8":
        raise InputError(
            "fp8 has its finest steps beside zero, so its channels are not moved; leave shift out"
        )
    inputs = make_inputs(checkpoint, text, max_texts=max_texts, max_tokens=max_tokens, seed=seed)
    passes = 1 if recipe.method == "max" else 2
    count = _Counter(progress, passes, len(inputs.sequences))
    with open_taps(checkpoint, threads=threads or usable_cpus()) as taps:
        ranges = _ranges(taps, inputs, count)
        channels = _balance(checkpoint, ranges, kind, recipe)
        histograms = _histograms(taps, inputs, channels, kind, count) if passes == 2 else {}
    scales = {
        product: how.scale(kind, _threshold(how, histograms.get(product), kind, recipe))
        for product, how in channels.items()
    }
    return Calibration(
        precision=kind,
        recipe=recipe,
        scales=scales,
        text=inputs.name,
        text_sha256=inputs.sha256,
        texts=inputs.texts,
        sequences=len(inputs.sequences),
        tokens=inputs.tokens,
        max_texts=max_texts,
        max_tokens=max_tokens,
        seed=seed,
    )


def _kind(precision: Precision) -> WeightType:
    if precision == "int8" or precision == "fp8":
        return precision
    raise CalibrationError(
        f"precision {precision!r} has no scales to calibrate; expected {' or '.join(get_args(WeightType))}"
    )


class _Counter:
    """Tells how many sequences are done, where each is run once or twice."""

    def __init__(self, progress: Progress | None, passes: int, total: int) -> None:
        self._progress = progress
        self._total = total
        self._passes = passes
        self._runs = 0

    def add(self, runs: int) -> None:
        before, self._runs = self._runs, self._runs + runs
        if self._progress:
            self._progress(self._runs // self._passes - before // self._passes, self._total)


def _ranges(taps: Taps, inputs: CalibrationInputs, count: _Counter) -> dict[str, ChannelRanges]:
    ranges = {product: ChannelRanges(product, width) for product, width in taps.channels.items()}
    for batch in taps.batches(inputs.sequences):
        for product, rows in taps.run(batch):
            ranges[product].add(rows)
        count.add(len(batch))
    return ranges


def _balance(
    checkpoint: Checkpoint, ranges: Mapping[str, ChannelRanges], kind: WeightType, recipe: Recipe
) -> dict[str, Channels]:
    weights = FusedQueries(checkpoint, checkpoint.architecture)
    return {
        product: balance(
            found,
            np.abs(weights.tensor(f"{product}.weight")).max(axis=0),
            kind,
            alpha=recipe.alpha,
            shift=recipe.shift,
        )
        for product, found in ranges.items()
    }


def _histograms(
    taps: Taps,
    inputs: CalibrationInputs,
    channels: Mapping[str, Channels],
    kind: WeightType,
    count: _Counter,
) -> dict[str, Histogram]:
    histograms = {product: Histogram() for product in channels}
    # The shift as it is if nothing is cut off; that of a finer scale differs by less than one step.
    scales = {product: how.scale(kind, how.largest) for product, how in channels.items()}
    for batch in taps.batches(inputs.sequences):
        for product, rows in taps.run(batch):
            scale = scales[product]
            if scale.shift is not None:
                rows -= scale.shift
            if scale.smoothing is not None:
                rows *= np.float32(1) / scale.smoothing
            histograms[product].add(np.abs(rows, out=rows))
        count.add(len(batch))
    return histograms


def _threshold(how: Channels, histogram: Histogram | None, kind: WeightType, recipe: Recipe) -> float:
    # A tensor of zeros has no threshold but that which its channels were given.
    if histogram is None or not histogram.width:
        return how.largest
    counts, width = histogram.counts, histogram.width
    match recipe.method:
        case "percentile":
            found = percentile_threshold(counts, width, recipe.percentile)
        case "entropy":
            found = entropy_threshold(counts, width, kind)
        case _:
            found = mse_threshold(counts, width, kind)
    # A bin reaches further than what is in it.
    return min(found, histogram.largest, how.largest)
