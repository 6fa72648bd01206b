"""Plans that do not fit the machine are refused before the library sees them, with the command that rebuilds them."""

from __future__ import annotations

import re
import shlex
import struct
from types import ModuleType
from typing import Any

import pytest

from bertrt.backends.tensorrt import library as trt_library
from bertrt.backends.tensorrt.check import (
    HEADER_SIZE,
    check_header,
    check_plan,
    check_validity,
    find_plan_library,
    warn_of_another_gpu,
)
from bertrt.backends.tensorrt.library import (
    capabilities_built_for,
    find_library,
    library_logger,
    library_version,
)
from bertrt.errors import BackendUnavailableError, PlanMismatchError
from bertrt.plans import Plan, Profile, rebuild_command

PROFILES = ("1x16..1x64..1x64", "1x64..8x128..32x512")


def plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "library": "tensorrt_rtx",
        "version": "1.7.1.116",
        "compute_capabilities": ("8.6", "8.9"),
        "profiles": tuple(map(Profile.parse, PROFILES)),
        "mlm_rows": 1024,
    }
    return Plan(**{**fields, **changes})


def header(tag: bytes = b"vtrt", version: tuple[int, ...] = (1, 7, 1, 116), layout: int = 0) -> bytes:
    """The beginning of a plan, as ``trtexec --getPlanVersionOnly`` reads it."""
    return struct.pack("<4sIQQ4B", tag, layout, 2, 1234, *version).ljust(HEADER_SIZE, b"\0")


HERE = {"library": "tensorrt_rtx", "version": "1.7.1.116", "compute_capability": "8.9"}


def test_a_plan_that_fits() -> None:
    check_plan(plan(), path="engine", **HERE)
    check_header(plan(), header(), path="engine", name="encoder.plan")
    other = plan(library="tensorrt", version="11.1.0.106")
    check_header(other, header(b"ftrt", (11, 1, 0, 106)), path="engine", name="encoder.plan")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"library": "tensorrt", "version": "11.1.0.106"},
            "built by tensorrt 11.1.0.106, here is tensorrt_rtx",
        ),
        ({"version": "1.6.0.1"}, "built by tensorrt_rtx 1.6.0.1, which alone reads it; here is 1.7.1.116"),
        (
            {"compute_capabilities": ("8.6", "12.0")},
            "for compute capability 8.6, 12.0; this GPU has 8.9",
        ),
    ],
)
def test_a_plan_of_another_machine(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanMismatchError, match=re.escape(message)) as caught:
        check_plan(plan(**changes), path="my engine", **HERE)
    command = str(caught.value).partition("build it again: ")[2]
    assert shlex.split(command) == [
        *("bertrt", "build", "my engine", "--profile", PROFILES[0], "--profile", PROFILES[1]),
        *("--compute-capability", "8.9", "--library", "tensorrt_rtx"),
    ]


@pytest.mark.parametrize("capability", ["9.0", "10.0"])
@pytest.mark.parametrize(
    "changes", [{}, {"library": "tensorrt", "version": "11.1.0.106"}, {"version": "1.6.0.1"}]
)
def test_a_gpu_that_the_library_does_not_build_for(capability: str, changes: dict[str, Any]) -> None:
    """To build the plan with it again would be refused too."""
    known = capabilities_built_for(find_library("tensorrt_rtx"))
    assert known is not None
    assert capability not in known
    here = {**HERE, "compute_capability": capability, "builds_for": known}
    with pytest.raises(PlanMismatchError, match="tensorrt_rtx builds none for this GPU: ") as caught:
        check_plan(plan(**changes), path="engine", **here)
    assert 'load the engine with backend="onnxruntime", provider="cuda", or install tensorrt' in str(
        caught.value
    )
    assert 'pip install "bertrt[tensorrt]"' in str(caught.value)
    assert str(caught.value).endswith(
        f"--profile {PROFILES[0]} --profile {PROFILES[1]} --compute-capability {capability} --library tensorrt"
    )
    # One that it builds for is told so, as ever.
    other = {**HERE, "version": "1.7.2.1", "builds_for": known}
    with pytest.raises(PlanMismatchError, match="build it again: bertrt build .* --library tensorrt_rtx$"):
        check_plan(plan(), path="engine", **other)


def test_what_the_libraries_build_for() -> None:
    known = capabilities_built_for(find_library("tensorrt_rtx"))
    assert known is not None
    assert known[:4] == ("7.5", "8.0", "8.6", "8.9")
    assert set(known) >= {"12.0"}
    assert list(known) == sorted(known, key=float)
    assert capabilities_built_for(ModuleType("tensorrt")) is None


def test_a_gpu_of_another_kind(recwarn: pytest.WarningsRecorder) -> None:
    there = {"path": "engine", "index": 1, "name": "NVIDIA L40S"}
    for device in (None, "NVIDIA L40S"):
        warn_of_another_gpu(plan(device=device), **there)
    assert not recwarn
    with pytest.warns(
        RuntimeWarning,
        match=r"on another kind of GPU, NVIDIA L4; GPU 1 is NVIDIA L40S, .*: bertrt build engine --p",
    ):
        warn_of_another_gpu(plan(device="NVIDIA L4"), **there)


