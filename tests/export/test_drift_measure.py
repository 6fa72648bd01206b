"""Drift of real engines of small models, from checkpoint to report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from bertrt.errors import CheckpointError, InputError
from bertrt.folder import EngineFolder
from bertrt_export.checkpoints import Checkpoint, open_checkpoint
from bertrt_export.drift import DriftOptions, measure_drift
from bertrt_export.drift.compare import check_reference
from bertrt_export.exporter import export_engine

# The vocabulary of `save_checkpoint` spells lower-case words letter by letter.
TEXT = "\n".join(
    f"he saw {a} {b} there. she went to {b}.\n" + "\n" * (index % 3 == 2)
    for index, (a, b) in enumerate(
        [
            ("cat", "dogs"),
            ("kings", "rain"),
            ("tea", "ships"),
            ("fog", "snow"),
            ("oaks", "bees"),
            ("sun", "moss"),
        ]
    )
)


@pytest.fixture(scope="module")
def checkpoint(
    small_bert: Callable[..., transformers.BertForPreTraining], save_checkpoint: Callable[..., Path]
) -> Checkpoint:
    return open_checkpoint(save_checkpoint(small_bert()))


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> EngineFolder:
    out = tmp_path_factory.mktemp("engine") / "small"
    export_engine(checkpoint, out, precision="fp32")
    return EngineFolder.open(out)


def test_a_real_engine_of_a_small_model(
    engine: EngineFolder, checkpoint: Checkpoint, backend_name: str
) -> None:
    options = DriftOptions(examples=50, seed=3, threads=2, backend=backend_name)
    report = measure_drift(engine, checkpoint, TEXT, options=options)
    assert report.passed, [violation.message for violation in report.violations]
    assert report.left_out == {}
    assert (report.examples.examples, report.examples.seed, report.examples.text) == (50, 3, "text")
    assert report.examples.longest <= checkpoint.architecture.max_position_embeddings
    assert [layer.name for layer in report.layers] == ["embeddings", "layer 1", "layer 2", "layer 3"]
    assert {"bertrt", "numpy", "torch", "transformers", backend_name} == set(report.versions)


def test_the_same_seed_gives_the_same_figures(engine: EngineFolder, checkpoint: Checkpoint) -> None:
    options = DriftOptions(examples=20, threads=1)
    first, second = (measure_drift(engine, checkpoint, TEXT, options=options) for _ in range(2))
    assert first.examples == second.examples
    assert first.figures == pytest.approx(second.figures, rel=1e-6, abs=1e-9)


def test_a_model_without_heads(
    small_bert: Callable[..., transformers.BertForPreTraining],
    save_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    with open_checkpoint(save_checkpoint(small_bert().bert)) as checkpoint:
        export_engine(checkpoint, tmp_path / "engine", precision="fp32")
        report = measure_drift(
            EngineFolder.open(tmp_path / "engine"), checkpoint, TEXT, options=DriftOptions(examples=20)
        )
    assert report.passed
    assert set(report.left_out) == {"Masked LM", "Next sentence"}
    assert not {"kl_mean", "nsp_changed", "bias_shift"} & {*report.figures, *report.budgets}
    assert {"pooled_cosine_mean", "hidden_cosine_mean"} <= set(report.figures)


def test_other_weights_are_no_reference(
    engine: EngineFolder,
    checkpoint: Checkpoint,
    small_bert: Callable[..., transformers.BertForPreTraining],
    save_checkpoint: Callable[..., Path],
) -> None:
    check_reference(engine.manifest, checkpoint)
    with (
        open_checkpoint(save_checkpoint(small_bert(seed=1))) as other,
        pytest.raises(CheckpointError, match=r"was exported from .* not from .* pass the checkpoint"),
    ):
        check_reference(engine.manifest, other)


def test_random_weights_are_told_apart_by_name_and_seed(engine: EngineFolder, checkpoint: Checkpoint) -> None:
    with (
        open_checkpoint("bert-base-cased", random=True, seed=7) as seven,
        open_checkpoint("bert-base-cased", random=True, seed=8) as eight,
    ):
        manifest = replace(engine.manifest, source=seven.source)
        check_reference(manifest, seven)
        for other in (eight, checkpoint):
            with pytest.raises(CheckpointError):
                check_reference(manifest, other)
        with pytest.raises(CheckpointError):
            check_reference(engine.manifest, seven)


@pytest.mark.parametrize("options", [{"examples": 0}, {"examples": 20_001}, {"seed": -1}, {"threads": 0}])
def test_options_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(InputError):
        DriftOptions(**options)
