"""Exporting for GPUs: what the folder holds, who can load it without a GPU, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from bertrt import Engine
from bertrt.cli import main
from bertrt.errors import BackendUnavailableError, ExportError, ShapeMismatchError
from bertrt.folder import MANIFEST_NAME, EngineFolder, record_files
from bertrt.manifest import Manifest
from bertrt_export import selfcheck
from bertrt_export.calibration import calibrate, default_text
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.exporter import export_engine
from bertrt_export.graph.twin import TwinBackend

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
TEXT = "The man worked as a [MASK] in the old house."


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_a_folder_holds(precision: str, gpu_engine: Callable[[str], Path]) -> None:
    folder = EngineFolder.open(gpu_engine(precision))
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "config.json",
        "encoder.onnx",
        "engine.json",
        "mlm.onnx",
        "model.onnx",
        "model.onnx_data",
        "pooler.onnx",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    manifest = folder.manifest
    assert (manifest.target, manifest.precision, manifest.dialect) == ("tensorrt", precision, "onnx")
    assert manifest.backends["tensorrt"] == {}
    assert manifest.backends["onnxruntime"] == {
        "encoder": "encoder.onnx",
        "mlm": "mlm.onnx",
        "pooler": "pooler.onnx",
        "weights": "model.onnx_data",
    }
    assert manifest.graph["operators"]["Attention"] == 4
    assert manifest.plan is None
    if precision in {"int8", "fp8"}:
        assert manifest.graph["operators"]["QuantizeLinear"] == 4 * 4
        assert manifest.calibration is not None
        scales = manifest.calibration["scales"]
        assert len(scales) == 4 * 4
        assert all(scale > 0 for scale in scales.values())
    else:
        assert manifest.calibration is None
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_weights_are_stored_once(gpu_engine: Callable[[str], Path]) -> None:
    size = {
        precision: (gpu_engine(precision) / "model.onnx_data").stat().st_size
        for precision in ("fp32", "fp16", "int8")
    }
    # 5.5 million parameters, of which 0.2 million (transform, pooler, positions) stay float32.
    assert 21e6 < size["fp32"] < 24e6
    assert size["fp16"] < 0.55 * size["fp32"]
    # The table of words, 2.1 million, is float16 in int8 engines.
    assert size["int8"] < 0.42 * size["fp32"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "fp8"])
def test_a_folder_for_gpus_runs_on_a_cpu(
    precision: str, gpu_engine: Callable[[str], Path], demo_engine: Callable[..., Path]
) -> None:
    with (
        Engine.load(gpu_engine(precision), threads=2) as engine,
        Engine.load(demo_engine("fp32"), threads=2) as exact,
    ):
        assert engine.backend.name == "onnxruntime"
        ours, theirs = (one.fill_mask(TEXT, top_k=5) for one in (engine, exact))
        assert {answer["token"] for answer in ours[:1]} <= {answer["token"] for answer in theirs[:2]}
        # A few per cent of a probability in 8 bits, nothing in float32.
        tolerance = 1e-4 if precision == "fp32" else 0.05
        pair = ("She opened the door.", "There was nobody in the street.")
        assert engine.next_sentence(*pair) == pytest.approx(exact.next_sentence(*pair), abs=tolerance)
        assert engine.score(TEXT.replace("[MASK]", "sailor")).tokens == 11
        vectors, expected = (
            one.features(["One text.", "And another one."], pooling="mean") for one in (engine, exact)
        )
        assert vectors.shape == expected.shape


def test_bf16_needs_a_gpu_or_the_twin(gpu_engine: Callable[[str], Path]) -> None:
    with pytest.raises(BackendUnavailableError, match="bf16"):
        Engine.load(gpu_engine("bf16"), threads=2)
    backend = TwinBackend(EngineFolder.open(gpu_engine("bf16")), threads=2)
    assert backend.name == "onnxruntime"
    backend.close()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_without_a_gpu_the_backend_says_what_is_missing(
    precision: str, gpu_engine: Callable[[str], Path], demo_engine: Callable[..., Path]
) -> None:
    from bertrt.backends import cuda

    if cuda.problem() is None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendUnavailableError, match="NVIDIA driver"):
        Engine.load(gpu_engine(precision), backend="tensorrt")
    with pytest.raises(BackendUnavailableError, match="tensorrt"):
        Engine.load(demo_engine("fp32"), backend="tensorrt")
    with pytest.raises(BackendUnavailableError, match="cuda"):
        Engine.load(gpu_engine(precision), backend="onnxruntime", provider="cuda")
    with pytest.raises(BackendUnavailableError):
        Engine.load(gpu_engine(precision), devices=[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_standard_graph_loads_in_tools_that_users_know(
    precision: str, gpu_engine: Callable[[str], Path]
) -> None:
    from optimum.onnxruntime import ORTModelForMaskedLM

    folder = gpu_engine(precision)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer([TEXT, "A [MASK]."], padding=True, return_tensors="np")
    theirs = ORTModelForMaskedLM.from_pretrained(folder)(**encoded).logits
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    bare = session.run(["logits"], {name: np.asarray(values, np.int64) for name, values in encoded.items()})[
        0
    ]
    np.testing.assert_array_equal(np.asarray(theirs), bare)
    with Engine.load(folder, threads=2) as engine:
        answers = engine.fill_mask(TEXT, top_k=5)
    row = int(np.flatnonzero(encoded["input_ids"][0] == tokenizer.mask_token_id)[0])
    probabilities = torch.from_numpy(bare[0, row]).softmax(-1)
    # A bare session leaves out roundings between float16 operators, and in int8 those move values over borders.
    tolerance = {"fp32": 1e-5, "fp16": 1e-3, "int8": 0.02}[precision]
    for answer in answers:
        assert answer["score"] == pytest.approx(float(probabilities[answer["token"]]), abs=tolerance)


def test_what_does_not_suit_the_target(tmp_path: Path) -> None:
    out = tmp_path / "engine"
    with open_checkpoint("demo") as checkpoint:

        def refused(message: str, **options: Any) -> None:
            with pytest.raises(ExportError, match=message):
                export_engine(checkpoint, out, **options)
            assert not out.exists()

        refused(
            "target tensorrt has standard operators only", target="tensorrt", precision="fp16", dialect="ort"
        )
        refused("which share its graphs", target="tensorrt", precision="fp16", backends=["onnxruntime"])
        refused("no backend computes in fp8 on a CPU", precision="fp8")
        calibration = calibrate(checkpoint, default_text(checkpoint), precision="int8", max_texts=16)
        refused(
            "calibration is for int8 and fp8", target="tensorrt", precision="fp16", calibration=calibration
        )
        refused("calibration is for int8 and fp8", precision="int8", calibration=calibration)


def test_an_engine_that_fails_its_check_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "_PARTS_TOLERANCE", -1.0)
    with open_checkpoint("demo") as checkpoint, pytest.raises(ExportError, match="the two graphs disagree"):
        export_engine(checkpoint, tmp_path / "engine", precision="fp16", target="tensorrt")
    assert list(tmp_path.iterdir()) == []


def test_parts_of_another_engine_are_refused(
    tmp_path: Path, gpu_engine: Callable[[str], Path], small_bert: Any, save_checkpoint: Any
) -> None:
    with open_checkpoint(save_checkpoint(small_bert())) as checkpoint:
        export_engine(checkpoint, tmp_path / "small", precision="fp32", target="tensorrt")
    folder = tmp_path / "small"
    for name in ("encoder.onnx", "mlm.onnx", "pooler.onnx", "model.onnx", "model.onnx_data"):
        (folder / name).write_bytes((gpu_engine("fp32") / name).read_bytes())
    value = json.loads((folder / MANIFEST_NAME).read_text())
    value["files"] = {
        name: {"size": record.size, "sha256": record.sha256} for name, record in record_files(folder).items()
    }
    (folder / MANIFEST_NAME).write_text(json.dumps(value))
    with pytest.raises(ShapeMismatchError, match="'encoder.onnx' was built for hidden_size 256"):
        Engine.load(folder, threads=1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text(
        "\n".join(f"The {word} went to the old house by the sea." for word in "abcdefghijklmnop")
    )
    out = tmp_path / "engine"
    command = [
        "export",
        "demo",
        str(out),
        "--target",
        "tensorrt",
        "--precision",
        "int8",
        "--calibrate",
        str(texts),
    ]
    assert main([*command, "--method", "max", "--calibrate-tokens", "9", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["target"], value["backends"]) == ("tensorrt", ["tensorrt", "onnxruntime"])
    assert value["calibration"]["method"] == "max"
    assert value["calibration"]["max_tokens"] == 9
    # One text is longer than 9 tokens: it is cut into windows, each of which counts.
    assert value["calibration"]["texts"] > 16
    assert main(["info", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"not built; run: bertrt build {out}" in shown
    assert "texts.txt" in shown
    assert main(command) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--calibrate", "x.txt"],
        ["--method", "max"],
        ["--calibrate-tokens", "512"],
        ["--method", "max", "--target", "tensorrt", "--precision", "fp16"],
    ],
)
def test_options_of_calibration_where_there_is_none(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "demo", str(tmp_path / "engine"), *options]) == 2
    assert "is for --precision int8 or fp8 with --target tensorrt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dialect", "ort"], "leave the dialect out, or take onnx"),
        (["--backend", "native"], "leave the backends out"),
        ([], "exists; choose another place or pass --overwrite"),
        (["--overwrite"], "exists and is not an engine folder; it is not overwritten"),
    ],
)
def test_arguments_are_refused_before_anything_is_calibrated(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def calibrates(*_: Any, **__: Any) -> Any:
        raise AssertionError("calibration takes minutes")

    monkeypatch.setattr("bertrt_export.commands.export.calibrate", calibrates)
    monkeypatch.setattr("bertrt_export.exporter.calibrate", calibrates)
    out = tmp_path / "engine"
    if not options or options == ["--overwrite"]:
        out.mkdir()
        (out / "a file").touch()
    arguments = ["--target", "tensorrt", "--precision", "int8", *options]
    assert main(["export", "demo", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    asked: dict[str, Any] = {}
    if "--dialect" in options:
        asked["dialect"] = "ort"
    if "--backend" in options:
        asked["backends"] = ["native"]
    with open_checkpoint("demo") as checkpoint, pytest.raises(ExportError, match=re.escape(message)):
        export_engine(
            checkpoint,
            out,
            precision="int8",
            target="tensorrt",
            overwrite="--overwrite" in options,
            **asked,
        )
