"""Graphs with a type for every value, against PyTorch: parts, precisions, padding, the limits of float16."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from bertrt.backends.parts import CANDIDATES, TOP_K, part_inputs, part_outputs
from bertrt_export.checkpoints import Checkpoint, open_checkpoint
from bertrt_export.graph.emitter import WeightFile, count_operators
from bertrt_export.graph.parts import PartGraph, build_parts, build_typed_standard
from bertrt_export.graph.twin import float32_twin
from bertrt_export.graph.typed import ActivationScale, FusedQueries

Arrays = dict[str, np.ndarray[Any, Any]]
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
LENGTH = 11


@pytest.fixture(scope="module")
def inputs() -> Arrays:
    """Four rows: full, half padded, one real token, nothing but padding."""
    generator = np.random.default_rng(0)
    mask = np.ones((4, LENGTH), np.int32)
    mask[1, 6:] = 0
    mask[2, 1:] = 0
    mask[3] = 0
    return {
        "input_ids": generator.integers(0, 97, (4, LENGTH)).astype(np.int32),
        "attention_mask": mask,
        "token_type_ids": generator.integers(0, 2, (4, LENGTH)).astype(np.int32),
    }


@pytest.fixture
def build(tmp_path: Path, save_checkpoint: Any) -> Callable[..., Any]:
    """A function that writes the graphs of a model into a folder and opens a session on each one's twin."""
    numbers = iter(range(100))

    def build(
        model: transformers.PreTrainedModel, precision: str, scales: Any = None
    ) -> tuple[Path, dict[str, PartGraph]]:
        folder = tmp_path / f"graphs-{next(numbers)}"
        folder.mkdir()
        with open_checkpoint(save_checkpoint(model)) as checkpoint:
            weights = WeightFile(folder / "model.onnx_data")
            built = build_parts(checkpoint, weights, precision=precision, scales=scales)
            standard = build_typed_standard(checkpoint, weights, precision=precision, scales=scales)
            weights.close()
        for name, graph in {**{name: part.model for name, part in built.items()}, "model": standard}.items():
            (folder / f"{name}.onnx").write_bytes(graph.SerializeToString())
            onnx.checker.check_model(str(folder / f"{name}.onnx"), full_check=True)
        return folder, built

    return build


