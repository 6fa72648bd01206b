"""TensorRT plans that cannot be loaded: no GPU, no library, no such GPU, folders that do not fit.

On a machine whose GPUs are not there (`fakes/`).
"""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_machine as machine
import pytest

from bertrt.backends.registry import create_backend
from bertrt.backends.tensorrt.backend import TensorRTBackend
from bertrt.errors import (
    BackendRunError,
    BackendUnavailableError,
    InputError,
    ManifestError,
    MissingFileError,
    PlanMismatchError,
    ShapeMismatchError,
)
from bertrt.folder import EngineFolder, record_files

PROFILES = ("1x1..1x32..1x64", "1x1..2x32..4x64")


@pytest.fixture(scope="module")
def folder(fake_plans: Callable[..., EngineFolder]) -> EngineFolder:
    """Do not change it."""
    return fake_plans(profiles=PROFILES, most_mlm_rows=8)


@pytest.fixture
def spoiled(folder: EngineFolder, tmp_path: Path) -> Callable[..., EngineFolder]:
    """A function that changes a copy of the folder, and its hashes with it."""
    copy = EngineFolder.open(shutil.copytree(folder.path, tmp_path / "spoiled"))

    def change(plan: dict[str, Any] | None = None, **files: bytes) -> EngineFolder:
        for part, data in files.items():
            (copy.path / f"{part}.plan").write_bytes(data)
        manifest = dataclasses.replace(copy.manifest, files=record_files(copy.path))
        if plan is not None:
            assert manifest.plan is not None
            manifest = dataclasses.replace(manifest, plan=dataclasses.replace(manifest.plan, **plan))
        return copy.replace_manifest(manifest)

    return change


def test_without_a_gpu(gpu: Any, folder: EngineFolder) -> None:
    gpu.driver = 0
    for make in (TensorRTBackend, lambda folder: create_backend("tensorrt", folder)):
        with pytest.raises(BackendUnavailableError, match="no NVIDIA driver was found; install it"):
            make(folder)


