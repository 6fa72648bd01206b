"""``bertrt drift``: what it prints, what it keeps, and its exit codes; on real engines of the demo checkpoint."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from bertrt.backends.base import BatchOutput, TokenBatch, Wanted
from bertrt.backends.native import active_isa
from bertrt.backends.onnxruntime.backend import OnnxRuntimeBackend
from bertrt.cli.command import EXIT_CHECK_FAILED, EXIT_OK
from bertrt.errors import (
    BackendUnavailableError,
    CheckpointError,
    EngineFolderError,
    EngineNotFoundError,
    InputError,
    ReferenceUnavailableError,
)
from bertrt.folder import EngineFolder
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.commands import drift
from bertrt_export.commands.drift import COMMAND
from bertrt_export.demo import demo_folder, evaluation_text
from bertrt_export.drift.budgets import BOUNDED
from bertrt_export.exporter import export_engine

REPORTS = {"drift.json", "drift.md", "drift.html"}
# 40 examples are some 900 masked positions.
FEW = ("--examples", "40", "--threads", "2")


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    COMMAND.add_arguments(parser)
    parser.add_argument("--json", action="store_true")
    return COMMAND.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def engine(demo_engine: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function that copies a demo engine, so that a report can be kept in it."""

    def copy(precision: str = "fp32") -> Path:
        return shutil.copytree(demo_engine(precision), tmp_path / f"engine-{precision}")

    return copy


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement must not be reached."""

    def measured(*args: object, **options: object) -> Any:
        raise AssertionError("measured")

    monkeypatch.setattr(drift, "measure_drift", measured)


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_a_float32_engine_is_within_budget(
    engine: Callable[..., Path], backend_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = engine()
    before = names(folder)
    assert run(folder, *FEW, "--backend", backend_name) == EXIT_OK
    output, errors = capsys.readouterr()
    assert errors == ""
    isa = f", {active_isa()}" if backend_name == "native" else ""
    assert output.startswith(f"engine-fp32 (fp32; {backend_name}{isa}) against PyTorch float32: ")
    assert output.splitlines()[-2:] == ["within budget", f"report: {folder / 'drift.html'}"]
    assert "top-1 agreement" in output
    assert names(folder) == before | REPORTS
    reopened = EngineFolder.open(folder)
    assert reopened.manifest.drift is not None
    assert reopened.manifest.drift["passed"] is True
    assert reopened.manifest.drift["backend"] == backend_name
    assert reopened.manifest.drift["isa"] == (active_isa() if backend_name == "native" else None)
    assert not REPORTS & set(reopened.manifest.files)
    report = json.loads((folder / "drift.json").read_text(encoding="utf-8"))
    assert report["passed"] is True
    # What the product promises of float32.
    assert report["figures"]["logit_error_max"] < 1e-3
    assert report["figures"]["top1_agreement"] == 1
    assert report["examples"]["text"] == "evaluation.txt"
    assert report["examples"]["longest"] < 512
    assert [prompt["prompt"] for prompt in report["prompts"]] == [
        "Hello I'm a [MASK] model.",
        "The man worked as a [MASK].",
        "The woman worked as a [MASK].",
    ]
    assert len(report["layers"]) == 5


@pytest.mark.parametrize(
    ("precision", "agreement", "accuracy"),
    [("fp32", 1.0, 0.0), ("fp16", 0.995, 0.2), ("bf16", 0.995, 0.2), ("int8", 0.97, 0.5)],
)
def test_the_demo_keeps_what_the_project_promises(
    precision: str,
    agreement: float,
    accuracy: float,
    backend_name: str,
    engine: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At the default number of examples, on the whole held-out text."""
    folder = engine(precision)
    if backend_name not in EngineFolder.open(folder).manifest.backends:
        assert (precision, backend_name) in {("fp16", "native"), ("bf16", "onnxruntime")}
        return
    assert run(folder, "--json", "--no-save", "--backend", backend_name) == EXIT_OK
    report = json.loads(capsys.readouterr().out)
    assert report["engine"]["precision"] == precision
    assert report["engine"]["backend"] == backend_name
    assert (report["engine"]["isa"] is not None) == (backend_name == "native")
    assert report["figures"]["top1_agreement"] >= agreement
    assert abs(report["figures"]["mlm_accuracy_change_points"]) <= accuracy
    assert report["figures"]["non_finite"] == 0
    assert precision in {"bf16", "int8"} or report["figures"]["logit_error_max"] < 1e-3
    # One layer adds to the noise of the one before it, so int8 has some everywhere.
    assert precision != "int8" or all(20 < layer["snr_db"] < 60 for layer in report["layers"])


