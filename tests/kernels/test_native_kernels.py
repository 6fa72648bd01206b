"""What the kernels compute, held against PyTorch in float64: every instruction set, precision, size and activation.

A process for each instruction set (`conftest.isa_environment`) answers for all models; the tests read its answers.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.exporter import export_engine

pytest.importorskip("bertrt._native", reason="the native kernels are not built")

# By how many decibels the noise may be above that of PyTorch with the same roundings (`twin_of`), which fall on other
# values there: in float32 the sums are in another order, whose errors differ between the root and the logarithm of
# their length; the others round the same things, and noise of the same power is met again to within less than 3 dB.
MARGIN = {"fp32": 10.0, "bf16": 3.0, "int8": 3.0}
PRECISIONS = tuple(MARGIN)
OUTPUTS = ("hidden_states", "pooled", "nsp_logits", "mlm_logits", "layers")
# One vector of 16, one tile of 16 rows and one of 32, each with one row fewer and one more.
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 50]

Model = transformers.BertForPreTraining


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, the lengths of the sequences that it is asked about, and what its noise says nothing of."""

    sizes: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Model], object] = lambda model: None
    lengths: list[int] = field(default_factory=lambda: LENGTHS)
    noiseless: tuple[str, ...] = ()


def heads_of(size: int, number: int = 2, **sizes: Any) -> Case:
    hidden = size * number
    return Case(
        sizes={
            "hidden_size": hidden,
            "num_attention_heads": number,
            "intermediate_size": hidden + 20,
            "max_position_embeddings": 50,
            **sizes,
        }
    )


@torch.no_grad()
def steady(model: Model) -> None:
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embeddings" not in name:
            weight.mul_((24 / weight.shape[1]) ** 0.5)


@torch.no_grad()
def nothing_left(model: Model) -> None:
    """The embeddings' LayerNorm gives zeros: rows without a maximum to be scaled by."""
    model.bert.embeddings.LayerNorm.weight.zero_()
    model.bert.embeddings.LayerNorm.bias.zero_()


@torch.no_grad()
def no_variance(model: Model) -> None:
    """Every row into the first LayerNorm is constant."""
    for table in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        getattr(model.bert.embeddings, table).weight.fill_(0.25)


@torch.no_grad()
def one_neighbour(model: Model) -> None:
    """Attention scores of hundreds: all the probability goes to few tokens, and exp() overflows unless shifted."""
    for layer in model.bert.encoder.layer:
        layer.attention.self.query.weight.mul_(8)
        layer.attention.self.key.weight.mul_(8)


@torch.no_grad()
def equal_logits(model: Model) -> None:
    model.cls.predictions.decoder.weight.zero_()
    model.cls.predictions.bias.fill_(0.5)
    model.cls.predictions.decoder.bias = model.cls.predictions.bias


@torch.no_grad()
def overflow(model: Model) -> None:
    """The sum of the last position's embeddings is too large for float32."""
    model.bert.embeddings.position_embeddings.weight[-1] = 3e38


