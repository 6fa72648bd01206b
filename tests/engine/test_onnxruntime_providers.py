"""ONNX Runtime's providers for GPUs: why one cannot be used, and an engine on them from its arguments to its answers.

No GPU is needed: the CPU takes its place.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from fake_machine import make_batch

from bertrt.backends import cuda
from bertrt.backends.base import Wanted
from bertrt.backends.onnxruntime import backend as module
from bertrt.backends.onnxruntime import providers as onnxruntime_providers
from bertrt.backends.onnxruntime.backend import OnnxRuntimeBackend, provider_problem
from bertrt.backends.onnxruntime.bindings import SessionPlace
from bertrt.backends.onnxruntime.providers import (
    CUDA,
    TENSORRT,
)
from bertrt.backends.onnxruntime.sessions import CPU_PROVIDER, load_graph
from bertrt.errors import BackendUnavailableError, InputError
from bertrt.folder import EngineFolder
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.exporter import export_engine

ON_CPU = [(CPU_PROVIDER, {})]


@pytest.fixture
def parts(exported: Callable[[str], EngineFolder]) -> EngineFolder:
    """The demo engine in parts, in float32."""
    return exported("fp32")


@pytest.fixture
def gpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if onnxruntime-gpu were installed, on a machine with a GPU and all libraries of CUDA."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU_PROVIDER])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(cuda, "problem", lambda: None)
    onnxruntime_providers._preload.cache_clear()
    monkeypatch.setattr(onnxruntime_providers, "_TENSORRT_LIBRARIES", ("libm.so.6",))


@pytest.fixture(autouse=True)
def _forget_what_was_loaded() -> Any:
    yield
    onnxruntime_providers._preload.cache_clear()


def test_providers_that_can_be_used(gpu_build: None) -> None:
    assert [provider_problem(name) for name in ("cpu", "cuda", "tensorrt")] == [None, None, None]


def test_an_unknown_provider() -> None:
    with pytest.raises(InputError, match="one of cpu, cuda, tensorrt, got 'rocm'"):
        provider_problem("rocm")


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (["onnxruntime"], "a build for CPUs; pip uninstall -y onnxruntime, then pip install"),
        (
            ["onnxruntime", "onnxruntime-gpu"],
            "both installed.*pip uninstall -y onnxruntime onnxruntime-gpu, then",
        ),
        ([], "a build for CPUs; pip uninstall -y onnxruntime, then"),
    ],
)
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_the_build_for_cpus(
    provider: str, installed: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        if package not in installed:
            raise onnxruntime_providers.metadata.PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU_PROVIDER])
    monkeypatch.setattr(onnxruntime_providers.metadata, "version", version)
    problem = provider_problem(provider)
    assert problem is not None
    assert re.search(message, problem), problem
    assert "bertrt[cuda]" in problem


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_what_is_wrong_with_cuda_itself(
    provider: str, gpu_build: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "problem", lambda: "the driver is too old")
    assert provider_problem(provider) == "the driver is too old"


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_libraries_of_cuda_that_are_missing(
    provider: str, gpu_build: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The library prints what is missing, on standard output; what it prints of other things is no problem."""
    calls = []

    def preload() -> None:
        calls.append(1)
        print("Failed to load libcurand.so.10: libcurand.so.10: cannot open shared object file: No such file")
        print("Please follow https://onnxruntime.ai/docs/install/#cuda-and-cudnn to install CUDA.")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload)
    for _ in range(2):
        assert provider_problem(provider) == (
            f"onnxruntime's provider {provider} lacks libraries (libcurand.so.10: cannot open shared object file: "
            'No such file); pip install "bertrt[cuda]"'
        )
    assert calls == [1]
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_library_that_loads_by_its_plain_name_is_there(
    gpu_build: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt is at the file in Python's packages; what it says of that is not the last word."""

    def preload() -> None:
        print(
            "Failed to load /site-packages/nvidia/cu13/lib/libcurand.so.10: /site-packages/nvidia/cu13: too short"
        )

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload)
    assert provider_problem("cuda") is None