def run_twin(path: Path, feeds: Arrays) -> Arrays:
    twin = path.with_suffix(".twin.onnx")
    twin.write_bytes(float32_twin(onnx.load(path, load_external_data=False)).SerializeToString())
    session = onnxruntime.InferenceSession(twin, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def run_parts(folder: Path, inputs: Arrays, parts: Any) -> Arrays:
    found = run_twin(folder / "encoder.onnx", inputs)
    tokens = inputs["input_ids"].size
    feeds = {
        "hidden_states": found["hidden_states"].reshape(tokens, -1),
        "mlm_positions": np.arange(tokens),
        "mlm_candidates": np.tile(np.arange(CANDIDATES), (tokens, 1)),
        "pooled_rows": np.arange(0, tokens, LENGTH),
    }
    for part in parts:
        if part != "encoder":
            found |= run_twin(folder / f"{part}.onnx", {name: feeds[name] for name in part_inputs(part)})
    return found


def run_torch(model: transformers.BertForPreTraining, inputs: Arrays) -> Arrays:
    with torch.inference_mode():
        bert = model.bert(**{name: torch.from_numpy(values).long() for name, values in inputs.items()})
        return {
            "hidden_states": bert.last_hidden_state.numpy(),
            "mlm_logits": model.cls.predictions(bert.last_hidden_state).flatten(0, 1).numpy(),
            "pooled": bert.pooler_output.numpy(),
            "nsp_logits": model.cls.seq_relationship(bert.pooler_output).numpy(),
        }


def largest_error(found: Arrays, expected: Arrays, inputs: Arrays) -> float:
    """Largest error at real tokens and sequences, relative to the largest value of each output, at least 1."""
    real = inputs["attention_mask"] == 1
    chosen = {"hidden_states": real, "mlm_logits": real.reshape(-1)}
    return max(
        float(np.abs(found[name][where] - values[where]).max() / max(1.0, np.abs(values[where]).max()))
        for name, values in expected.items()
        for where in [chosen.get(name, real.any(axis=1))]
    )


def constant_scales(built: dict[str, PartGraph]) -> dict[str, ActivationScale]:
    return {name: ActivationScale(scale=float16(0.02)) for name in built["encoder"].inputs}


def float16(number: float) -> float:
    return float(np.float16(number))


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("tied", [True, False])
def test_fp32_parts_are_pytorch(
    activation: str, tied: bool, inputs: Arrays, small_bert: Any, build: Callable[..., Any]
) -> None:
    model = small_bert(hidden_act=activation, tie_word_embeddings=tied)
    if not tied:
        with torch.no_grad():
            model.cls.predictions.decoder.weight.copy_(torch.randn_like(model.cls.predictions.decoder.weight))
    folder, built = build(model, "fp32")
    found = run_parts(folder, inputs, built)
    # Sums of at most 40 float32 terms in another order, through 3 layers: some tens of units in the last place.
    assert largest_error(found, run_torch(model, inputs), inputs) < 2e-5
    log_probs = torch.from_numpy(found["mlm_logits"]).log_softmax(-1)
    best = log_probs.topk(TOP_K)
    np.testing.assert_allclose(found["mlm_top_log_probs"], best.values, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(
        np.take_along_axis(log_probs.numpy(), found["mlm_top_ids"], axis=1), best.values
    )
    np.testing.assert_allclose(found["mlm_candidate_log_probs"], log_probs[:, :CANDIDATES], rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_standard_graph_and_the_parts_agree_and_padding_is_finite(
    precision: str, inputs: Arrays, small_bert: Any, build: Callable[..., Any]
) -> None:
    model = small_bert()
    _, built = build(model, "fp32")
    folder, built = build(model, precision, constant_scales(built))
    found = run_parts(folder, inputs, built)
    standard = run_twin(
        folder / "model.onnx", {name: values.astype(np.int64) for name, values in inputs.items()}
    )
    assert all(np.isfinite(values).all() for values in found.values())
    # The same nodes on the same numbers.
    for ours, theirs in (
        ("hidden_states", "last_hidden_state"),
        ("mlm_logits", "logits"),
        ("pooled", "pooler_output"),
        ("nsp_logits", "seq_relationship_logits"),
    ):
        np.testing.assert_allclose(
            found[ours], standard[theirs].reshape(found[ours].shape), rtol=0, atol=1e-4
        )


# Half a unit of rounding (2^-11, 2^-8) for what enters and leaves each of 4 products and attention, in 3 layers, the
# decoder on top, adding up at random (the square root of some 30), and never more than a few times that.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 2**-11 * 20), ("bf16", 2**-8 * 20)])
def test_narrow_precisions_are_pytorch_but_for_rounding(
    precision: str, tolerance: float, inputs: Arrays, small_bert: Any, build: Callable[..., Any]
) -> None:
    model = small_bert()
    folder, built = build(model, precision)
    error = largest_error(run_parts(folder, inputs, built), run_torch(model, inputs), inputs)
    assert tolerance / 1000 < error < tolerance


def test_fp16_is_the_reference_evaluator_s_own_float16(
    inputs: Arrays, small_bert: Any, build: Callable[..., Any]
) -> None:
    """ONNX's reference carries out float16 operators in float16, sums included: what the twin is nearest to."""
    folder, _ = build(small_bert(), "fp16")
    theirs = ReferenceEvaluator(str(folder / "encoder.onnx")).run(None, inputs)[0]
    ours = run_twin(folder / "encoder.onnx", inputs)["hidden_states"]
    assert np.isfinite(theirs).all()
    real = inputs["attention_mask"] == 1
    # Sums of 24 or 40 float16 terms: the square root of their number in half units each, through 3 layers.
    assert np.abs(ours - theirs)[real].max() < 2**-11 * 60


class QuantizedLinear(torch.nn.Module):
    """``torch.nn.Linear`` with the scheme written down plainly: what is quantised is taken back at once."""

    def __init__(self, linear: torch.nn.Linear, scale: ActivationScale, kind: str) -> None:
        super().__init__()
        self.kind, self.scale = kind, torch.tensor(np.float32(scale.scale))
        width = linear.in_features
        self.shift = torch.zeros(width) if scale.shift is None else torch.from_numpy(scale.shift)
        self.smoothing = torch.ones(width) if scale.smoothing is None else torch.from_numpy(scale.smoothing)
        smooth = linear.weight.detach() * self.smoothing
        largest = {"int8": 127, "fp8": 448}[kind]
        rows = (smooth.abs().amax(1, keepdim=True) / largest).half().float()
        self.weight = self.round((smooth / rows).clamp(-largest, largest)) * rows
        self.bias = linear.bias.detach() + self.weight @ (self.shift / self.smoothing)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "int8":
            return x.round().clamp(-128, 127)
        return torch.from_numpy(x.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32))

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - self.shift) / self.smoothing
        return (self.round(x / self.scale) * self.scale) @ self.weight.T + self.bias


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("smooth", [True, False])
def test_quantised_products_are_what_they_say(
    precision: str, smooth: bool, inputs: Arrays, small_bert: Any, build: Callable[..., Any]
) -> None:
    # One layer: in a second one, what rounding has moved over a border of a step is amplified.
    model = small_bert(num_hidden_layers=1)
    _, built = build(model, "fp32")
    generator = np.random.default_rng(1)
    scales = {}
    for name in built["encoder"].inputs:
        width = 40 if name.endswith("output.dense") and "attention" not in name else 24
        scales[name] = ActivationScale(
            # 8 bits up to about 4, or the 448 of float8 up to about 4.
            scale=float16(0.03 if precision == "int8" else 0.01),
            shift=generator.normal(0, 0.3, width).astype(np.float32) if smooth else None,
            smoothing=generator.uniform(0.5, 2, width).astype(np.float32) if smooth else None,
        )
    folder, built = build(model, precision, scales)
    assert built["encoder"].inputs.keys() == scales.keys()
    twin = copy.deepcopy(model)
    for number, layer in enumerate(twin.bert.encoder.layer):
        name = f"encoder.layer.{number}"
        own, attention = layer.attention.self, f"{name}.attention.self.qkv"
        own.query, own.key, own.value = (
            QuantizedLinear(linear, scales[attention], precision)
            for linear in (own.query, own.key, own.value)
        )
        for holder, product in (
            (layer.attention.output, f"{name}.attention.output.dense"),
            (layer.intermediate, f"{name}.intermediate.dense"),
            (layer.output, f"{name}.output.dense"),
        ):
            holder.dense = QuantizedLinear(holder.dense, scales[product], precision)
    found, expected = run_parts(folder, inputs, built), run_torch(twin, inputs)
    plain = run_torch(model, inputs)
    real = inputs["attention_mask"] == 1

    def noise(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
        return float(np.sqrt(np.mean((ours - theirs)[real] ** 2)))

    # float16 around the products moves a few per cent of the values over the border of a step, which is then a
    # whole step: some half of the quantisation's own noise. A forgotten shift or factor would be many times that.
    quantised, exact = (
        noise(found["hidden_states"], states["hidden_states"]) for states in (expected, plain)
    )
    assert quantised < 0.8 * exact

    # Nothing stands before the first product, so that it is off by float16's roundings only: of 24 weights and
    # activations of some units each, and of the sum.
    inner = onnx.load(folder / "encoder.onnx")
    inner.graph.output.append(
        onnx.helper.make_tensor_value_info(
            "encoder.layer.0.attention.self.qkv/Add:0", TensorProto.FLOAT, ["batch", "sequence", 72]
        )
    )
    onnx.save(inner, folder / "inner.onnx")
    product = run_twin(folder / "inner.onnx", inputs)["encoder.layer.0.attention.self.qkv/Add:0"]
    with torch.inference_mode():
        states = twin.bert.embeddings(
            torch.from_numpy(inputs["input_ids"]).long(), torch.from_numpy(inputs["token_type_ids"]).long()
        )
        own = twin.bert.encoder.layer[0].attention.self
        first = torch.cat([own.query(states) / 8**0.5, own.key(states), own.value(states)], -1).numpy()
    close = np.abs(product - first) < 2**-11 * 5 * np.abs(first).max()
    # An activation on a border, to within float32's own rounding, falls to the other side: at most two of 44 tokens.
    assert close.mean() > 1 - 2 / 44


def test_a_quantised_graph_has_a_pair_for_every_operand(small_bert: Any, build: Callable[..., Any]) -> None:
    _, built = build(small_bert(), "fp32")
    folder, quantised = build(small_bert(), "int8", constant_scales(built))
    encoder = quantised["encoder"].model
    counts = count_operators(encoder)
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"], counts["Attention"]) == (12, 24, 3)
    producer = {output: node for node in encoder.graph.node for output in node.output}
    for node in encoder.graph.node:
        if node.op_type == "MatMul":
            assert [producer[name].op_type for name in node.input] == ["DequantizeLinear"] * 2
    types = {tensor.name: tensor.data_type for tensor in encoder.graph.initializer}
    assert types["encoder.layer.0.intermediate.dense.weight_q"] == TensorProto.INT8
    assert (
        count_operators(onnx.load(folder / "mlm.onnx", load_external_data=False)).get("QuantizeLinear")
        is None
    )


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_scale_has_the_type_of_what_it_divides_or_gives_back(
    precision: str, small_bert: Any, build: Callable[..., Any]
) -> None:
    """For other types ONNX Runtime's CUDA provider has no kernels, and before 1.31 its CPU provider none either."""
    _, built = build(small_bert(), "fp32")
    _, quantised = build(small_bert(), precision, constant_scales(built))
    graph = onnx.shape_inference.infer_shapes(quantised["encoder"].model, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    found = set()
    for node in graph.node:
        assert not any(attribute.name in {"output_dtype", "precision"} for attribute in node.attribute)
        if node.op_type == "QuantizeLinear":
            assert types[node.input[0]] == types[node.input[1]] == TensorProto.FLOAT
            [scale] = [tensor for tensor in graph.initializer if tensor.name == node.input[1]]
            found.add(float(onnx.numpy_helper.to_array(scale)))
        if node.op_type == "DequantizeLinear":
            assert types[node.input[1]] == types[node.output[0]] == TensorProto.FLOAT16
    # Of both types, one number.
    assert found == {float16(0.02)}


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_activations_beyond_float16_saturate(
    precision: str, inputs: Arrays, small_bert: Any, build: Callable[..., Any]
) -> None:
    """Weights so large that products pass 65,504: the answers are finite numbers all the same."""
    model = small_bert()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.weight.mul_(60_000)
            layer.output.dense.weight.mul_(300)
            layer.attention.self.value.weight.mul_(20000)
    beyond = run_torch(model, inputs)
    assert np.isfinite(beyond["hidden_states"]).all()
    _, built = build(model, "fp32")
    scales = constant_scales(built)
    for name in scales:
        if name.endswith("output.dense"):
            scales[name] = ActivationScale(scale=500.0)
    folder, built = build(model, precision, scales)
    found = run_parts(folder, inputs, built)
    assert all(np.isfinite(values).all() for values in found.values())
    # In true float16, where a sum becomes infinite on the way, too.
    with np.errstate(over="ignore"):
        states = ReferenceEvaluator(str(folder / "encoder.onnx")).run(None, inputs)[0]
    assert np.isfinite(states).all()
    inner = onnx.load(folder / "encoder.onnx")
    inner.graph.output.append(
        onnx.helper.make_tensor_value_info(
            "encoder.layer.0.intermediate.dense/MatMul:0", TensorProto.FLOAT16, ["batch", "sequence", 40]
        )
    )
    with np.errstate(over="ignore"):
        product = ReferenceEvaluator(inner).run(None, inputs)[1]
    assert np.isinf(product).any(), "the test is about products that overflow"


def test_the_head_size_is_divided_by_in_the_weights(small_bert: Any, save_checkpoint: Any) -> None:
    model = small_bert()
    with open_checkpoint(save_checkpoint(model)) as checkpoint:
        fused = FusedQueries(checkpoint, checkpoint.architecture)
        own = model.bert.encoder.layer[1].attention.self
        for part in ("weight", "bias"):
            expected = torch.cat(
                [getattr(own.query, part) / 8**0.5, getattr(own.key, part), getattr(own.value, part)]
            )
            found = fused.tensor(f"encoder.layer.1.attention.self.qkv.{part}")
            np.testing.assert_allclose(found, expected.detach(), rtol=1e-6)
        np.testing.assert_array_equal(
            fused.tensor("pooler.dense.bias"), model.bert.pooler.dense.bias.detach()
        )


@pytest.fixture
def without_heads(small_bert: Any, save_checkpoint: Any) -> Iterator[Checkpoint]:
    with open_checkpoint(save_checkpoint(small_bert().bert)) as checkpoint:
        yield checkpoint


def test_heads_that_a_checkpoint_lacks_have_no_part(without_heads: Checkpoint, tmp_path: Path) -> None:
    weights = WeightFile(tmp_path / "weights")
    built = build_parts(without_heads, weights, precision="fp16")
    weights.close()
    assert list(built) == ["encoder", "pooler"]
    for part, graph in built.items():
        outputs = part_outputs(part, without_heads.architecture, without_heads.heads)
        assert [output.name for output in graph.model.graph.output] == list(outputs)
        assert tuple(value.name for value in graph.model.graph.input) == part_inputs(part)