CASES = {
    **{f"head-size-{size}": heads_of(size) for size in (8, 16, 24, 32, 40, 64, 96, 128)},
    "one-head": heads_of(100, 1),
    "twelve-heads": heads_of(16, 12),
    "tiny": heads_of(8, 1, intermediate_size=8, num_hidden_layers=1),
    "wide-feed-forward": heads_of(32, 2, intermediate_size=1100),
    # All its rows together are more than the kernels keep in the L2 cache: they are taken in turns.
    "feed-forward-beyond-cache": heads_of(32, 2, intermediate_size=3000),
    "narrow-feed-forward": heads_of(32, 2, intermediate_size=33),
    "large-vocabulary": heads_of(32, 2, vocab_size=1025),
    "one-segment": heads_of(32, 2, type_vocab_size=1),
    "other-epsilon": heads_of(32, 2, layer_norm_eps=1e-3),
    "gelu-new": heads_of(32, 2, hidden_act="gelu_new"),
    "relu": heads_of(32, 2, hidden_act="relu"),
    "long": Case(
        sizes={**heads_of(64, 2).sizes, "max_position_embeddings": 512}, lengths=[512, 511, 129, 64, 65]
    ),
    "nothing-left": Case(sizes=heads_of(32, 2).sizes, change=nothing_left),
    # With constant rows for a decoder, all logits are one sum in which nearly everything cancels.
    "no-variance": Case(sizes=heads_of(32, 2).sizes, change=no_variance, noiseless=("mlm_logits",)),
}
# Small differences of the inputs are large ones of these models' outputs, or of none.
ODD_CASES = {
    "one-neighbour": Case(sizes=heads_of(32, 2).sizes, change=one_neighbour),
    "equal-logits": Case(sizes=heads_of(32, 2, vocab_size=1025).sizes, change=equal_logits),
    "overflow": Case(sizes=heads_of(32, 2).sizes, change=overflow),
}

PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
from bertrt.backends.base import TokenBatch, Wanted
from bertrt.backends.native import NativeBackend
from bertrt.folder import EngineFolder

root, out, isa = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
for path in json.loads((root / "engines.json").read_text()):
    folder = EngineFolder.open(root / path)
    backend = NativeBackend(folder, threads=2)
    assert backend.isa == isa, backend.isa
    with np.load(root / path.partition("/")[0] / "batch.npz") as arrays:
        batch = TokenBatch(arrays["ids"], arrays["segments"], arrays["offsets"])
    wanted = Wanted(
        mlm_positions=np.arange(batch.num_tokens), mlm_logits=True, mlm_top_k=7,
        hidden_states=True, pooled=True, nsp=True,
    )
    output = backend.run(batch, wanted)
    names = ("hidden_states", "pooled", "nsp_logits", "mlm_logits", "mlm_top_ids", "mlm_top_log_probs")
    found = {name: getattr(output, name) for name in names}
    np.savez(out / path.replace("/", "-"), layers=backend.run_layers(batch), **found)
"""


@pytest.fixture(scope="module")
def models(
    small_bert: Callable[..., Model], save_checkpoint: Callable[..., Path], tmp_path_factory: Any
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A folder with every model in every precision and its batch, and PyTorch's answers in float64."""
    root = tmp_path_factory.mktemp("models")
    engines, truths = [], {}
    for number, (name, case) in enumerate({**CASES, **ODD_CASES}.items()):
        model = small_bert(number, **case.sizes)
        # However wide the model, a product changes the size of what goes into it as in the narrow one.
        steady(model)
        case.change(model)
        (root / name).mkdir()
        with open_checkpoint(save_checkpoint(model)) as checkpoint:
            for precision in PRECISIONS:
                export_engine(checkpoint, root / name / precision, precision=precision, backends=["native"])
                engines.append(f"{name}/{precision}")
        generator = np.random.default_rng(number)
        tokens = sum(case.lengths)
        batch = {
            "ids": generator.integers(0, model.config.vocab_size, tokens).astype(np.int32),
            "segments": generator.integers(0, model.config.type_vocab_size, tokens).astype(np.int32),
            "offsets": np.concatenate([[0], np.cumsum(case.lengths)]).astype(np.int64),
        }
        np.savez(root / name / "batch.npz", **batch)
        truths[name] = truth_of(model.double(), batch)
        nsp = model.cls.seq_relationship
        truths[name]["nsp"] = (nsp.weight.detach().numpy(), nsp.bias.detach().numpy())
        for precision in PRECISIONS:
            twin = truth_of(twin_of(model, precision), batch)
            truths[name][precision] = {
                output: decibels(twin[output], truths[name][output]) for output in OUTPUTS
            }
    (root / "engines.json").write_text(json.dumps(engines))
    return root, truths


