"""When plans run on TensorRT, when another backend takes over, and when neither is right. On GPUs of ``fakes/``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bertrt.backends.placement import Placement
from bertrt.backends.registry import BackendStatus, backend_status, choose_backend, create_backend
from bertrt.errors import BackendUnavailableError, PlanMismatchError
from bertrt.folder import EngineFolder

ANYWHERE = Placement()
EITHER = pytest.mark.parametrize("library", ["tensorrt", "tensorrt_rtx"])


@pytest.fixture
def plans(fake_plans: Callable[..., EngineFolder]) -> Callable[[str], EngineFolder]:
    """A function that gives an engine with plans of a library; do not change it."""
    return lambda library: fake_plans(library, profiles=("1x1..1x32..1x64",), most_mlm_rows=8)


def remove(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)


def spoil(library: str) -> None:
    """Let a library be there, and not load."""
    del sys.modules[library].__version__  # type: ignore[attr-defined]


def status() -> BackendStatus:
    return next(status for status in backend_status() if status.name == "tensorrt")


@EITHER
def test_plans_run_on_tensorrt(gpu: Any, plans: Callable[[str], EngineFolder], library: str) -> None:
    assert choose_backend(None, plans(library), ANYWHERE) == "tensorrt"


@EITHER
@pytest.mark.parametrize("defect", ["old", "broken"])
def test_the_library_of_the_plan_is_what_counts(
    gpu: Any, plans: Callable[[str], EngineFolder], library: str, defect: str
) -> None:
    """Another one beside it may be too old, or broken."""
    other = {"tensorrt": "tensorrt_rtx", "tensorrt_rtx": "tensorrt"}[library]
    if defect == "broken":
        spoil(other)
    else:
        sys.modules[other].__version__ = "1.0.0.1"  # type: ignore[attr-defined]
    for name in (None, "tensorrt"):
        assert choose_backend(name, plans(library), ANYWHERE) == "tensorrt"
        backend = create_backend(name, plans(library))
        assert backend.name == "tensorrt"
        backend.close()


@EITHER
def test_a_library_that_does_not_load_is_not_passed_over(
    gpu: Any, plans: Callable[[str], EngineFolder], library: str
) -> None:
    spoil(library)
    with pytest.raises(
        BackendUnavailableError,
        match=rf'^tensorrt: {library} is installed but does not load .*; or name the backend onnxruntime .backend="on',
    ):
        choose_backend(None, plans(library), ANYWHERE)
    with pytest.raises(
        BackendUnavailableError, match=f"{library} is installed but does not load .*reinstall$"
    ):
        choose_backend("tensorrt", plans(library), ANYWHERE)
    # Whoever asks for another gets it.
    assert choose_backend("onnxruntime", plans(library), ANYWHERE) == "onnxruntime"
    assert choose_backend(None, plans(library), Placement(provider="cpu")) == "onnxruntime"


def test_a_driver_that_is_too_old_is_not_passed_over(gpu: Any, plans: Callable[[str], EngineFolder]) -> None:
    gpu.driver = 12040
    with pytest.raises(
        BackendUnavailableError, match="tensorrt: the NVIDIA driver is too old: it knows CUDA 12.4"
    ):
        choose_backend(None, plans("tensorrt"), ANYWHERE)
    assert status().blocked


def test_cuda_that_does_not_start_is_not_passed_over(gpu: Any, plans: Callable[[str], EngineFolder]) -> None:
    for _ in range(3):
        gpu.fail("cudaGetDeviceCount", gpu.runtime.cudaError_t.cudaErrorInitializationError)
    with pytest.raises(BackendUnavailableError, match="tensorrt: CUDA does not start: InitializationError"):
        choose_backend(None, plans("tensorrt"), ANYWHERE)


@pytest.mark.parametrize("missing", ["driver", "GPU"])
@pytest.mark.parametrize("broken", [False, True])
def test_without_a_gpu_the_processor_does_it(
    gpu: Any, plans: Callable[[str], EngineFolder], missing: str, broken: bool
) -> None:
    if missing == "driver":
        gpu.driver = 0
    else:
        gpu.count = 0
    if broken:
        spoil("tensorrt")
    assert choose_backend(None, plans("tensorrt"), ANYWHERE) == "onnxruntime"
    found = status()
    assert (found.available, found.blocked) == (False, False)


def test_without_tensorrt_another_backend_does_it(
    gpu: Any, plans: Callable[[str], EngineFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("tensorrt", "tensorrt_rtx"):
        remove(monkeypatch, library)
    assert choose_backend(None, plans("tensorrt"), ANYWHERE) == "onnxruntime"
    gpu.driver = 12040
    assert choose_backend(None, plans("tensorrt"), ANYWHERE) == "onnxruntime"
    assert not status().blocked


def test_the_wrong_library_is_refused_by_the_plan(
    gpu: Any, plans: Callable[[str], EngineFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not passed over: it could build the plan again."""
    remove(monkeypatch, "tensorrt")
    with pytest.raises(
        PlanMismatchError, match="built by tensorrt .*, here is tensorrt_rtx .*build it again"
    ):
        create_backend(None, plans("tensorrt"))


def test_an_engine_without_a_plan_is_not_concerned(gpu: Any, gpu_engine: Callable[[str], Any]) -> None:
    spoil("tensorrt")
    assert choose_backend(None, EngineFolder.open(gpu_engine("fp32")), ANYWHERE) == "onnxruntime"


def test_the_command_that_builds_a_plan_can_be_pasted(
    gpu: Any, gpu_engine: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = EngineFolder.open(shutil.copytree(gpu_engine("fp32"), tmp_path / "my engine"))
    with pytest.raises(BackendUnavailableError) as caught:
        choose_backend("tensorrt", folder, ANYWHERE)
    assert f"build it with: bertrt build '{folder.path}')" in str(caught.value)
