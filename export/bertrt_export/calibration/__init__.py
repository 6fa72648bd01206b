"""Calibration: the scales of the activations of int8 and fp8 engines for GPUs, found by running text.

From the top: `calibrate` puts the steps together; `inputs` makes what a model sees of a text; `taps` runs the float32
encoder and shows what enters each product; `channels` moves and divides the channels; `histogram` and `thresholds` are
for the methods that cut off the largest values.
"""

from bertrt_export.calibration.calibrate import Calibration, Recipe, calibrate, default_recipe
from bertrt_export.calibration.inputs import DEFAULT_TEXTS, DEFAULT_TOKENS, default_text
from bertrt_export.calibration.thresholds import METHODS, Method

__all__ = [
    "DEFAULT_TEXTS",
    "DEFAULT_TOKENS",
    "METHODS",
    "Calibration",
    "Method",
    "Recipe",
    "calibrate",
    "default_recipe",
    "default_text",
]
