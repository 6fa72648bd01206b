"""Calibration as a whole, against activations that PyTorch gives for one text at a time."""

from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch

from bertrt.errors import CalibrationError, InputError
from bertrt_export.calibration import (
    DEFAULT_TEXTS,
    DEFAULT_TOKENS,
    METHODS,
    Calibration,
    Recipe,
    calibrate,
    default_recipe,
    taps,
)
from bertrt_export.calibration.channels import ChannelRanges
from bertrt_export.calibration.inputs import CalibrationInputs, make_inputs
from bertrt_export.checkpoints import Checkpoint, open_checkpoint
from bertrt_export.checkpoints.random_weights import RANDOM_MODELS
from bertrt_export.graph.emitter import WeightFile
from bertrt_export.graph.parts import build_part

# Of very different lengths, so that most of a batch of them is padding.
TEXT = "\n".join(["a", "b c d", "e f g h i j k l m n o p q r s t", "u v", "w x y z a b c d e f", *"ghijk"])
LAYERS = 3
PRODUCTS = [
    f"encoder.layer.{layer}.{part}"
    for layer in range(LAYERS)
    for part in ("attention.self.qkv", "attention.output.dense", "intermediate.dense", "output.dense")
]
Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def model(small_bert: Any) -> Any:
    return small_bert()


@pytest.fixture(scope="module")
def checkpoint(model: Any, save_checkpoint: Any) -> Iterator[Checkpoint]:
    with open_checkpoint(save_checkpoint(model)) as opened:
        yield opened


@pytest.fixture(scope="module")
def inputs(checkpoint: Checkpoint) -> CalibrationInputs:
    return make_inputs(checkpoint, TEXT, max_texts=1000, max_tokens=128, seed=0)


@pytest.fixture(scope="module")
def activations(model: Any, inputs: CalibrationInputs) -> dict[str, Array]:
    """What enters each product, from PyTorch, one sequence at a time: no padding anywhere."""
    rows: dict[str, list[Array]] = {name: [] for name in PRODUCTS}
    hooks = []
    for name in PRODUCTS:
        module = model.bert.get_submodule(name.replace("qkv", "query"))

        def keep(module: Any, arguments: tuple[torch.Tensor], name: str = name) -> None:
            rows[name].append(arguments[0][0].numpy().copy())

        hooks.append(module.register_forward_pre_hook(keep))
    with torch.inference_mode():
        for sequence in inputs.sequences:
            ids, segments = (
                torch.from_numpy(values.astype(np.int64))[None]
                for values in (sequence.input_ids, sequence.token_type_ids)
            )
            model.bert(input_ids=ids, token_type_ids=segments)
    for hook in hooks:
        hook.remove()
    return {name: np.concatenate(values) for name, values in rows.items()}


def calibrated(
    checkpoint: Checkpoint, recipe: Recipe, precision: Any = "int8", **options: Any
) -> Calibration:
    return calibrate(checkpoint, TEXT, precision=precision, recipe=recipe, threads=2, **options)


def test_padding_is_not_counted(
    checkpoint: Checkpoint, inputs: CalibrationInputs, activations: dict[str, Array]
) -> None:
    ranges = {}
    with taps.open_taps(checkpoint, threads=2) as opened:
        assert list(opened.channels) == PRODUCTS
        [batch] = opened.batches(inputs.sequences)
        lengths = [len(sequence.input_ids) for sequence in batch]
        assert len(lengths) * max(lengths) > 2 * sum(lengths)
        for product, rows in opened.run(batch):
            assert rows.shape == activations[product].shape
            ranges[product] = ChannelRanges(product, rows.shape[1])
            ranges[product].add(rows)
    for product, values in activations.items():
        # Sums of at most 40 float32 terms in another order, through 3 layers.
        scale = np.abs(values).max()
        np.testing.assert_allclose(ranges[product].lowest, values.min(axis=0), atol=2e-5 * scale)
        np.testing.assert_allclose(ranges[product].highest, values.max(axis=0), atol=2e-5 * scale)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("method", ["max", "percentile"])
