"""Fixtures that several test folders share: small checkpoints, and engines of the demo checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bertrt.backends import cuda
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.exporter import export_engine

_NO_GPU = "needs an NVIDIA GPU: "
# No size is a power of two or a multiple of another, so that a swapped axis shows.
SMALL = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 50,
    "type_vocab_size": 2,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, with what is missing as the reason."""
    needy = [item for item in items if item.get_closest_marker("gpu")]
    problem = cuda.problem() if needy else None
    for item in needy if problem else ():
        item.add_marker(pytest.mark.skip(reason=f"{_NO_GPU}{problem}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count what needs a GPU."""
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    count = sum(_NO_GPU in reason for reason in skipped)
    if count:
        terminalreporter.write_line(f"{count} tests that need an NVIDIA GPU were skipped: {cuda.problem()}")


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session", params=["native", "onnxruntime"])
def backend_name(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; the native one is skipped where it is not built."""
    if request.param == "native":
        pytest.importorskip("bertrt._native", reason="the native kernels are not built")
    return str(request.param)


@pytest.fixture(scope="session")
def small_bert() -> Callable[..., transformers.BertForPreTraining]:
    """A function that makes a small random BERT in eval mode; keywords change its configuration."""

    def make(seed: int = 0, **changes: Any) -> transformers.BertForPreTraining:
        torch.manual_seed(seed)
        model = transformers.BertForPreTraining(transformers.BertConfig(**{**SMALL, **changes})).eval()
        with torch.no_grad():
            # transformers starts biases and LayerNorms at 0 and 1, where a forgotten one would not show.
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                elif "embeddings" not in name:
                    parameter.mul_(8)
        return model

    return make


@pytest.fixture(scope="session")
def save_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that saves a model, with a vocabulary, as a Hugging Face folder."""

    def save(model: transformers.PreTrainedModel, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder, **options)
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
        words = special + letters + [f"##{letter}" for letter in letters]
        words += [f"[unused{index}]" for index in range(model.config.vocab_size - len(words))]
        (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        return folder

    return save


@pytest.fixture(scope="session")
def demo_engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that exports the demo checkpoint, once for each precision and dialect; do not change it."""
    engines: dict[tuple[str, str], Path] = {}

    def export(precision: str = "fp32", dialect: str = "ort") -> Path:
        key = precision, dialect
        if key not in engines:
            out = tmp_path_factory.mktemp("engines") / f"demo-{precision}-{dialect}"
            with open_checkpoint("demo") as checkpoint:
                export_engine(checkpoint, out, precision=precision, dialect=dialect)
            engines[key] = out
        return engines[key]

    return export


@pytest.fixture(scope="session")
def gpu_engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that exports the demo checkpoint for GPUs, once for each precision; do not change it."""
    engines: dict[str, Path] = {}

    def export(precision: str) -> Path:
        if precision not in engines:
            out = tmp_path_factory.mktemp("engines") / f"demo-{precision}-tensorrt"
            with open_checkpoint("demo") as checkpoint:
                export_engine(checkpoint, out, precision=precision, target="tensorrt")
            engines[precision] = out
        return engines[precision]

    return export