def test_libraries_of_tensorrt_that_are_missing(gpu_build: None, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("libfirst_of_none.so.10", "libm.so.6")
    monkeypatch.setattr(onnxruntime_providers, "_TENSORRT_LIBRARIES", names)
    assert provider_problem("cuda") is None
    problem = provider_problem("tensorrt")
    assert problem is not None
    assert problem.startswith("onnxruntime's provider tensorrt lacks libraries (libfirst_of_none.so.10: ")
    assert 'pip install "tensorrt-cu13-libs>=10.14,<11"' in problem


def test_tensorrt_is_found_among_pythons_packages(
    gpu_build: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = "libbertrt_test_of_loading.so.10"
    package = tmp_path / "tensorrt_libs"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(onnxruntime_providers, "_TENSORRT_LIBRARIES", (name,))
    monkeypatch.setitem(sys.modules, "tensorrt_libs", None)
    monkeypatch.delitem(sys.modules, "tensorrt_libs")
    monkeypatch.syspath_prepend(tmp_path)
    assert provider_problem("tensorrt") is not None
    # Any library that loads.
    shared = "libonnxruntime_providers_shared.so"
    shutil.copy(Path(onnxruntime.__file__).parent / "capi" / shared, package / name)
    assert provider_problem("tensorrt") is None


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_an_engine_on_gpus(
    provider: str, gpu_build: None, parts: EngineFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the arguments to the answers, with the CPU in the place of two GPUs."""
    asked: list[Any] = []

    def places(folder: EngineFolder, *arguments: Any) -> list[SessionPlace]:
        asked.append(arguments[:3])
        return [
            SessionPlace(open=lambda part: load_graph(folder, part, 1, ON_CPU), device_type="cpu")
            for _ in arguments[1]
        ]

    monkeypatch.setattr(module, "gpu_places", places)
    monkeypatch.setattr(cuda, "device_properties", asked.append)
    backend = OnnxRuntimeBackend(parts, provider=provider, devices=[0, 3])
    assert asked == [0, 3, (provider, (0, 3), 1)]
    assert (backend.name, backend.threads, backend.pads) == ("onnxruntime", 1, True)
    batch, wanted = make_batch([300, 20, 300, 300, 300]), Wanted(hidden_states=True, pooled=True)
    found, expected = backend.run(batch, wanted), OnnxRuntimeBackend(parts, threads=1).run(batch, wanted)
    # float32 sums in another order.
    np.testing.assert_allclose(found.hidden_states, expected.hidden_states, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.pooled, expected.pooled, rtol=0, atol=1e-4)
    asked.clear()
    OnnxRuntimeBackend(parts, provider=provider, threads=2).close()
    assert asked == [0, (provider, (0,), 2)]


def test_a_gpu_that_is_not_there(
    gpu_build: None, parts: EngineFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(index: int) -> None:
        raise InputError(f"there is no GPU {index}")

    monkeypatch.setattr(cuda, "device_properties", refuse)
    with pytest.raises(InputError, match="there is no GPU 7"):
        OnnxRuntimeBackend(parts, provider="cuda", devices=[7])


def test_a_provider_that_cannot_be_used(parts: EngineFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU_PROVIDER])
    with pytest.raises(
        BackendUnavailableError, match="provider cuda cannot be used here: onnxruntime .* no CUDAExec"
    ):
        OnnxRuntimeBackend(parts, provider="cuda")


def test_an_engine_for_cpus_on_a_gpu(gpu_build: None, demo_engine: Callable[..., Path]) -> None:
    with pytest.raises(BackendUnavailableError, match="exported for CPUs.*--target tensorrt"):
        OnnxRuntimeBackend(EngineFolder.open(demo_engine("fp32")), provider="cuda")


def test_gpus_for_the_cpu(parts: EngineFolder) -> None:
    with pytest.raises(InputError, match="devices are GPUs"):
        OnnxRuntimeBackend(parts, devices=[0])


@pytest.mark.parametrize("problem", [None, "the driver is too old"])
def test_bf16_on_a_cpu(
    problem: str | None, gpu_build: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cuda, "problem", lambda: problem)
    with open_checkpoint("demo") as checkpoint:
        export_engine(checkpoint, tmp_path / "engine", precision="bf16", target="tensorrt")
    there = problem or "which can be used here"
    advice = rf"no bfloat16 on a CPU.*cuda \({there}\), or .*--backend native --precision bf16"
    with pytest.raises(BackendUnavailableError, match=advice):
        OnnxRuntimeBackend(EngineFolder.open(tmp_path / "engine"))