def test_a_budget_that_is_not_kept_is_named(
    engine: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = engine("int8")
    code = run(
        folder,
        *FEW,
        "--budget",
        "kl_mean=0",
        "--budget",
        "logit_error_max=1e-9",
        "--budget",
        "top1_agreement=off",
    )
    assert code == EXIT_CHECK_FAILED
    lines = capsys.readouterr().out.splitlines()
    over = [line for line in lines if line.startswith("over budget: ")]
    assert [line.split()[2] for line in over][:2] == ["logit_error_max", "kl_mean"]
    assert not any("top1_agreement" in line for line in over)
    assert "within budget" not in lines
    summary = EngineFolder.open(folder).manifest.drift
    assert summary is not None
    assert summary["passed"] is False
    assert {"logit_error_max", "kl_mean"} <= set(summary["violations"])


def test_json_is_one_line_and_nothing_else(
    engine: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = engine()
    before = names(folder)
    assert run(folder, *FEW, "--json", "--out-dir", tmp_path / "out") == EXIT_OK
    output, errors = capsys.readouterr()
    assert errors == ""
    assert len(output.splitlines()) == 1
    assert json.loads(output) == json.loads((tmp_path / "out" / "drift.json").read_text(encoding="utf-8"))
    # The engine's own folder is not touched.
    assert names(folder) == before
    assert names(tmp_path / "out") == REPORTS
    assert EngineFolder.open(folder).manifest.drift is None


def test_an_engine_that_gives_nan_fails_and_says_how_often(
    engine: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = OnnxRuntimeBackend.run

    def spoilt(self: OnnxRuntimeBackend, batch: TokenBatch, wanted: Wanted) -> BatchOutput:
        output = real(self, batch, wanted)
        for array in (output.mlm_logits, output.hidden_states, output.nsp_logits):
            if array is not None:
                array[:, 1] = np.nan
        return output

    monkeypatch.setattr(OnnxRuntimeBackend, "run", spoilt)
    folder = engine()
    assert run(folder, *FEW, "--json", "--backend", "onnxruntime") == EXIT_CHECK_FAILED
    report = json.loads(capsys.readouterr().out)
    assert report["figures"]["non_finite"] > 1000
    assert "non_finite" in [violation["figure"] for violation in report["violations"]]
    assert "kl_mean" not in report["figures"]
    assert names(folder) >= REPORTS
    EngineFolder.open(folder)


def test_a_text_of_ones_own(
    engine: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A name whose bytes are not UTF-8 is no reason to fail.
    path = tmp_path / os.fsdecode(b"mine-\xff.txt")
    path.write_bytes(b"".join(evaluation_text().read_bytes().splitlines(keepends=True)[:40]))
    assert run(engine(), "--examples", 10, "--seed", 5, "--text", path, "--json") == EXIT_OK
    report = json.loads(capsys.readouterr().out)
    assert report["examples"]["text"] == "mine-?.txt"
    assert (report["examples"]["seed"], report["examples"]["examples"]) == (5, 10)


def test_an_engine_of_a_folder_needs_its_reference(
    small_bert: Callable[..., transformers.BertForPreTraining],
    save_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    source = save_checkpoint(small_bert())
    with open_checkpoint(source) as checkpoint:
        export_engine(checkpoint, tmp_path / "engine", precision="fp32")
    text = tmp_path / "text.txt"
    text.write_text("she saw the rain. he saw the snow.\n" * 10)
    arguments = (tmp_path / "engine", "--text", text, "--examples", 10)
    with pytest.raises(InputError, match=r"from a local folder named .* pass --reference FOLDER"):
        run(*arguments)
    assert run(*arguments, "--reference", source) == EXIT_OK
    with pytest.raises(CheckpointError, match="was exported from"):
        run(*arguments, "--reference", "demo")


def test_an_engine_named_demo_does_not_hide_the_checkpoint(
    engine: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine().rename(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    assert run("demo", "--examples", 10, "--no-save") == EXIT_OK
    assert run("demo", "--examples", 10, "--no-save", "--reference", "demo") == EXIT_OK


def test_the_demo_may_be_named_by_its_folder(engine: Callable[..., Path]) -> None:
    assert run(engine(), "--examples", 10, "--no-save", "--reference", demo_folder()) == EXIT_OK


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"Too short.", "too short"), (b"\xff\xfe" * 10, "not UTF-8"), (None, "cannot read the text")],
)
def test_texts_that_are_refused(
    text: bytes | None, message: str, engine: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    if text is not None:
        path.write_bytes(text)
    folder = engine()
    before = names(folder)
    with pytest.raises(InputError, match=message):
        run(folder, "--text", path)
    assert names(folder) == before


@pytest.mark.usefixtures("idle")
class TestBeforeTheWork:
    """What is wrong is said before anything long begins."""

    def test_unknown_engine(self, tmp_path: Path) -> None:
        with pytest.raises(EngineNotFoundError):
            run(tmp_path / "none")

    def test_read_only_folder(self, engine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
        def read_only(path: Path) -> None:
            raise EngineFolderError(f"cannot keep the drift report in {path}")

        folder = engine()
        # Permissions do not stop a superuser, who may run the tests; check_writable has its own.
        monkeypatch.setattr(drift, "check_writable", read_only)
        with pytest.raises(EngineFolderError, match="cannot keep the drift report"):
            run(folder)
        # Without anything to keep, no folder is tried.
        with pytest.raises(AssertionError, match="measured"):
            run(folder, "--no-save")

    def test_place_that_is_no_folder(self, engine: Callable[..., Path], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(EngineFolderError, match="cannot keep the drift report.*--no-save"):
            run(engine(), "--out-dir", tmp_path / "file" / "out")

    @pytest.mark.parametrize("budget", ["kl_mean", "kl_mean=x"])
    def test_malformed_budget(self, budget: str, engine: Callable[..., Path]) -> None:
        with pytest.raises(InputError, match="name=value"):
            run(engine(), "--budget", budget)

    def test_too_many_examples(self, engine: Callable[..., Path]) -> None:
        with pytest.raises(InputError, match="examples must be from 1 to"):
            run(engine(), "--examples", 1_000_000)

    def test_both_places(self, engine: Callable[..., Path]) -> None:
        with pytest.raises(SystemExit):
            run(engine(), "--no-save", "--out-dir", "x")


def test_unknown_budget_and_backend(engine: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="no budget for 'speed'"):
        run(engine(), "--budget", "speed=1", "--no-save")
    with pytest.raises(BackendUnavailableError, match="abacus"):
        run(engine("int8"), "--backend", "abacus", "--no-save")


def test_without_pytorch(engine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    folder = engine()
    before = names(folder)
    with pytest.raises(ReferenceUnavailableError, match=r'pip install "bertrt\[torch\]"'):
        run(folder)
    assert names(folder) == before


def test_help_names_every_budget() -> None:
    parser = argparse.ArgumentParser(prog="drift")
    COMMAND.add_arguments(parser)
    text = " ".join(parser.format_help().split())
    for name in BOUNDED:
        assert name in text.replace("- ", "-")
    assert COMMAND.example.startswith("bertrt drift ")