def test_the_command_that_rebuilds_a_plan_as_it_was() -> None:
    assert rebuild_command(plan(profiles=(Profile.parse("1x1..2x3"),)), "e") == (
        "bertrt build e --profile 1x1..2x3..2x3 --compute-capability 8.6,8.9 --library tensorrt_rtx"
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "'encoder.plan' is none: it does not begin as plans do"),
        (header()[:27], "does not begin as plans do"),
        (b"PK\3\4".ljust(HEADER_SIZE, b"\0"), "does not begin as plans do"),
        (header(b"ftrt"), "'encoder.plan' is one of tensorrt, the manifest says tensorrt_rtx"),
        (header(version=(1, 8, 0, 3)), "'encoder.plan' is of version 1.8.0.3, the manifest says 1.7.1.116"),
    ],
)
def test_a_file_that_is_not_the_plan_of_the_manifest(data: bytes, message: str) -> None:
    with pytest.raises(PlanMismatchError, match=re.escape(message)) as caught:
        check_header(plan(), data, path="engine", name="encoder.plan")
    assert str(caught.value).endswith(rebuild_command(plan(), "engine"))


def test_layouts_of_later_releases_are_left_to_the_library() -> None:
    check_header(plan(), header(version=(9, 9, 9, 9), layout=1), path="engine", name="encoder.plan")


def test_every_flipped_bit_of_tag_and_version_shows() -> None:
    good = header()
    for position in (*range(4), *range(24, 28)):
        for bit in range(8):
            flipped = bytearray(good)
            flipped[position] ^= 1 << bit
            with pytest.raises(PlanMismatchError):
                check_header(plan(), bytes(flipped), path="engine", name="encoder.plan")


class Runtime:
    """A ``Runtime`` whose answer is given."""

    def __init__(self, validity: Any, diagnostics: int) -> None:
        self.answer = validity, diagnostics

    def get_engine_validity(self, data: bytes) -> tuple[Any, int]:
        assert isinstance(data, bytes)
        return self.answer


class TestTheLibrarysOpinion:
    @pytest.fixture
    def module(self) -> ModuleType:
        return find_library("tensorrt_rtx")

    def ask(self, module: ModuleType, runtime: Any, data: bytes = b"") -> None:
        check_validity(module, runtime, plan(), data or header(), path="engine", name="mlm.plan")

    def test_what_is_valid_or_slow_passes(self, module: ModuleType) -> None:
        self.ask(module, Runtime(module.EngineValidity.VALID, 0))
        self.ask(module, Runtime(module.EngineValidity.SUBOPTIMAL, 0))

    def test_a_library_without_an_opinion(self, module: ModuleType) -> None:
        self.ask(module, object())

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("VERSION_MISMATCH",), "(version mismatch)"),
            (("UNSUPPORTED_CC", "OLD_CUDA_DRIVER"), "(unsupported cc, old cuda driver)"),
        ],
    )
    def test_a_plan_that_is_to_blame(self, flags: tuple[str, ...], message: str, module: ModuleType) -> None:
        members = module.EngineInvalidityDiagnostics.__members__
        diagnostics = sum(int(members[flag]) for flag in flags)
        with pytest.raises(PlanMismatchError, match=re.escape(message)) as caught:
            self.ask(module, Runtime(module.EngineValidity.INVALID, diagnostics))
        assert str(caught.value).endswith(rebuild_command(plan(), "engine"))

    @pytest.mark.parametrize("flag", ["OLD_CUDA_DRIVER", "INSUFFICIENT_GPU_MEMORY", "CUDA_ERROR"])
    def test_a_machine_that_is_to_blame(self, flag: str, module: ModuleType) -> None:
        diagnostics = int(module.EngineInvalidityDiagnostics.__members__[flag])
        with pytest.raises(
            BackendUnavailableError, match=rf"\({flag.lower().replace('_', ' ')}\).*nvidia-smi"
        ):
            self.ask(module, Runtime(module.EngineValidity.INVALID, diagnostics))

    def test_the_real_library_sees_a_malformed_header(self, module: ModuleType) -> None:
        runtime = module.Runtime(library_logger(module))
        with pytest.raises(
            PlanMismatchError, match="'mlm.plan' is refused by tensorrt_rtx .*malformed engine"
        ):
            self.ask(module, runtime, b"PK\3\4".ljust(runtime.engine_header_size, b"\0"))
        assert runtime.engine_header_size <= HEADER_SIZE


class TestWhichLibraryReadsAPlan:
    def test_the_one_that_built_it(self) -> None:
        assert find_plan_library(plan()).__name__ == "tensorrt_rtx"

    def test_otherwise_what_there_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trt_library, "is_installed", lambda name: name == "tensorrt_rtx")
        for library in ("tensorrt", "something"):
            other = plan(library=library, version="11.1.0.106")
            module = find_plan_library(other)
            with pytest.raises(PlanMismatchError, match="--library tensorrt_rtx"):
                check_plan(
                    other,
                    path="engine",
                    library=module.__name__,
                    version=library_version(module),
                    compute_capability="8.9",
                )
