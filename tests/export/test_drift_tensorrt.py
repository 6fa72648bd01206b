"""Drift of the engines for GPUs at full size, without a GPU: the graphs' own types, computed on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bertrt.folder import EngineFolder
from bertrt_export.calibration import calibrate
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.demo import evaluation_text
from bertrt_export.drift.compare import DriftOptions, measure_drift
from bertrt_export.drift.report import DriftReport
from bertrt_export.exporter import export_engine


def measure(folder: Path, text: Path) -> DriftReport:
    with open_checkpoint("demo") as checkpoint:
        return measure_drift(EngineFolder.open(folder), checkpoint, text, options=DriftOptions(threads=2))


@pytest.mark.parametrize(("precision", "agreement"), [("fp16", 0.995), ("bf16", 0.995)])
def test_narrow_types_keep_the_preferred_tokens(
    precision: str, agreement: float, gpu_engine: Callable[[str], Path]
) -> None:
    report = measure(gpu_engine(precision), evaluation_text())
    assert report.examples.masked > 9_000
    assert report.figures["top1_agreement"] >= agreement
    assert report.passed, report.violations
    assert report.engine.backend == "onnxruntime"
    assert report.engine.isa == "each operator in float32, rounded to its type"
    assert len(report.layers) == 5


@pytest.fixture(scope="module")
def first_half() -> str:
    """The evaluation text up to its middle, cut where a document ends."""
    documents = evaluation_text().read_text(encoding="utf-8").split("\n\n")
    sizes = [len(document) for document in documents]
    middle = next(index for index in range(len(documents)) if sum(sizes[:index]) >= sum(sizes) / 2)
    return "\n\n".join(documents[:middle])


@pytest.mark.parametrize(("precision", "agreement"), [("int8", 0.98), ("fp8", 0.95)])
def test_eight_bits_keep_them_on_text_half_of_which_calibration_has_not_seen(
    precision: str, agreement: float, first_half: str, tmp_path: Path
) -> None:
    with open_checkpoint("demo") as checkpoint:
        calibration = calibrate(checkpoint, first_half, precision=precision, threads=2)
        export_engine(
            checkpoint, tmp_path / "engine", precision=precision, target="tensorrt", calibration=calibration
        )
    report = measure(tmp_path / "engine", evaluation_text())
    assert report.figures["top1_agreement"] >= agreement
    assert report.passed, report.violations
