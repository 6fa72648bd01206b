"""TensorRT itself builds on a GPU, which the tests do not need: TensorRT for RTX stands in for it under its name."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bertrt.backends import cuda
from bertrt.backends.cuda import DeviceProperties
from bertrt.backends.tensorrt.library import find_library
from bertrt.cli import main
from bertrt.cli.command import EXIT_OK
from bertrt.errors import BackendUnavailableError, InputError, PlanBuildError
from bertrt.folder import EngineFolder
from bertrt.manifest import Manifest
from bertrt.plans import Profile
from bertrt_export.plans import build as build_module
from bertrt_export.plans import build_plans
from bertrt_export.plans.capabilities import choose_capabilities
from bertrt_export.plans.keep import Staging
from bertrt_export.plans.timing_cache import TimingCache

FEW = (Profile.parse("1x1..1x8"),)
# TensorRT for RTX says so of functions that TensorRT has.
NO_OPS = "ignore:.*Timing cache operations are no-ops:DeprecationWarning"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """A function that gives the machine a GPU of a compute capability, or none."""

    def install(capability: str | None) -> None:
        def properties(index: int) -> DeviceProperties:
            assert index == 0
            assert capability is not None
            return DeviceProperties(name="a GPU", compute_capability=capability, memory_bytes=1 << 34)

        monkeypatch.setattr(cuda, "problem", lambda: None if capability else "the NVIDIA driver sees no GPU")
        monkeypatch.setattr(cuda, "device_properties", properties)

    return install


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``tensorrt``, which behaves as TensorRT for RTX does."""
    real = find_library("tensorrt_rtx")
    module = ModuleType("tensorrt")
    module.__dict__.update({name: value for name, value in vars(real).items() if not name.startswith("__")})
    module.__version__ = "11.1.0.106"
    module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", loader=None)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(build_module, "inspect_plan", lambda module, data, part: {"part": part})
    return module


def build(path: Path, **options: Any) -> Manifest:
    return build_plans(EngineFolder.open(path), profiles=FEW, **options)