def test_scales_are_those_of_pytorchs_activations(
    precision: Any, method: Any, checkpoint: Checkpoint, activations: dict[str, Array]
) -> None:
    found = calibrated(checkpoint, Recipe(method=method, percentile=99.0), precision)
    assert list(found.scales) == PRODUCTS
    largest = {"int8": 127, "fp8": 448}[precision]
    for product, values in activations.items():
        scale = found.scales[product]
        assert (scale.shift, scale.smoothing) == (None, None)
        magnitudes = np.abs(values)
        percentile = 100.0 if method == "max" else 99.0
        # As above; a percentile lies between two of the values, and is besides known to a bin only.
        below, above = (np.percentile(magnitudes, percentile, method=side) for side in ("lower", "higher"))
        # A scale is rounded to float16.
        slack = (2e-5 + 2**-11) * above + (0 if method == "max" else magnitudes.max() / 2048)
        assert below - slack <= scale.scale * largest <= above + slack


def test_moved_channels_fill_the_range_and_keep_zero(
    checkpoint: Checkpoint, activations: dict[str, Array]
) -> None:
    found = calibrated(checkpoint, default_recipe("int8"))
    for product, values in activations.items():
        scale = found.scales[product]
        assert scale.shift is not None
        assert scale.smoothing is not None
        steps = (values - scale.shift) / scale.smoothing / scale.scale
        # A scale is rounded to float16.
        assert 126 * (1 - 2**-11) < np.abs(steps).max() < 127.01 * (1 + 2**-11)
        zero = scale.shift / scale.smoothing / scale.scale
        np.testing.assert_allclose(zero, np.rint(zero), atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_small_batches_give_the_same_scales(
    method: Any, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(method=method, alpha=0.5, shift=True)
    whole = calibrated(checkpoint, recipe)
    # A token of this model has 3 * (3 * 24 + 40) tapped values: batches of one or two sequences.
    monkeypatch.setattr(taps, "_VALUES_AT_ONCE", 336 * 20)
    done: list[int] = []
    totals: set[int] = set()

    def count(sequences: int, total: int) -> None:
        done.append(sequences)
        totals.add(total)

    streamed = calibrated(checkpoint, recipe, progress=count)
    assert len(done) > 10
    # Every sequence is counted once, whether it was run once or twice; how many come is known from the first on.
    assert sum(done) == streamed.sequences == whole.sequences
    assert totals == {whole.sequences}
    for product, scale in whole.scales.items():
        # Products of other shapes add up in another order; a value on the border of a bin may change its place, and
        # with it a threshold by one of the 128 that are tried. Otherwise it may become the next float16.
        tolerance = 2**-10 if method in {"max", "percentile"} else 0.02
        assert streamed.scales[product].scale == pytest.approx(scale.scale, rel=tolerance)


def test_methods_cut_off_what_is_rare(checkpoint: Checkpoint) -> None:
    found = {
        method: calibrated(checkpoint, Recipe(method=method, percentile=99.0)).scales for method in METHODS
    }
    for product, scale in found["max"].items():
        for method in METHODS:
            # float32 rounding only: a threshold is never beyond the largest value.
            assert found[method][product].scale <= scale.scale * (1 + 1e-6)
    for method in ("percentile", "mse"):
        assert any(found[method][product].scale < 0.95 * found["max"][product].scale for product in PRODUCTS)


def test_the_engine_can_be_built_and_the_manifest_can_hold_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = calibrated(checkpoint, default_recipe("int8"))
    weights = WeightFile(tmp_path / "weights")
    encoder = build_part(checkpoint, weights, "encoder", precision="int8", scales=found.scales)
    weights.close()
    operators = [node.op_type for node in encoder.model.graph.node]
    assert operators.count("QuantizeLinear") == len(found.scales) == 4 * LAYERS
    facts = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert facts == found.to_json()
    assert facts["scales"] == {product: scale.scale for product, scale in found.scales.items()}
    assert (facts["method"], facts["precision"], facts["text"]) == ("max", "int8", "text")
    assert (facts["texts"], facts["sequences"], facts["seed"]) == (10, 40, 0)
    assert (facts["max_texts"], facts["max_tokens"]) == (DEFAULT_TEXTS, DEFAULT_TOKENS)
    few = calibrated(checkpoint, default_recipe("int8"), max_texts=9, max_tokens=8)
    facts = few.to_json()
    # With what it says it can be done again.
    again = {name: facts[name] for name in ("max_texts", "max_tokens", "seed")}
    assert (again, facts["sequences"]) == ({"max_texts": 9, "max_tokens": 8, "seed": 0}, 9)
    assert calibrated(checkpoint, default_recipe("int8"), **again).to_json() == facts
    assert "percentile" not in facts
    percentile = calibrated(checkpoint, Recipe(method="percentile", percentile=99.5)).to_json()
    assert percentile["percentile"] == 99.5


def test_random_weights_need_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    base = RANDOM_MODELS["bert-base-cased"]
    tiny = dataclasses.replace(
        base, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=300
    )
    monkeypatch.setitem(RANDOM_MODELS, "tiny", tiny)  # type: ignore[arg-type] # a dictionary behind its protocol
    with open_checkpoint("tiny", random=True) as checkpoint:
        found = calibrate(checkpoint, None, precision="int8", threads=2)
        again = calibrate(checkpoint, None, precision="int8", threads=2)
    assert (found.text, found.text_sha256, found.texts, found.sequences) == ("random tokens", None, 0, 16)
    assert found.to_json() == again.to_json()
    assert len(found.scales) == 8


def test_what_overflows_float32_is_named(small_bert: Any, save_checkpoint: Any) -> None:
    model = small_bert()
    with torch.no_grad():
        # Finite, and so are all products with it; the sum of two is not.
        model.bert.encoder.layer[1].intermediate.dense.weight.fill_(3e38)
    with open_checkpoint(save_checkpoint(model)) as checkpoint:
        before = set(Path(tempfile.gettempdir()).glob("bertrt-calibration-*"))
        with pytest.raises(CalibrationError, match=r"the input of 'encoder\.layer\.1\.output\.dense' is NaN"):
            calibrate(checkpoint, TEXT, precision="int8", threads=2)
        gc.collect()
        # The graph and its weights are gone.
        assert set(Path(tempfile.gettempdir()).glob("bertrt-calibration-*")) <= before


def test_a_run_that_fails(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("bad allocation")

    with taps.open_taps(checkpoint, threads=1) as opened:
        [batch] = opened.batches(make_inputs(checkpoint, TEXT, max_texts=10, max_tokens=16, seed=0).sequences)
        opened._session = SimpleNamespace(run=fail)
        message = "failed on 10 sequences of up to 16 tokens: bad allocation; calibrate with fewer tokens"
        with pytest.raises(CalibrationError, match=message):
            list(opened.run(batch))


def test_a_graph_that_cannot_be_loaded(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no Attention(23)")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    message = r"onnxruntime [\d.]+ cannot load the float32 graph: no Attention\(23\); update onnxruntime"
    with pytest.raises(CalibrationError, match=message), taps.open_taps(checkpoint, threads=1):
        pass


def test_no_room_for_the_graph(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(taps, "build_part", full)
    with pytest.raises(CalibrationError, match="No space left on device; make room there, or set TMPDIR"):
        calibrate(checkpoint, TEXT, precision="int8")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "fp16"}, CalibrationError, "precision 'fp16' has no scales.*expected int8 or fp8"),
        ({"threads": 0}, InputError, "threads must be 1 or more, got 0"),
        ({"method": "max", "recipe": Recipe()}, InputError, "a method was given and a recipe too"),
        ({"precision": "fp8", "recipe": Recipe(shift=True)}, InputError, "its channels are not moved"),
        (
            {"method": "best"},
            InputError,
            "the method must be one of max, percentile, entropy, mse, got 'best'",
        ),
    ],
)
def test_arguments_that_do_not_fit(
    checkpoint: Checkpoint, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        calibrate(checkpoint, TEXT, **{"precision": "int8", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha must be from 0 to 1, got 1.5"),
        ({"alpha": float("nan")}, "alpha must be from 0 to 1, got nan"),
        ({"percentile": 0.0}, "percentile must be above 0 and at most 100, got 0"),
        ({"percentile": 100.1}, "percentile must be above 0 and at most 100, got 100.1"),
    ],
)
def test_recipes_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(**options)
