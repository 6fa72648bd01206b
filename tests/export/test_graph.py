"""The graphs against PyTorch: every activation, dialect and precision, with padding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from onnx.reference import ReferenceEvaluator

from bertrt.errors import ExportError
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.exporter import export_engine
from bertrt_export.graph import model as graph_model
from bertrt_export.graph.dialects import LOWEST, MASKED
from bertrt_export.quantize import quantize_per_channel

DIALECTS = ("ort", "onnx")
Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def inputs() -> Arrays:
    """Three rows: full, half padded, one real token."""
    generator = np.random.default_rng(0)
    mask = np.ones((3, 11), np.int64)
    mask[1, 6:] = 0
    mask[2, 1:] = 0
    return {
        "input_ids": generator.integers(0, 97, (3, 11)),
        "attention_mask": mask,
        "token_type_ids": generator.integers(0, 2, (3, 11)),
    }


def run_torch(model: transformers.BertForPreTraining, inputs: Arrays) -> Arrays:
    with torch.inference_mode():
        outputs = model(
            **{name: torch.from_numpy(values) for name, values in inputs.items()}, output_hidden_states=True
        )
        pooled = model.bert.pooler(outputs.hidden_states[-1])
    return {
        "logits": outputs.prediction_logits.numpy(),
        "seq_relationship_logits": outputs.seq_relationship_logits.numpy(),
        "last_hidden_state": outputs.hidden_states[-1].numpy(),
        "pooler_output": pooled.numpy(),
    }


def run_onnx(path: Path, inputs: Arrays) -> Arrays:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def export(folder: Path, out: Path, **options: Any) -> Path:
    with open_checkpoint(folder) as checkpoint:
        export_engine(checkpoint, out, **options)
    return out


def assert_close(found: Arrays, expected: Arrays, mask: np.ndarray[Any, Any], tolerance: float) -> None:
    """Largest error over real tokens, relative to the largest value."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        ours = found[name]
        if values.ndim == 3:
            ours, values = ours[mask == 1], values[mask == 1]
        scale = max(1.0, float(np.abs(values).max()))
        assert np.abs(ours - values).max() / scale < tolerance, name


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("tied", [True, False])
def test_fp32_is_pytorch(
    dialect: str,
    activation: str,
    tied: bool,
    inputs: Arrays,
    small_bert: Any,
    save_checkpoint: Any,
    tmp_path: Path,
) -> None:
    model = small_bert(hidden_act=activation, tie_word_embeddings=tied)
    if not tied:
        with torch.no_grad():
            model.cls.predictions.decoder.weight.copy_(torch.randn_like(model.cls.predictions.decoder.weight))
    engine = export(save_checkpoint(model), tmp_path / "engine", precision="fp32", dialect=dialect)
    # Sums of at most 40 float32 terms in another order, through 3 layers: some tens of units in the last place.
    assert_close(
        run_onnx(engine / "model.onnx", inputs), run_torch(model, inputs), inputs["attention_mask"], 2e-5
    )


@pytest.mark.parametrize("dialect", DIALECTS)
def test_fp16_is_pytorch_with_rounded_weights(
    dialect: str, inputs: Arrays, small_bert: Any, save_checkpoint: Any, tmp_path: Path
) -> None:
    model = small_bert()
    engine = export(save_checkpoint(model), tmp_path / "engine", precision="fp16", dialect=dialect)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if parameter.ndim == 2 and "position" not in name and "token_type" not in name:
                parameter.copy_(parameter.half().float())
    # Activations are rounded to 11 bits at the products: half a unit each, through 3 layers of 6 products, adding
    # up at random, and never more than 2^-11 times a few tens.
    assert_close(
        run_onnx(engine / "model.onnx", inputs),
        run_torch(rounded, inputs),
        inputs["attention_mask"],
        2**-11 * 20,
    )


class QuantizedLinear(torch.nn.Module):
    """``torch.nn.Linear`` with the int8 scheme written down plainly: weights by row, activations by token."""

    def __init__(self, linear: torch.nn.Linear, *, after_gelu: bool = False) -> None:
        super().__init__()
        self.after_gelu = after_gelu
        self.weight = torch.nn.Parameter(round_rows(linear.weight))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = round_above(x) if self.after_gelu else round_rows(x)
        return torch.nn.functional.linear(rounded, self.weight, self.bias)


