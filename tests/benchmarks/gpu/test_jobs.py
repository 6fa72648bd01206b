"""Jobs: what is installed, exports, plans, drift."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bertrt.folder import EngineFolder
from bertrt.plans import Profile
from bertrt_bench.gpu import jobs
from bertrt_bench.gpu.lineup import ONNXRUNTIME, ORT_CUDA, TENSORRT, TORCH, TRITON


def look(library: str, device: str = "cuda") -> dict[str, Any]:
    return jobs.probe({"library": library, "device": device})


def test_what_is_installed() -> None:
    found = {library: look(library, "cpu") for library in jobs.libraries_of("cpu")}
    assert all(library["problem"] is None and library["version"] for library in found.values())
    assert "cuda" in found[TORCH]["built"]
    assert jobs.versions()["transformers"]


def test_what_is_looked_for_on_a_gpu() -> None:
    libraries = set(jobs.libraries_of("cuda"))
    assert {TRITON, TENSORRT, ORT_CUDA, *jobs.libraries_of("cpu")} <= libraries
    for library in (TRITON, TENSORRT, ORT_CUDA):
        assert set(look(library)) == {"version", "problem"}


@pytest.mark.parametrize("failure", [ModuleNotFoundError("no torch"), OSError("no libcudart\nat all")])
def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    load = importlib.import_module

    def fail(name: str) -> Any:
        if name in {"torch", "onnxruntime"}:
            raise failure
        return load(name)

    monkeypatch.setattr(importlib, "import_module", fail)
    for name in (TORCH, ONNXRUNTIME, ORT_CUDA):
        assert look(name)["problem"] == (
            f'{name.split()[0]} is not installed; pip install "bertrt[{"torch" if name == TORCH else "ort"}]"'
            if isinstance(failure, ModuleNotFoundError)
            else f"{name.split()[0]} does not load (no libcudart); install it again"
        )


def test_pytorch_that_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = importlib.import_module("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no GPU; install its build for the CUDA of this driver" in look(TORCH)["problem"]
    # In a rehearsal that is none.
    assert look(TORCH, "cpu")["problem"] is None


def test_an_export_is_for_gpus(tmp_path: Path) -> None:
    out = tmp_path / "engine"
    found = jobs.export({"checkpoint": "demo", "random": False, "precision": "fp16", "out": str(out)})
    manifest = EngineFolder.open(out).manifest
    assert (manifest.target, manifest.precision, manifest.source.kind) == ("tensorrt", "fp16", "demo")
    assert found["engine_bytes"] == sum(record.size for record in manifest.files.values())
    assert found["export_seconds"] > 0


def test_a_build_asks_for_its_profiles(
    gpu_engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def build(folder: EngineFolder, *, profiles: list[Profile]) -> Any:
        asked.update(folder=folder.path, profiles=profiles)
        return SimpleNamespace(plan=SimpleNamespace(to_json=lambda: {"library": "abacus"}))

    monkeypatch.setattr("bertrt_export.plans.build_plans", build)
    folder = gpu_engine("fp16")
    found = jobs.build({"folder": str(folder), "profiles": ["1x1..8x128..32x512"]})
    assert asked == {"folder": folder, "profiles": [Profile((1, 1), (8, 128), (32, 512))]}
    assert found["plan"] == {"library": "abacus"}


def test_drift_without_transformers(
    gpu_engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = {
        "checkpoint": "demo",
        "folder": str(gpu_engine("fp16")),
        "backend": "onnxruntime:cpu",
        "device": "cpu",
        "text": None,
        "examples": 10,
        "threads": 2,
    }
    theirs = jobs.drift(request)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    ours = jobs.drift(request)
    assert theirs["reference"] == "transformers in float32 on the CPU"
    assert ours["reference"] == "plain PyTorch in float32 on the cpu, without transformers"
    # fp16 is off by 2**-11 at each step; the two references by 6e-8.
    for name, value in theirs["figures"].items():
        assert ours["figures"][name] == pytest.approx(value, rel=0.02, abs=1e-4), name
    for found in (theirs, ours):
        assert (found["violations"], found["examples"], found["text"]) == ([], 10, "evaluation.txt")
        assert found["figures"]["logit_error_max"] > 1e-4
        assert set(found["budgets"]) <= set(found["figures"])


def test_drift_over_its_budgets(gpu_engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertrt_export.drift.budgets.DEFAULT_BUDGETS", {"fp16": {"logit_error_max": 1e-9}})
    found = jobs.drift(
        {
            "checkpoint": "demo",
            "folder": str(gpu_engine("fp16")),
            "backend": "onnxruntime:cpu",
            "device": "cpu",
            "text": None,
            "examples": 2,
            "threads": 2,
        }
    )
    (violation,) = found["violations"]
    assert violation.startswith("logit_error_max is ")
