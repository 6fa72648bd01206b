"""Which backend an engine gets, and why it does not get another."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bertrt.backends import registry
from bertrt.backends.base import Backend
from bertrt.backends.registry import BackendStatus, backend_names, backend_status, create_backend
from bertrt.errors import BackendUnavailableError, HashMismatchError, InputError
from bertrt.folder import MANIFEST_NAME, EngineFolder

ISA = "BERTRT_ISA"


@pytest.fixture
def folder(demo_engine: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of an engine with the files of both backends."""
    return Path(shutil.copytree(demo_engine("int8"), tmp_path / "engine"))


def keep_only(folder: Path, *backends: str) -> EngineFolder:
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["backends"] = {name: manifest["backends"].get(name, {}) for name in backends}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return EngineFolder.open(folder)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_native_one_comes_first(folder: Path, kernels: ModuleType) -> None:
    assert backend_names() == ("native", "tensorrt", "onnxruntime")
    assert [status.name for status in backend_status()] == ["native", "tensorrt", "onnxruntime"]
    opened = EngineFolder.open(folder)
    for name, expected in {None: "native", "native": "native", "onnxruntime": "onnxruntime"}.items():
        backend = create_backend(name, opened, 3)
        assert (backend.name, backend.threads) == (expected, 3)
        assert isinstance(backend, Backend)
        assert backend.pads == (expected == "onnxruntime")


def test_without_kernels_onnxruntime_takes_over_and_the_reason_is_kept(
    folder: Path, no_kernels: None
) -> None:
    opened = EngineFolder.open(folder)
    assert create_backend(None, opened, 1).name == "onnxruntime"
    status = backend_status()[0]
    assert (status.name, status.available, status.version) == ("native", False, None)
    assert "installed with BERTRT_KERNELS=OFF" in status.reason
    assert "GCC 12 or Clang 15" in status.reason
    assert not status.blocked
    with pytest.raises(BackendUnavailableError, match=r"native: the native kernels are not built"):
        create_backend("native", opened)