@torch.inference_mode()
def truth_of(model: Model, batch: dict[str, Any]) -> dict[str, Any]:
    """Each sequence alone, without padding."""
    parts: dict[str, list[Any]] = {name: [] for name in OUTPUTS}
    for start, end in zip(batch["offsets"][:-1], batch["offsets"][1:], strict=True):
        answer = model.bert(
            torch.from_numpy(batch["ids"][start:end]).long()[None],
            token_type_ids=torch.from_numpy(batch["segments"][start:end]).long()[None],
            output_hidden_states=True,
        )
        states = answer.last_hidden_state[0]
        parts["hidden_states"].append(states)
        parts["pooled"].append(answer.pooler_output)
        parts["nsp_logits"].append(model.cls.seq_relationship(answer.pooler_output))
        parts["mlm_logits"].append(model.cls.predictions(states))
        parts["layers"].append(torch.stack([layer[0] for layer in answer.hidden_states]))
    return {
        name: torch.cat(values, dim=1 if name == "layers" else 0).numpy() for name, values in parts.items()
    }


def to_bf16(values: torch.Tensor) -> torch.Tensor:
    return values.float().bfloat16().to(values.dtype)


def to_int8(values: torch.Tensor) -> torch.Tensor:
    """Symmetric, one scale for each row."""
    scale = values.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / 127
    return torch.round(values / scale) * scale


@torch.no_grad()
def twin_of(model: Model, precision: str) -> Model:
    """PyTorch with the roundings of a precision: of the weights, and of what goes into a product and comes out."""
    twin = copy.deepcopy(model)
    if precision == "fp32":
        return twin.float()
    twin = twin.double()
    coarse = to_int8 if precision == "int8" else to_bf16
    table = twin.bert.embeddings.word_embeddings
    table.weight = torch.nn.Parameter(coarse(table.weight))
    twin.cls.predictions.decoder.weight = torch.nn.Parameter(coarse(twin.cls.predictions.decoder.weight))
    for name, module in twin.named_modules():
        if isinstance(module, torch.nn.Linear) and "seq_relationship" not in name:
            head = name in {"bert.pooler.dense", "cls.predictions.transform.dense"}
            rounded = to_bf16 if head else coarse
            if "decoder" not in name:
                module.weight = torch.nn.Parameter(rounded(module.weight))
            module.register_forward_pre_hook(lambda _, given, rounded=rounded: (rounded(given[0]),))
        if "bert.encoder" in name and name.endswith(("query", "key", "value", "output.dense")):
            module.register_forward_hook(lambda _, given, result: to_bf16(result))
        if isinstance(module, torch.nn.LayerNorm) and "bert" in name:
            module.register_forward_hook(lambda _, given, result: to_bf16(result))
    return twin


@pytest.fixture(scope="module")
def answers(
    models: tuple[Path, dict[str, Any]],
    isa_environment: Callable[[str], dict[str, str]],
    tmp_path_factory: Any,
) -> Callable[[str, str, str], dict[str, Any]]:
    """A function that gives an instruction set's answers to a model's batch in a precision."""
    folders: dict[str, Path] = {}

    def read(isa: str, name: str, precision: str) -> dict[str, Any]:
        if isa not in folders:
            out = tmp_path_factory.mktemp(f"answers-{isa}")
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, str(models[0]), str(out), isa],
                # New memory holds bytes 0x55, 1.5e13 as a number: what reads more than was written shows.
                env={**isa_environment(isa), "MALLOC_PERTURB_": "170"},
                capture_output=True,
                text=True,
                timeout=900,
            )
            assert done.returncode == 0, done.stderr
            folders[isa] = out
        with np.load(folders[isa] / f"{name}-{precision}.npz") as arrays:
            return dict(arrays)

    return read