def test_without_the_library(gpu: Any, folder: EngineFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("bertrt.backends.tensorrt.library.is_installed", lambda name: False)
    with pytest.raises(BackendUnavailableError, match=r'pip install "bertrt\[tensorrt\]"'):
        TensorRTBackend(folder)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ([2], "there is no GPU 2: there are 2 GPUs, 0 to 1"),
        ([0, -1], "there is no GPU -1"),
        ([True], "there is no GPU True"),
        (["0"], "there is no GPU '0'"),
        ([1, 1], r"names a GPU twice: \[1, 1\]"),
        ([], "names no GPU"),
    ],
)
def test_devices_that_are_not_there(gpu: Any, folder: EngineFolder, devices: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TensorRTBackend(folder, devices=devices)
    assert not gpu.contexts


def test_no_plan(gpu: Any, folder: EngineFolder, gpu_engine: Callable[[str], Path]) -> None:
    with pytest.raises(
        ManifestError, match=r"has no TensorRT plan of the encoder; build it with: bertrt build "
    ):
        TensorRTBackend(EngineFolder.open(gpu_engine("fp32")))
    manifest = dataclasses.replace(folder.manifest, plan=None)
    with pytest.raises(ManifestError, match=r"has no TensorRT plan; build it with: bertrt build "):
        TensorRTBackend(EngineFolder(folder.path, manifest))


def test_a_plan_for_another_machine_is_not_opened(gpu: Any, spoiled: Callable[..., EngineFolder]) -> None:
    for plan, message in (
        ({"version": "11.0.0.1"}, "was built by tensorrt 11.0.0.1, which alone reads it"),
        ({"compute_capabilities": ("9.0",)}, "for compute capability 9.0; this GPU has 8.9"),
    ):
        with pytest.raises(PlanMismatchError, match=message) as caught:
            TensorRTBackend(spoiled(plan))
        assert "bertrt build" in str(caught.value)
    assert not gpu.contexts


def test_a_gpu_that_the_library_does_not_build_for(
    gpu: Any, spoiled: Callable[..., EngineFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    gpu.compute_capability = (9, 0)
    with pytest.raises(PlanMismatchError, match="tensorrt_rtx builds none for this GPU") as caught:
        TensorRTBackend(spoiled())
    assert str(caught.value).endswith("--compute-capability 9.0 --library tensorrt")


def test_a_plan_that_was_built_on_another_kind_of_gpu(gpu: Any, spoiled: Callable[..., EngineFolder]) -> None:
    folder = spoiled({"device": "Imaginary GPU 0"})
    TensorRTBackend(folder).close()
    with pytest.warns(
        RuntimeWarning, match="built on another kind of GPU, Imaginary GPU 0; GPU 1 is Imaginary GPU 1"
    ) as caught:
        TensorRTBackend(folder, devices=[0, 1]).close()
    assert len(caught) == 1


def test_what_the_library_remarks_is_passed_on(gpu: Any, folder: EngineFolder) -> None:
    gpu.warnings_of_library = [
        "Using an engine plan file across different models of devices is not supported"
    ]
    with pytest.warns(RuntimeWarning, match="^TensorRT on GPU 1: Using an engine plan file across") as caught:
        TensorRTBackend(folder, devices=[1]).close()
    # Three plans are loaded; what is said of all of them is said once.
    assert len(caught) == 1
    # Whoever takes warnings for errors gets one, and nothing is left behind.
    with pytest.raises(RuntimeWarning):
        TensorRTBackend(folder)
    gc.collect()
    assert not gpu.live()


def test_files_that_are_no_plans(
    gpu: Any, spoiled: Callable[..., EngineFolder], folder: EngineFolder
) -> None:
    with pytest.raises(PlanMismatchError, match=r"'encoder\.plan' is none: it does not begin as plans do"):
        TensorRTBackend(spoiled(encoder=b""))
    good = (folder.path / "mlm.plan").read_bytes()
    cut = spoiled(encoder=(folder.path / "encoder.plan").read_bytes(), mlm=good[:100])
    with pytest.raises(BackendRunError, match=r"could not load 'mlm\.plan'.*Serialization") as caught:
        TensorRTBackend(cut)
    assert "if the file is to blame, build it again: bertrt build" in str(caught.value)
    (cut.path / "mlm.plan").unlink()
    with pytest.raises(MissingFileError):
        TensorRTBackend(cut)
    del caught
    gc.collect()
    assert not gpu.live()


def test_plans_that_are_not_the_manifests(
    gpu: Any, spoiled: Callable[..., EngineFolder], folder: EngineFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {part: (folder.path / f"{part}.plan").read_bytes() for part in ("encoder", "mlm", "pooler")}

    def edit(part: str, change: Callable[[dict[str, Any]], None]) -> bytes:
        content = json.loads(data[part][64:])
        change(content)
        return data[part][:64] + json.dumps(content).encode()

    with pytest.raises(
        ShapeMismatchError, match=r"'pooler\.plan' has the tensors .*mlm_logits.*manifest implies"
    ):
        TensorRTBackend(spoiled(pooler=data["mlm"]))
    fewer = edit("encoder", lambda content: content["profiles"].pop())
    with pytest.raises(ShapeMismatchError, match=r"'encoder\.plan' has 1 profiles, the manifest implies 2"):
        TensorRTBackend(spoiled(encoder=fewer))
    other = edit(
        "encoder", lambda content: content["profiles"][1].update(input_ids=[[1, 1], [1, 1], [4, 80]])
    )
    with pytest.raises(
        ShapeMismatchError, match=r"holds 'input_ids' from \(1, 1\) to \(4, 80\), .* to \(4, 64\)"
    ):
        TensorRTBackend(spoiled(encoder=other))
    with pytest.raises(
        ShapeMismatchError, match=r"holds 'mlm_positions' from \(1,\) to \(8,\), .* to \(9,\)"
    ):
        TensorRTBackend(spoiled({"mlm_rows": 9}, **data))
    folder_ = spoiled({"mlm_rows": 8}, **data)
    larger = dataclasses.replace(folder_.manifest.architecture, vocab_size=8200)
    manifest = dataclasses.replace(folder_.manifest, architecture=larger)
    with pytest.raises(
        ShapeMismatchError, match=r"has 'mlm_logits' of shape \(-1, 8192\), .* a width of 8200"
    ):
        TensorRTBackend(EngineFolder(folder_.path, manifest))
    types = machine.fake_tensorrt._TYPES
    monkeypatch.setitem(types, "tensor(int64)", types["tensor(int32)"])
    with pytest.raises(ShapeMismatchError, match=r"has 'mlm_\w+' in type INT32, the manifest implies INT64"):
        TensorRTBackend(folder_)
    gc.collect()
    assert not gpu.live()
