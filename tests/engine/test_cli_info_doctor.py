"""``bertrt info``, ``bertrt doctor``, and what every command says of an engine that is not sound."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from bertrt.backends.registry import BackendStatus
from bertrt.cli import doctor, main
from bertrt.cli.info import count_parameters
from bertrt.engine import Engine
from bertrt.folder import EngineFolder
from bertrt.manifest import Heads, Manifest
from bertrt.plans import Plan, Profile
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.exporter import export_engine

TEXT = "He opened the [MASK] and went into the house."


def test_info(ask: Callable[..., str], engine_folder: Path, loaded: Engine) -> None:
    text = ask("info")
    assert loaded.manifest is not None
    for expected in [
        "demo (demo), weights ",
        "4 layers, 256 wide, 4 heads, feed-forward 1024 (gelu)",
        "8,192 WordPieces, 512 positions",
        "fp32, dialect ort",
        "masked LM, next sentence, pooler",
        "onnxruntime",
        "sizes checked",
        "not measured; run: bertrt drift ",
        *loaded.manifest.files,
    ]:
        assert expected in text
    assert "hashes verified" in ask("info", "--verify")

    value = json.loads(ask("info", "--json"))
    own = {"path", "parameters", "total_bytes", "backend_bytes", "verified"}
    assert {key: value[key] for key in value if key not in own} == json.loads(
        (engine_folder / "engine.json").read_text()
    )
    assert value["path"] == str(engine_folder)
    assert value["verified"] is False
    files = [path for path in engine_folder.iterdir() if path.name != "engine.json"]
    assert value["total_bytes"] == sum(path.stat().st_size for path in files)
    for name, read in {
        "native": ["model.bertrt"],
        "onnxruntime": ["engine.onnx", "model.onnx_data"],
    }.items():
        assert value["backend_bytes"][name] == sum((engine_folder / file).stat().st_size for file in read)
        assert re.search(rf"^ +\S+ MB  {name} +{', '.join(read)}$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        (transformers.BertForPreTraining, Heads(mlm=True, nsp=True, pooler=True)),
        (transformers.BertForMaskedLM, Heads(mlm=True, nsp=False, pooler=False)),
        (transformers.BertForNextSentencePrediction, Heads(mlm=False, nsp=True, pooler=True)),
        (transformers.BertModel, Heads(mlm=False, nsp=False, pooler=True)),
    ],
)
def test_parameters_are_counted_as_by_pytorch(model: Any, heads: Heads, loaded: Engine) -> None:
    sizes: dict[str, Any] = loaded.architecture.to_json()
    with torch.device("meta"):
        reference = model(transformers.BertConfig(**sizes))
    reference.tie_weights()
    assert count_parameters(loaded.architecture, heads) == reference.num_parameters()


def test_info_shows_the_drift(ask: Callable[..., str], copied: Path) -> None:
    folder = EngineFolder.open(copied)
    drift = {"passed": True, "top1_agreement": 0.99871234, "budget": {"max": None, "names": ["a", "b"]}}
    folder.replace_manifest(folder.manifest.with_drift(drift))
    text = ask("info", engine=copied)
    assert re.search(r"^ +top1_agreement +0\.998712$", text, re.MULTILINE)
    assert re.search(r"^ +budget +max -, names a, b$", text, re.MULTILINE)


@pytest.mark.parametrize("arguments", [[], ["--verify"], ["--json"]])
def test_info_on_a_truncated_engine(arguments: list[str], ask: Callable[..., str], copied: Path) -> None:
    data = (copied / "engine.onnx").read_bytes()
    (copied / "engine.onnx").write_bytes(data[:-1])
    ask("info", *arguments, engine=copied, code=2, error=".*engine.onnx.* truncated or was replaced")


def test_info_verifies_hashes_only_when_asked(ask: Callable[..., str], copied: Path) -> None:
    data = bytearray((copied / "engine.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copied / "engine.onnx").write_bytes(data)
    ask("info", engine=copied)
    ask("info", "--verify", engine=copied, code=2, error=".*engine.onnx.* corrupt or was replaced")
    # A command that loads verifies what it reads unless told not to.
    onnxruntime = ("--backend", "onnxruntime")
    ask(
        "fill-mask",
        TEXT,
        *onnxruntime,
        engine=copied,
        code=2,
        error=".*engine.onnx.* corrupt or was replaced",
    )


@pytest.mark.parametrize("command", ["info", "fill-mask", "next-sentence", "features"])
def test_not_an_engine(command: str, ask: Callable[..., str], tmp_path: Path) -> None:
    texts = {"info": [], "next-sentence": ["a", "b"]}.get(command, [TEXT])
    ask(command, *texts, engine=tmp_path / "no", code=2, error="there is no engine folder at ")
    ask(command, *texts, engine=tmp_path, code=2, error=".* has no engine.json")
    (tmp_path / "engine.json").write_text('{"format": "bertrt-engine", "format_version": 99}')
    ask(command, *texts, engine=tmp_path, code=2, error="the engine has format version 99")


def test_a_manifest_that_leaves_the_folder(ask: Callable[..., str], copied: Path) -> None:
    manifest = (copied / "engine.json").read_text()
    (copied / "engine.json").write_text(manifest.replace('"config.json"', '"../../etc/passwd"'))
    ask("info", engine=copied, code=2, error="engine.json names the file '../../etc/passwd'")


def test_random_weights_are_announced(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = EngineFolder.open(copied)
    source = dataclasses.replace(folder.manifest.source, kind="random", seed=7)
    manifest: Manifest = dataclasses.replace(folder.manifest, source=source)
    folder.replace_manifest(manifest)
    assert main(["fill-mask", str(copied), TEXT, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "random" in captured.err
    assert len(json.loads(captured.out)) == 5
    assert main(["info", str(copied)]) == 0
    assert "seed 7: random weights, for latency only" in capsys.readouterr().out


def test_a_head_that_is_not_there(
    ask: Callable[..., str], small_bert: Any, save_checkpoint: Any, tmp_path: Path
) -> None:
    with open_checkpoint(save_checkpoint(small_bert().bert)) as checkpoint:
        export_engine(checkpoint, tmp_path / "engine", precision="fp32")
    engine = tmp_path / "engine"
    ask("fill-mask", "[MASK]", engine=engine, code=2, error="fill_mask needs the masked-LM head")
    ask("next-sentence", "a", "b", engine=engine, code=2, error="next_sentence needs the next-sentence head")
    assert len(json.loads(ask("features", "a b", engine=engine))) == 24


@pytest.mark.usefixtures("no_kernels")
def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BERTRT_CACHE", str(tmp_path))
    assert main(["doctor", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["machine"]["usable_cpus"] >= 1
    native, tensorrt, onnxruntime = value["backends"]
    assert {"name": "onnxruntime", "available": True, "reason": ""}.items() <= onnxruntime.items()
    assert (native["name"], native["available"], native["isa"]) == ("native", False, None)
    assert "BERTRT_KERNELS=OFF" in native["reason"]
    assert tensorrt["name"] == "tensorrt"
    # What is missing for a GPU is said, or what there is.
    assert bool(value["gpus"]["devices"]) == (value["gpus"]["problem"] is None)
    assert [provider["name"] for provider in value["providers"]] == ["cpu", "cuda", "tensorrt"]
    assert value["providers"][0]["problem"] is None
    assert value["kernels"] == []
    assert value["c_library"] == {"include": None, "library_dir": None, "problem": native["reason"]}
    assert value["cache"] == {"path": str(tmp_path), "engines": [], "problem": None}
    assert {package["name"]: package["install"] for package in value["packages"]}["torch"] is None

    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "engine.json").touch()
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for expected in [str(tmp_path), "demo", "onnxruntime", "cores", "memory", value["machine"]["python"]]:
        assert expected in text


def test_doctor_tells_of_the_kernels(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kernels: ModuleType
) -> None:
    folder = Path(kernels.__file__ or "").parent
    (folder / "include").mkdir()
    (folder / "include" / "bertrt.h").touch()
    monkeypatch.setenv("BERTRT_ISA", "plain")
    assert main(["doctor", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert {"name": "native", "available": True, "version": "1.2.3", "isa": "plain"}.items() <= value[
        "backends"
    ][0].items()
    assert value["kernels"] == [
        {"name": "huge", "active": False, "reason": "the processor lacks it"},
        {"name": "quick", "active": False, "reason": ""},
        {"name": "plain", "active": True, "reason": ""},
    ]
    missing = f"there is no libbertrt.so in '{folder / 'lib'}'"
    assert value["c_library"]["include"] == str(folder / "include")
    assert value["c_library"]["library_dir"] is None
    assert value["c_library"]["problem"].startswith(missing)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for line in (
        r"native +1\.2\.3 +available, with plain",
        "huge +the processor lacks it",
        "quick +can be used: BERTRT_ISA=quick",
        "plain +in use",
        f"include +{re.escape(str(folder / 'include'))}",
        f"missing +{re.escape(missing)}.*",
    ):
        assert re.search(rf"^ +{line}$", text, re.MULTILINE), line


def test_doctor_names_an_instruction_set_that_cannot_be_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kernels: ModuleType
) -> None:
    monkeypatch.setenv("BERTRT_ISA", "huge")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^ +native +1\.2\.3 +BERTRT_ISA=huge cannot be used", text, re.MULTILINE)
    assert "in use" not in text


def test_doctor_names_a_variable_that_is_neither_0_nor_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kernels: ModuleType
) -> None:
    monkeypatch.setenv("BERTRT_PIN_THREADS", "2")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^ +native +1\.2\.3 +BERTRT_PIN_THREADS must be 0 or 1, got '2'", text, re.MULTILINE)


def test_doctor_says_why_and_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status = BackendStatus(name="abacus", available=False, version=None, reason="no beads; buy some")
    monkeypatch.setattr(doctor, "backend_status", lambda: [status])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.delenv("BERTRT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", no_home)
    assert main(["doctor"]) == 1  # nothing can run
    text = capsys.readouterr().out
    assert re.search(r"^ +abacus +- +no beads; buy some$", text, re.MULTILINE)
    for module, extra in {"torch": "torch", "openvino": "bench", "nncf": "bench"}.items():
        assert re.search(rf'^ +{module} +- +pip install "bertrt\[{extra}\]"$', text, re.MULTILINE)
    assert "set BERTRT_CACHE" in text


def test_info_tells_of_a_plan(
    gpu_engine: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = EngineFolder.open(shutil.copytree(gpu_engine("int8"), tmp_path / "my engine"))
    assert main(["info", str(folder.path)]) == 0
    text = capsys.readouterr().out
    # As a shell takes it.
    assert f"not built; run: bertrt build '{folder.path}'" in text
    assert re.search(r"^ +method +max$", text, re.MULTILINE)
    products = [{"name": "a", "operands": "int8"}, {"name": "b", "operands": "int8"}]
    plan = Plan(
        library="tensorrt",
        version="11.4",
        compute_capabilities=("8.9", "9.0"),
        profiles=(Profile.parse("1x1..8x128..32x512"),),
        mlm_rows=64,
        report={"encoder": {"layers": 7, "fused_attention": 4, "products": products}, "odd": "else"},
    )
    folder.replace_manifest(dataclasses.replace(folder.manifest, plan=plan))
    assert main(["info", str(folder.path)]) == 0
    text = capsys.readouterr().out
    for line in (
        r"library +tensorrt 11\.4",
        r"compute capability +8\.9, 9\.0",
        r"profiles +1x1\.\.8x128\.\.32x512",
        r"encoder +layers 7, fused attention 4, products in int8 2",
        r"odd +else",
    ):
        assert re.search(rf"^ +{line}$", text, re.MULTILINE), line