def round_rows(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return torch.round(x / scale).clamp(-127, 127) * scale


def round_above(x: torch.Tensor) -> torch.Tensor:
    """239 steps above zero, 16 below, where nothing is lower than -0.1701."""
    scale = (x.amax(-1, keepdim=True) / 239).clamp(min=0.1701 / 16)
    return torch.round(x / scale).clamp(-16, 239) * scale


def quantized_twin(model: transformers.BertForPreTraining) -> transformers.BertForPreTraining:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        words = twin.bert.embeddings.word_embeddings
        words.weight = torch.nn.Parameter(round_rows(words.weight))
        for layer in twin.bert.encoder.layer:
            attention = layer.attention
            for owner, name in (
                (attention.self, "query"),
                (attention.self, "key"),
                (attention.self, "value"),
                (attention.output, "dense"),
                (layer.intermediate, "dense"),
                (layer.output, "dense"),
            ):
                setattr(owner, name, QuantizedLinear(getattr(owner, name), after_gelu=owner is layer.output))
        predictions = twin.cls.predictions
        predictions.decoder = QuantizedLinear(predictions.decoder)
    return twin


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("tied", [True, False])
def test_int8_is_pytorch_with_the_same_rounding(
    dialect: str, tied: bool, inputs: Arrays, small_bert: Any, save_checkpoint: Any, tmp_path: Path
) -> None:
    model = small_bert(tie_word_embeddings=tied)
    engine = export(save_checkpoint(model), tmp_path / "engine", precision="int8", dialect=dialect)
    found = run_onnx(engine / "model.onnx", inputs)
    # A value within a float32 rounding of a half may fall to the other side: one step of 1/127 of its row in one
    # of 24 terms. Without the same scheme the error is that of all terms, which the second check shows.
    assert_close(found, run_torch(quantized_twin(model), inputs), inputs["attention_mask"], 0.01)
    plain = run_torch(model, inputs)["logits"]
    assert np.abs(found["logits"] - plain).max() > 1e-3


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_standard_operators_mean_what_the_onnx_specification_says(
    precision: str, inputs: Arrays, small_bert: Any, save_checkpoint: Any, tmp_path: Path
) -> None:
    """Float16 too: ONNX Runtime computes it in float32 on a CPU, the reference evaluator in float16."""
    model = small_bert()
    engine = export(save_checkpoint(model), tmp_path / "engine", precision=precision, dialect="onnx")
    evaluator = ReferenceEvaluator(str(engine / "model.onnx"))
    found = dict(zip(evaluator.output_names, evaluator.run(None, inputs), strict=True))
    assert_close(
        found,
        run_torch(model, inputs),
        inputs["attention_mask"],
        {"fp32": 2e-5, "fp16": 2**-11 * 20, "int8": 0.1}[precision],
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_row_of_padding_gives_no_nan_and_changes_no_other(
    precision: str, dialect: str, inputs: Arrays, demo_engine: Callable[..., Path]
) -> None:
    path = demo_engine(precision, dialect) / "model.onnx"
    padded = {name: np.concatenate([values, values[:1]]) for name, values in inputs.items()}
    padded["attention_mask"][3] = 0
    alone, beside = run_onnx(path, inputs), run_onnx(path, padded)
    for name, values in beside.items():
        assert np.isfinite(values).all(), name
        # Another number of rows may be another order of sums, hence 1e-4 on logits of some tens.
        np.testing.assert_allclose(values[:3], alone[name], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("part", ["intermediate.dense", "output.dense", "attention.self.value"])
def test_float16_saturates_instead_of_giving_nan(
    part: str, dialect: str, inputs: Arrays, small_bert: Any, save_checkpoint: Any, tmp_path: Path
) -> None:
    model = small_bert()
    with torch.no_grad():
        dense = model.get_submodule(f"bert.encoder.layer.1.{part}")
        # Products beyond float16's 65,504, from weights that float16 can hold.
        dense.weight.mul_(60_000 / dense.weight.abs().max())
    engine = export(save_checkpoint(model), tmp_path / "engine", precision="fp16", dialect=dialect)
    reference = run_torch(model, inputs)
    assert all(np.isfinite(values).all() for values in reference.values())
    with torch.inference_mode():
        states = []
        dense.register_forward_hook(lambda *call: states.append(call[-1]))
        run_torch(model, inputs)
    assert states[0].abs().max() > 65_504, "the case is not the one that was meant"
    results = [run_onnx(engine / "model.onnx", inputs)]
    if dialect == "onnx":
        evaluator = ReferenceEvaluator(str(engine / "model.onnx"))
        results.append(dict(zip(evaluator.output_names, evaluator.run(None, inputs), strict=True)))
    for outputs in results:
        for name, values in outputs.items():
            assert np.isfinite(values).all(), name


def test_activations_have_the_lower_bound_that_int8_relies_on() -> None:
    x = torch.linspace(-10, 10, 2_000_001, dtype=torch.float64)
    functions = {
        "gelu": torch.nn.functional.gelu,
        "gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "relu": torch.relu,
    }
    assert functions.keys() == LOWEST.keys()
    for name, function in functions.items():
        lowest = float(function(x).min())
        assert LOWEST[name] <= lowest < LOWEST[name] + 1e-3


def test_the_mask_is_finite_and_beyond_every_score() -> None:
    mask = np.float32(MASKED)
    largest_score = np.float32(1e30)
    assert np.isfinite(mask - largest_score)
    assert np.isfinite(mask + largest_score)
    assert np.exp((mask + largest_score) - largest_score) == 0


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_graphs_are_valid_fused_and_dynamic(
    precision: str, dialect: str, demo_engine: Callable[..., Path]
) -> None:
    folder = demo_engine(precision, dialect)
    for name in ("model.onnx", "engine.onnx"):
        onnx.checker.check_model(str(folder / name), full_check=True)
        graph = onnx.load(str(folder / name), load_external_data=False).graph
        operators = [node.op_type for node in graph.node]
        attention = "MultiHeadAttention" if dialect == "ort" else "Attention"
        assert operators.count(attention) == 4
        assert "Softmax" not in operators
        shape = graph.input[0].type.tensor_type.shape
        assert [dimension.dim_param for dimension in shape.dim] == ["batch", "sequence"]
        domains = {node.domain for node in graph.node}
        assert domains == ({"", "com.microsoft"} if dialect == "ort" else {""})
    for batch, length in ((1, 1), (1, 512), (5, 3)):
        ids = np.ones((batch, length), np.int64)
        feeds = {"input_ids": ids, "attention_mask": ids, "token_type_ids": 0 * ids}
        assert run_onnx(folder / "model.onnx", feeds)["logits"].shape == (batch, length, 8192)


def test_a_wrong_number_of_fused_nodes_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, save_checkpoint: Any, small_bert: Any
) -> None:
    real = graph_model.count_operators
    monkeypatch.setattr(
        graph_model, "count_operators", lambda graph: {**real(graph), "MultiHeadAttention": 2}
    )
    with pytest.raises(ExportError, match="expected 3 nodes MultiHeadAttention, built 2"):
        export(save_checkpoint(small_bert()), tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_weights_are_stored_once(demo_engine: Callable[..., Path]) -> None:
    parameters = 5_529_090
    for precision, width in (("fp32", 4), ("fp16", 2), ("int8", 1)):
        size = (demo_engine(precision) / "model.onnx_data").stat().st_size
        # Scales, and what stays in float32: biases, LayerNorms, positions, and in int8 the pooler.
        assert size < parameters * width * 1.15 + 600_000 * (width < 4)


def test_quantised_rows_are_within_half_a_step() -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((40, 24)).astype(np.float32)
    weight[3] = 0
    weight[4] *= 1e-40
    weight[5] *= 1e30
    values, scale = quantize_per_channel(weight)
    assert values.dtype == np.int8
    assert values.min() >= -127
    assert (scale > 0).all()
    assert np.isfinite(scale).all()
    ordinary = [row for row in range(40) if row not in {3, 4}]
    assert (np.abs(values[ordinary]).max(axis=1) == 127).all()
    error = np.abs(values.astype(np.float64) * scale[:, None] - weight)
    assert (error <= scale[:, None] * (0.5 + 1e-4)).all()