class TestTheGpuOfThisMachine:
    @pytest.mark.usefixtures("tensorrt")
    def test_is_what_tensorrt_builds_for(
        self, gpu: Callable[..., None], small_parts: Callable[..., Path]
    ) -> None:
        gpu("8.9")
        plan = build(small_parts()).plan
        assert plan is not None
        assert (plan.library, plan.version) == ("tensorrt", "11.1.0.106")
        assert plan.compute_capabilities == ("8.9",)
        assert plan.device == "a GPU"
        # What the inspector says where there is a GPU.
        assert [report["inspector"] for report in plan.report.values()] == [
            {"part": part} for part in ("encoder", "mlm", "pooler")
        ]

    def test_may_be_named(self, tensorrt: ModuleType, gpu: Callable[..., None]) -> None:
        gpu("9.0")
        assert choose_capabilities(tensorrt, ["9.0", "9.0"], "fp8") == ("9.0",)

    @pytest.mark.usefixtures("tensorrt")
    @pytest.mark.parametrize("asked", [["8.9"], ["9.0", "8.9"]])
    def test_is_the_only_one(
        self,
        asked: list[str],
        gpu: Callable[..., None],
        small_parts: Callable[..., Path],
    ) -> None:
        gpu("9.0")
        with pytest.raises(
            InputError,
            match=r"for the GPU of this machine only, compute capability 9.0, not for 8.9; build where",
        ):
            build(small_parts(), compute_capabilities=asked)

    def test_may_lack_the_precision(self, tensorrt: ModuleType, gpu: Callable[..., None]) -> None:
        gpu("8.6")
        with pytest.raises(InputError, match=r"fp8 needs compute capability 8.9 or later, got 8.6"):
            choose_capabilities(tensorrt, [], "fp8")

    @pytest.mark.usefixtures("tensorrt")
    def test_may_not_be_there(self, gpu: Callable[..., None], small_parts: Callable[..., Path]) -> None:
        gpu(None)
        with pytest.raises(
            BackendUnavailableError,
            match=r"there is none: the NVIDIA driver sees no GPU; .*--library tensorrt_rtx",
        ):
            build(small_parts())

    def test_makes_no_difference_to_tensorrt_rtx(self, gpu: Callable[..., None]) -> None:
        module = find_library("tensorrt_rtx")
        found = []
        for capability in (None, "8.9", "9.0"):
            gpu(capability)
            found.append(choose_capabilities(module, [], "int8"))
        assert found[0] == found[1] == found[2]
        assert {"8.0", "8.9", "12.0"} <= set(found[0])
        assert "7.5" not in found[0]

    @pytest.mark.usefixtures("tensorrt")
    def test_is_asked_about_a_plan_for_it_only(
        self, gpu: Callable[..., None], small_parts: Callable[..., Path]
    ) -> None:
        path = small_parts()
        for capability, inspected in (("8.9", True), ("9.0", False)):
            gpu(capability)
            plan = build(path, library="tensorrt_rtx").plan
            assert plan is not None
            assert ("inspector" in plan.report["encoder"]) is inspected
            # It is for every GPU of that capability.
            assert plan.device is None

    @pytest.mark.usefixtures("tensorrt")
    def test_an_inspection_that_fails_costs_no_plan(
        self,
        gpu: Callable[..., None],
        small_parts: Callable[..., Path],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        gpu("8.9")

        def inspect(module: ModuleType, data: Any, part: str) -> dict[str, Any]:
            if part == "mlm":
                raise PlanBuildError("out of memory")
            return {"device_memory": 4_200_000}

        monkeypatch.setattr(build_module, "inspect_plan", inspect)
        path = small_parts()
        assert main(["build", str(path), "--profile", "1x1..1x8"]) == EXIT_OK
        plan = EngineFolder.open(path).manifest.plan
        assert plan is not None
        found = [report["inspector"] for report in plan.report.values()]
        assert found == [
            {"device_memory": 4_200_000},
            {"error": "out of memory"},
            {"device_memory": 4_200_000},
        ]
        said = capsys.readouterr().out.splitlines()
        assert [line.split()[-2:] for line in said[2:5]][0::2] == [["4.2", "MB"]] * 2
        assert said[3].endswith(" ?")
        assert "the mlm was built, but could not be inspected: out of memory" in said


class TestTheTimingCache:
    @pytest.fixture
    def given(self, tensorrt: ModuleType) -> list[bytes]:
        """What each build was given, with a library whose cache grows by a byte with every build."""
        real: Any = tensorrt.Builder
        given: list[bytes] = []

        class Config:
            """The real configuration, and a cache that grows by a byte with every build."""

            def __init__(self, config: Any) -> None:
                self.__dict__.update(real=config, cache=None)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.real, name)

            def __setattr__(self, name: str, value: Any) -> None:
                setattr(self.real, name, value)

            def create_timing_cache(self, data: bytes) -> list[bytes]:
                given.append(data)
                return [data]

            def set_timing_cache(self, cache: list[bytes], ignore_mismatch: bool) -> bool:
                self.__dict__["cache"] = cache
                return not ignore_mismatch

            def get_timing_cache(self) -> SimpleNamespace:
                return SimpleNamespace(serialize=lambda: self.cache[0])

        class Builder:
            def __init__(self, logger: Any) -> None:
                self.real = real(logger)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.real, name)

            def create_builder_config(self) -> Config:
                return Config(self.real.create_builder_config())

            def build_serialized_network(self, network: Any, config: Config) -> Any:
                config.cache[0] += b"m"
                return self.real.build_serialized_network(network, config.real)

        tensorrt.Builder = Builder
        return given

    def test_is_written_and_read_again(
        self, given: list[bytes], gpu: Callable[..., None], small_parts: Callable[..., Path], tmp_path: Path
    ) -> None:
        gpu("8.9")
        path, engine = tmp_path / "cache", small_parts()
        build(engine, timing_cache=path)
        # Each part gets what the one before it has added.
        assert given == [b"", b"m", b"mm"]
        assert path.read_bytes() == b"mmm"
        build(engine, timing_cache=path)
        assert given[3:] == [b"mmm", b"mmmm", b"mmmmm"]
        assert path.read_bytes() == b"m" * 6

    @pytest.mark.usefixtures("given")
    @pytest.mark.parametrize("error", [PlanBuildError("no room"), KeyboardInterrupt()])
    def test_is_kept_when_the_build_fails_after_a_part(
        self,
        error: BaseException,
        gpu: Callable[..., None],
        small_parts: Callable[..., Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        gpu("8.9")
        path, engine = tmp_path / "cache", small_parts()
        add, parts = Staging.add, []

        def fail_at_the_second(self: Staging, part: str, data: Any) -> Any:
            parts.append(part)
            if len(parts) == 2:
                raise error
            return add(self, part, data)

        monkeypatch.setattr(Staging, "add", fail_at_the_second)
        with pytest.raises(type(error)) as caught:
            build(engine, timing_cache=path)
        assert caught.value is error
        assert path.read_bytes() == b"mm"
        assert EngineFolder.open(engine).manifest.plan is None

    @pytest.mark.usefixtures("given")
    def test_that_cannot_be_kept_either_is_no_other_error(
        self,
        gpu: Callable[..., None],
        small_parts: Callable[..., Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        gpu("8.9")
        path, engine = tmp_path / "cache", small_parts()

        def fail(self: Staging, part: str, data: Any) -> Any:
            path.mkdir()
            raise PlanBuildError("no room")

        monkeypatch.setattr(Staging, "add", fail)
        with pytest.raises(PlanBuildError, match="no room") as caught:
            build(engine, timing_cache=path)
        assert str(caught.value) == "no room"
        assert "the timing cache" in caught.value.__notes__[0]

    @pytest.mark.usefixtures("tensorrt")
    @pytest.mark.filterwarnings(NO_OPS)
    def test_that_is_corrupt(
        self, gpu: Callable[..., None], small_parts: Callable[..., Path], tmp_path: Path
    ) -> None:
        gpu("8.9")
        path = tmp_path / "cache"
        path.write_bytes(b"garbage" * 10)
        engine = small_parts()
        with pytest.raises(
            InputError,
            match=r"does not take the timing cache .*: .*timing cache.*; name another file, or remove this",
        ):
            build(engine, timing_cache=path)
        assert EngineFolder.open(engine).manifest.plan is None
        assert path.read_bytes() == b"garbage" * 10

    def test_of_another_gpu(self, tensorrt: ModuleType, tmp_path: Path) -> None:
        (tmp_path / "cache").write_bytes(b"x")
        cache = TimingCache(tmp_path / "cache", tensorrt)
        config = SimpleNamespace(
            create_timing_cache=lambda data: data,
            set_timing_cache=lambda cache, ignore_mismatch: ignore_mismatch,
        )
        with pytest.raises(InputError, match="made by another release or for another GPU"):
            cache.give(config)

    def test_that_the_library_keeps_to_itself(self, tensorrt: ModuleType, tmp_path: Path) -> None:
        cache = TimingCache(tmp_path / "cache", tensorrt)
        with pytest.raises(PlanBuildError, match="does not give its timing cache"):
            cache.take(SimpleNamespace(get_timing_cache=lambda: None))

    def test_without_a_folder_to_keep_it_in(self, tensorrt: ModuleType, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="there is no folder"):
            TimingCache(tmp_path / "none" / "cache", tensorrt)

    def test_that_is_no_file(self, tensorrt: ModuleType, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is not a file"):
            TimingCache(tmp_path, tensorrt)

    def test_that_is_too_large(self, tensorrt: ModuleType, tmp_path: Path) -> None:
        with (tmp_path / "cache").open("wb") as file:
            file.truncate((256 << 20) + 1)
        with pytest.raises(InputError, match="is larger than"):
            TimingCache(tmp_path / "cache", tensorrt)

    def test_that_cannot_be_written_does_not_cost_the_plans(
        self, tensorrt: ModuleType, tmp_path: Path
    ) -> None:
        cache = TimingCache(tmp_path / "folder-to-be", tensorrt)
        cache.take(SimpleNamespace(get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"x")))
        (tmp_path / "folder-to-be").mkdir()
        with pytest.raises(PlanBuildError, match="a plan is built, but the timing cache"):
            cache.keep()

    def test_to_which_nothing_was_added_is_left_alone(self, tensorrt: ModuleType, tmp_path: Path) -> None:
        TimingCache(tmp_path / "cache", tensorrt).keep()
        assert not (tmp_path / "cache").exists()

    def test_tensorrt_rtx_has_none(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="tensorrt_rtx has no timing cache"):
            TimingCache(tmp_path / "cache", find_library("tensorrt_rtx"))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_plan_for_the_gpu_that_is_here(precision: str, small_parts: Callable[..., Path]) -> None:
    """With the library that is here, on a GPU that it knows; another one is refused by name."""
    capability = cuda.device_properties(0).compute_capability
    module = find_library()
    known = getattr(module, "ComputeCapability", None)
    path = small_parts(precision)
    if known is not None and f"SM{capability.replace('.', '')}" not in known.__members__:
        with pytest.raises(InputError, match=f"does not build for compute capability {capability}"):
            build(path, compute_capabilities=[capability])
        return
    plan = build(path, compute_capabilities=[capability]).plan
    assert plan is not None
    assert plan.compute_capabilities == (capability,)
    for report in plan.report.values():
        assert report["inspector"]["layers"] > 0
        assert report["inspector"]["device_memory"] >= 0