@pytest.fixture
def broken_kernels(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are there, but cannot be loaded."""
    load = importlib.import_module

    def load_others(name: str) -> ModuleType:
        if name == "bertrt._native":
            raise ImportError("libstdc++.so.6: version `GLIBCXX_9' not found")
        return load(name)

    monkeypatch.setattr("bertrt.backends.native.importlib.import_module", load_others)


@pytest.mark.usefixtures("broken_kernels")
def test_kernels_that_do_not_load_are_not_called_missing() -> None:
    status = backend_status()[0]
    assert (status.available, status.blocked) == (False, True)
    assert "built but do not load (libstdc++.so.6: version" in status.reason


@pytest.mark.usefixtures("broken_kernels")
@pytest.mark.parametrize("name", [None, "native"])
def test_kernels_that_do_not_load_are_not_passed_over(folder: Path, name: str | None) -> None:
    with pytest.raises(BackendUnavailableError, match="native: .* built but do not load .*GLIBCXX_9"):
        create_backend(name, EngineFolder.open(folder))


@pytest.mark.usefixtures("broken_kernels")
def test_kernels_that_do_not_load_concern_nobody_else(folder: Path) -> None:
    assert create_backend("onnxruntime", EngineFolder.open(folder), 1).name == "onnxruntime"
    assert create_backend(None, keep_only(folder, "onnxruntime"), 1).name == "onnxruntime"


def test_the_engine_decides_too(folder: Path, kernels: ModuleType) -> None:
    opened = keep_only(folder, "onnxruntime")
    assert create_backend(None, opened, 1).name == "onnxruntime"
    with pytest.raises(
        BackendUnavailableError,
        match="native: .* has files for onnxruntime only.; export the engine again with --backend native",
    ):
        create_backend("native", opened)


def test_nobody_can_and_each_says_why(
    folder: Path, no_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = EngineFolder.open(folder)
    nobody = keep_only(folder)
    with pytest.raises(
        BackendUnavailableError,
        match="native: .*not built.*; onnxruntime: .* has none.; export .* again with --backend onnxruntime$",
    ):
        create_backend(None, nobody)
    with pytest.raises(
        BackendUnavailableError, match="install what native needs and export the engine again"
    ):
        create_backend("native", nobody)
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        BackendUnavailableError,
        match=r"native: .*; onnxruntime: .*pip install \"bertrt\[ort\]\".; install what native or onnxruntime needs$",
    ):
        create_backend(None, opened)


def test_what_there_is_not(folder: Path) -> None:
    opened = EngineFolder.open(folder)
    with pytest.raises(
        BackendUnavailableError, match="no backend 'nope'; there are native, tensorrt, onnxruntime"
    ):
        create_backend("nope", opened)
    for threads in (0, -1, True, 1.5, "2", 10**9):
        with pytest.raises(InputError, match="threads must be a whole number"):
            create_backend(None, opened, threads)  # type: ignore[arg-type] # that is what is tested


def test_an_onnxruntime_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("onnxruntime")
    module.__spec__ = sys.modules["onnxruntime"].__spec__ if "onnxruntime" in sys.modules else object()
    monkeypatch.setitem(sys.modules, "onnxruntime", module)  # without a version
    status = backend_status()[2]
    assert not status.available
    assert "is installed but does not load" in status.reason


@pytest.mark.usefixtures("kernels", "_asked_for")
class TestAnInstructionSetThatTheProcessorLacks:
    """What ``BERTRT_ISA`` asks for is done or refused, and never met by another backend."""

    @pytest.fixture
    def _asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(ISA, "huge")

    def test_it_is_said_of_the_backend(self) -> None:
        status = backend_status()[0]
        reason = "BERTRT_ISA=huge cannot be used: the processor lacks it"
        assert status == BackendStatus(
            name="native", available=False, version="1.2.3", reason=reason, blocked=True
        )

    @pytest.mark.parametrize("name", [None, "native"])
    def test_it_is_an_error_where_the_kernels_would_run(self, folder: Path, name: str | None) -> None:
        with pytest.raises(BackendUnavailableError, match="BERTRT_ISA=huge cannot be used"):
            create_backend(name, EngineFolder.open(folder))

    def test_others_are_not_concerned(self, folder: Path) -> None:
        assert create_backend("onnxruntime", EngineFolder.open(folder), 1).name == "onnxruntime"
        assert create_backend(None, keep_only(folder, "onnxruntime"), 1).name == "onnxruntime"

    def test_one_that_it_has_is_taken(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(ISA, "plain")
        assert backend_status()[0].isa == "plain"
        backend: Any = create_backend(None, EngineFolder.open(folder))
        assert backend.isa == "plain"


@pytest.mark.parametrize("variable", ["BERTRT_PIN_THREADS", "BERTRT_HUGE_PAGES"])
def test_a_wish_that_means_nothing(
    variable: str, folder: Path, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "2")
    status = backend_status()[0]
    assert (status.available, status.blocked) == (False, True)
    assert status.reason.startswith(f"{variable} must be 0 or 1, got '2'")
    with pytest.raises(BackendUnavailableError, match=f"native: {variable} must be 0 or 1"):
        create_backend(None, EngineFolder.open(folder))


@pytest.mark.parametrize(
    ("spoilt", "reader"),
    [("model.bertrt", "native"), ("engine.onnx", "onnxruntime"), ("model.onnx_data", "onnxruntime")],
)
def test_only_the_files_that_are_read_are_hashed(
    spoilt: str, reader: str, folder: Path, kernels: ModuleType
) -> None:
    flip_a_bit(folder / spoilt)
    opened = EngineFolder.open(folder, verify=False)
    for name in opened.manifest.backends:
        if name == reader:
            with pytest.raises(HashMismatchError, match=f"'{spoilt}' .* is corrupt or was replaced"):
                create_backend(name, opened, 1, verify=True)
        else:
            create_backend(name, opened, 1, verify=True).close()


class TestPlacement:
    """Providers and GPUs: what suits which backend, and what is refused before anything is loaded."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"threads": 0}, "threads must be a whole number from 1 to 4096, got 0"),
            ({"provider": "rocm"}, "provider must be one of cpu, cuda, tensorrt, got 'rocm'"),
            ({"devices": [-1]}, "devices are the driver's numbers of GPUs, from 0 to 63; got -1"),
            ({"devices": [True]}, "got True"),
            ({"devices": [0, 1, 0]}, r"devices names a GPU twice: \[0, 1, 0\]"),
            ({"devices": "0,1"}, "devices must be a list of whole numbers"),
            ({"devices": 0}, "devices must be a list of whole numbers"),
            ({"devices": [0], "provider": "cpu"}, "devices are GPUs, and the provider cpu uses none"),
        ],
    )
    def test_what_is_out_of_range(self, options: dict[str, Any], message: str, folder: Path) -> None:
        with pytest.raises(InputError, match=message):
            create_backend(None, EngineFolder.open(folder), **options)

    @pytest.mark.usefixtures("kernels")
    def test_what_does_not_suit_a_backend(self, folder: Path) -> None:
        opened = EngineFolder.open(folder)
        with pytest.raises(
            InputError, match="a provider is the backend onnxruntime's; leave it out for native"
        ):
            create_backend("native", opened, provider="cpu")
        with pytest.raises(InputError, match="leave it out for tensorrt"):
            create_backend("tensorrt", opened, provider="tensorrt")
        with pytest.raises(InputError, match="the backend native computes on processors"):
            create_backend("native", opened, devices=[0])

    @pytest.mark.usefixtures("kernels")
    def test_a_provider_asks_for_onnxruntime(self, folder: Path) -> None:
        assert create_backend(None, EngineFolder.open(folder), 1, provider="cpu").name == "onnxruntime"

    def test_a_plan_that_is_not_built(
        self, gpu_engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ready = BackendStatus(name="tensorrt", available=True, version="1")
        monkeypatch.setitem(
            registry._BACKENDS, "tensorrt", registry._Entry(status=lambda _: ready, create=lambda *_: None)
        )
        folder = EngineFolder.open(gpu_engine("fp16"))
        with pytest.raises(BackendUnavailableError, match=f"build it with: bertrt build {folder.path}"):
            create_backend("tensorrt", folder)
        # Without a name the next best takes over.
        assert create_backend(None, folder, 1).name == "onnxruntime"

    def test_a_folder_for_cpus_is_not_for_gpus(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ready = BackendStatus(name="tensorrt", available=True, version="1")
        monkeypatch.setitem(
            registry._BACKENDS, "tensorrt", registry._Entry(status=lambda _: ready, create=lambda *_: None)
        )
        with pytest.raises(BackendUnavailableError, match="export the engine again with --target tensorrt"):
            create_backend("tensorrt", EngineFolder.open(folder))