def decibels(found: Any, truth: Any) -> float:
    noise = ((found - truth) ** 2).sum()
    return float("inf") if noise == 0 else float(10 * np.log10((truth**2).sum() / noise))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_pytorchs_answers(
    name: str,
    precision: str,
    isa: str,
    models: tuple[Path, dict[str, Any]],
    answers: Callable[[str, str, str], dict[str, Any]],
) -> None:
    case, truth, found = CASES[name], models[1][name], answers(isa, name, precision)
    for output in OUTPUTS:
        assert found[output].shape == truth[output].shape, output
        assert found[output].dtype == np.float32, output
        assert np.isfinite(found[output]).all(), output
        if output in case.noiseless or output == "nsp_logits":
            continue
        level = decibels(found[output], truth[output])
        assert level >= truth[precision][output] - MARGIN[precision], output
        if precision == "fp32":
            # Nor is there one value that is wrong among many that are right.
            scale = np.sqrt((truth[output] ** 2).mean())
            np.testing.assert_allclose(found[output], truth[output], rtol=1e-4, atol=1e-4 * scale)
    # Two numbers for each sequence are too few to have a level of noise; they follow from the pooled ones in float32.
    weight, bias = truth["nsp"]
    np.testing.assert_allclose(found["nsp_logits"], found["pooled"] @ weight.T + bias, rtol=1e-5, atol=1e-6)
    # Nor is one sequence worse than the others.
    ends = np.cumsum(case.lengths)
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        rows = slice(start, end)
        level = decibels(found["hidden_states"][rows], truth["hidden_states"][rows])
        assert level >= truth[precision]["hidden_states"] - MARGIN[precision] - 6, (start, end)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["head-size-32", "large-vocabulary"])
def test_layers_end_in_the_hidden_states(
    name: str, precision: str, isa: str, answers: Callable[[str, str, str], dict[str, Any]]
) -> None:
    found = answers(isa, name, precision)
    np.testing.assert_array_equal(found["layers"][-1], found["hidden_states"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scores_of_hundreds(
    precision: str,
    isa: str,
    models: tuple[Path, dict[str, Any]],
    answers: Callable[[str, str, str], dict[str, Any]],
) -> None:
    truth, found = models[1]["one-neighbour"], answers(isa, "one-neighbour", precision)
    for output in OUTPUTS:
        assert np.isfinite(found[output]).all(), output
    # A score of hundreds has an error of hundreds of roundings, which is what its probability is off by: where two
    # tokens are as near, the twin and we may well differ. What is left is that most are not.
    level = decibels(found["hidden_states"], truth["hidden_states"])
    assert level >= truth[precision]["hidden_states"] - 2 * MARGIN[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_overflow_is_not_hidden(
    precision: str, isa: str, answers: Callable[[str, str, str], dict[str, Any]]
) -> None:
    """NaN reaches all that depends on it, as in PyTorch, and nothing of another sequence."""
    assert LENGTHS[-1] == CASES["head-size-32"].sizes["max_position_embeddings"]
    found, spared = answers(isa, "overflow", precision), sum(LENGTHS[:-1])
    for output, axis in {"hidden_states": 0, "mlm_logits": 0, "layers": 1}.items():
        before, after = np.split(found[output], [spared], axis=axis)
        assert np.isfinite(before).all(), output
        # After the embeddings and the first layer's attention.
        assert np.isnan(after if output != "layers" else after[1:]).all(), output
    for output in ("pooled", "nsp_logits"):
        assert np.isfinite(found[output][:-1]).all(), output
        assert np.isnan(found[output][-1]).all(), output


@pytest.mark.parametrize("precision", PRECISIONS)
def test_equal_logits_come_by_rising_id(
    precision: str, isa: str, answers: Callable[[str, str, str], dict[str, Any]]
) -> None:
    found = answers(isa, "equal-logits", precision)
    assert (found["mlm_logits"] == 0.5).all()
    assert (found["mlm_top_ids"] == np.arange(7)).all()
    np.testing.assert_allclose(found["mlm_top_log_probs"], -np.log(1025), rtol=1e-6)
