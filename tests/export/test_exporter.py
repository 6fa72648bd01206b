"""The exporter from end to end: what a folder holds, who can load it, and what happens when it goes wrong."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import bertrt_export.exporter as exporter_module
from bertrt import Engine
from bertrt.cli import main
from bertrt.errors import CheckpointError, ExportError, NonFiniteWeightsError
from bertrt.folder import EngineFolder
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.exporter import export_engine

TEXT = "The man worked as a [MASK] in the old house."


def test_what_a_folder_holds(demo_engine: Callable[..., Path]) -> None:
    folder = EngineFolder.open(demo_engine("int8"))
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "config.json",
        "engine.json",
        "engine.onnx",
        "model.bertrt",
        "model.onnx",
        "model.onnx_data",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    manifest = folder.manifest
    assert manifest.precision == "int8"
    assert not manifest.latency_only
    assert manifest.source.kind == "demo"
    assert manifest.heads.mlm
    assert manifest.heads.nsp
    # Query, key, value, output and two of the feed-forward in 4 layers; the head's decoder.
    assert manifest.graph["operators"]["MatMulIntegerToFloat"] == 4 * 6 + 1
    assert manifest.graph["operators"]["MultiHeadAttention"] == 4
    assert manifest.versions["onnx"] == onnx.__version__


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_optimum_and_a_bare_session_give_the_same_logits(
    precision: str, demo_engine: Callable[..., Path]
) -> None:
    from optimum.onnxruntime import ORTModelForMaskedLM

    folder = demo_engine(precision)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = ORTModelForMaskedLM.from_pretrained(folder)
    encoded = tokenizer([TEXT, "A [MASK]."], padding=True, return_tensors="np")
    theirs = model(**encoded).logits
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    bare = session.run(
        ["logits"],
        {name: np.asarray(values, np.int64) for name, values in encoded.items()},
    )[0]
    np.testing.assert_array_equal(np.asarray(theirs), bare)
    with Engine.load(folder, threads=2, backend="onnxruntime") as engine:
        answers = engine.fill_mask(TEXT, top_k=5)
    row = int(np.flatnonzero(encoded["input_ids"][0] == tokenizer.mask_token_id)[0])
    probabilities = torch.from_numpy(bare[0, row]).softmax(-1)
    top = probabilities.topk(5)
    assert [answer["token"] for answer in answers] == top.indices.tolist()
    # The two graphs take their float32 sums over other blocks; in int8 a value at a rounding border may move.
    tolerance = 2e-3 if precision == "int8" else 1e-5
    assert [answer["score"] for answer in answers] == pytest.approx(top.values.tolist(), abs=tolerance)


def test_transformers_reads_config_and_tokenizer(demo_engine: Callable[..., Path]) -> None:
    folder = demo_engine("int8")
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.hidden_size, config.vocab_size) == ("bert", 256, 8192)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with Engine.load(folder) as engine:
        (encoded,) = engine.tokenizer.encode([TEXT], max_length=512)
        assert tokenizer(TEXT)["input_ids"] == encoded[0].input_ids.tolist()


def test_export_is_deterministic(tmp_path: Path, demo_engine: Callable[..., Path]) -> None:
    first = EngineFolder.open(demo_engine("int8"))
    with open_checkpoint("demo") as checkpoint:
        again = export_engine(checkpoint, tmp_path / "again", precision="int8")
    assert again.files == first.manifest.files


def test_random_weights_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bertrt_export.checkpoints import random_weights

    # The real shape would take a second; the marking does not depend on it.
    name = "bert-base-cased"
    assert name in random_weights.RANDOM_MODELS
    with open_checkpoint(name, random=True, seed=3) as checkpoint:
        assert checkpoint.source.kind == "random"
        assert checkpoint.source.seed == 3
        sizes = checkpoint.architecture
        assert (sizes.hidden_size, sizes.num_hidden_layers, sizes.vocab_size) == (768, 12, 28996)


def test_memory_stays_near_the_largest_tensor(tmp_path: Path) -> None:
    with open_checkpoint("bert-base-cased", random=True) as checkpoint:
        tracemalloc.start()
        try:
            export_engine(checkpoint, tmp_path / "engine", precision="int8")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    table = 28996 * 768 * 4
    # The whole model is 433 MB. Quantising holds a few arrays of the size of the one at hand.
    assert peak < 5 * table
    manifest = EngineFolder.open(tmp_path / "engine", verify=False).manifest
    assert manifest.latency_only
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "engine").iterdir()}
    assert sizes.pop("model.bertrt") < 115e6
    assert sum(sizes.values()) < 140e6


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(
    value: float, small_bert: Any, save_checkpoint: Any, tmp_path: Path
) -> None:
    folder = save_checkpoint(small_bert())
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.encoder.layer.1.output.dense.weight"][2, 3] = value
    save_file(tensors, folder / "model.safetensors")
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(NonFiniteWeightsError, match=r"layer\.1\.output\.dense\.weight.*1 of 960"),
    ):
        export_engine(checkpoint, tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_weights_out_of_reach_of_float16(small_bert: Any, save_checkpoint: Any, tmp_path: Path) -> None:
    model = small_bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[2, 3] = -1e5
    folder = save_checkpoint(model)
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(ExportError, match=r"layer\.1\.output\.dense' reach 1e\+05.*fp32 or int8"),
    ):
        export_engine(checkpoint, tmp_path / "engine", precision="fp16")
    assert list(tmp_path.iterdir()) == []


def test_weights_out_of_reach_of_float32(small_bert: Any, save_checkpoint: Any, tmp_path: Path) -> None:
    model = small_bert()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.output.LayerNorm.weight.fill_(3e38)
    with (
        open_checkpoint(save_checkpoint(model)) as checkpoint,
        pytest.raises(ExportError, match="not finite.*try another precision"),
    ):
        export_engine(checkpoint, tmp_path / "engine", precision="fp32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["write_weight_file", "build_graph", "record_files", "check_engine"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(28, "No space left on device")])
def test_interrupted_anywhere_leaves_nothing(
    step: str,
    error: Any,
    monkeypatch: pytest.MonkeyPatch,
    small_bert: Any,
    save_checkpoint: Any,
    tmp_path: Path,
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(exporter_module, step, fail)
    expected = ExportError if isinstance(error, OSError) else error
    with open_checkpoint(save_checkpoint(small_bert())) as checkpoint, pytest.raises(expected):
        export_engine(checkpoint, tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bertrt", *arguments], capture_output=True, text=True, **options
    )


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    import resource

    def limit() -> None:
        # The kernel refuses to make a file larger, as it refuses on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    result = command("export", "demo", str(tmp_path / "engine"), preexec_fn=limit)
    assert result.returncode == 2
    assert result.stderr.startswith("bertrt: error: cannot write the engine")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("written", ["model.bertrt", "model.onnx_data"])
def test_killed_politely_in_the_middle(written: str, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    process = subprocess.Popen(
        [sys.executable, "-m", "bertrt", "export", "bert-large-cased", str(out), "--random"],
        stderr=subprocess.PIPE,
        text=True,
    )
    # Once there are some megabytes of weights the export is under way; a large model takes long enough.
    while process.poll() is None:
        if any(path.stat().st_size > 4 << 20 for path in tmp_path.glob(f".engine.*/{written}")):
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "bertrt: error: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "engine"
    result = command("export", "demo", str(out), "--precision", "fp16", "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (answer["precision"], answer["latency_only"]) == ("fp16", False)
    assert EngineFolder.open(out).manifest.precision == "fp16"
    again = command("export", "demo", str(out))
    assert again.returncode == 2
    assert "exists" in again.stderr
    assert "--overwrite" in again.stderr
    replaced = command("export", "demo", str(out), "--overwrite", "--dialect", "onnx")
    assert replaced.returncode == 0, replaced.stderr
    assert EngineFolder.open(out).manifest.dialect == "onnx"


COMMON = {"config.json", "engine.json", "tokenizer.json", "tokenizer_config.json"}
FILES = {"native": {"model.bertrt"}, "onnxruntime": {"engine.onnx", "model.onnx", "model.onnx_data"}}


@pytest.mark.parametrize(
    ("precision", "asked", "backends"),
    [
        ("int8", None, ["native", "onnxruntime"]),
        ("fp32", None, ["native", "onnxruntime"]),
        ("fp16", None, ["onnxruntime"]),
        ("bf16", None, ["native"]),
        ("int8", ["native"], ["native"]),
        ("fp32", ["onnxruntime"], ["onnxruntime"]),
        ("fp32", ["onnxruntime", "native"], ["native", "onnxruntime"]),
        ("bf16", ["native"], ["native"]),
    ],
)
def test_a_folder_holds_what_its_backends_need(
    precision: Any,
    asked: list[str] | None,
    backends: list[str],
    small_bert: Any,
    save_checkpoint: Any,
    tmp_path: Path,
) -> None:
    with open_checkpoint(save_checkpoint(small_bert())) as checkpoint:
        export_engine(checkpoint, tmp_path / "engine", precision=precision, backends=asked)
    manifest = EngineFolder.open(tmp_path / "engine").manifest
    assert list(manifest.backends) == backends
    assert {path.name for path in (tmp_path / "engine").iterdir()} == COMMON.union(
        *(FILES[name] for name in backends)
    )
    assert manifest.precision == precision
    assert manifest.dialect == ("ort" if "onnxruntime" in backends else None)
    assert bool(manifest.graph) == ("onnxruntime" in backends)


@pytest.mark.parametrize(
    ("precision", "backends", "message"),
    [
        ("fp16", ["native"], "native does not compute in fp16, but in fp32, bf16, int8"),
        ("bf16", ["native", "onnxruntime"], "onnxruntime does not compute in bf16, but in fp32, fp16, int8"),
        ("int8", ["openvino"], "no backend 'openvino'; choose among native, onnxruntime"),
        ("int8", [], "one backend at least"),
    ],
)
def test_backends_that_cannot_be_had(
    precision: Any, backends: list[str], message: str, small_bert: Any, save_checkpoint: Any, tmp_path: Path
) -> None:
    with (
        open_checkpoint(save_checkpoint(small_bert())) as checkpoint,
        pytest.raises(ExportError, match=message),
    ):
        export_engine(checkpoint, tmp_path / "engine", precision=precision, backends=backends)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_the_native_kernels_cannot_run(
    small_bert: Any, save_checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = save_checkpoint(small_bert(hidden_size=264, num_attention_heads=1, num_hidden_layers=1))
    out = tmp_path / "engine"
    assert main(["export", str(wide), str(out)]) == 0
    assert list(EngineFolder.open(out).manifest.backends) == ["onnxruntime"]
    assert "int8 for onnxruntime, " in (said := capsys.readouterr().out)
    assert "; not for native: its attention heads are 264 wide, the native kernels' at most 256\n" in said
    assert main(["export", str(wide), str(tmp_path / "asked"), "--backend", "native,onnxruntime"]) == 2
    assert re.search(
        "native cannot run this model: .* 264 wide.*; export for onnxruntime", capsys.readouterr().err
    )
    assert main(["export", str(wide), str(tmp_path / "only"), "--precision", "bf16"]) == 2
    assert re.search("only native computes in bf16, .* another precision", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == [out]


def test_the_command_for_one_backend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "engine"
    assert main(["export", "demo", str(out), "--precision", "bf16", "--backend", "native", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["backends"], answer["dialect"], answer["left_out"]) == (["native"], None, {})
    assert answer["operators"] == {}


def test_a_closed_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("demo")
    checkpoint.close()
    with pytest.raises(CheckpointError, match="closed"):
        export_engine(checkpoint, tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []
