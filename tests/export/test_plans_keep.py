"""Plans and a folder that is used meanwhile: interruptions, crashes, other builds, full disks."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bertrt.errors import PlanBuildError
from bertrt.folder import EngineFolder, sha256
from bertrt.manifest import Manifest
from bertrt.plans import Profile
from bertrt_export.plans import build as build_module
from bertrt_export.plans import build_plans
from bertrt_export.plans.builder import Steps
from bertrt_export.plans.keep import Staging

RTX = "tensorrt_rtx"
OLD, NEW = Profile.parse("1x1..1x8"), Profile.parse("1x1..2x4")


def build(path: Path, profile: Profile = NEW, **options: Any) -> Manifest:
    return build_plans(EngineFolder.open(path), library=RTX, profiles=[profile], **options)


def snapshot(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.iterdir()}


@pytest.fixture
def built(small_parts: Callable[..., Path]) -> Path:
    """An engine that has a plan."""
    path = small_parts()
    build(path, OLD)
    return path


class TestInterruptions:
    def test_of_the_process(self, built: Path) -> None:
        before = snapshot(built)
        main = threading.main_thread().ident
        assert main is not None

        def interrupt() -> None:
            signal.pthread_kill(main, signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            build(built, progress=interrupt)
        assert snapshot(built) == before

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), ValueError("drawing failed")])
    def test_by_whoever_watches(self, error: BaseException, built: Path) -> None:
        before = snapshot(built)
        calls = []

        def watch() -> None:
            calls.append(1)
            raise error

        with pytest.raises(type(error)) as caught:
            build(built, progress=watch)
        assert caught.value is error
        # The library was told to stop, and asks no more.
        assert len(calls) == 1
        assert snapshot(built) == before

    def test_steps(self) -> None:
        steps = Steps()
        assert steps.step()
        steps.stop()
        assert not steps.step()
        assert steps.error is None

    def test_what_a_killed_build_has_left_is_removed_by_the_next(self, built: Path) -> None:
        code = (
            "import os, sys; from bertrt.folder import EngineFolder; "
            "from bertrt_export.plans.keep import Staging\n"
            "folder = EngineFolder.open(sys.argv[1])\n"
            "with Staging(folder, ('encoder.onnx',)) as staging:\n"
            "    staging.add('encoder', b'half a plan')\n"
            "    os.kill(os.getpid(), 9)\n"
        )
        result = subprocess.run([sys.executable, "-c", code, str(built)], check=False)
        assert result.returncode == -signal.SIGKILL
        assert len(list(built.glob(".plans.*/encoder.plan"))) == 1
        EngineFolder.open(built)
        build(built)
        assert not list(built.glob(".plans.*"))

    def test_a_build_that_is_alive_is_left_alone(self, built: Path) -> None:
        folder = EngineFolder.open(built)
        with Staging(folder, ("encoder.onnx",)) as staging:
            staging.add("encoder", b"a plan")
            build(built)
            assert len(list(built.glob(".plans.*/encoder.plan"))) == 1


class Crash(BaseException):
    """The end of the process, at one step of the exchange."""


@pytest.mark.parametrize("step", range(5))
def test_a_crash_in_the_exchange_leaves_a_plan_or_none(
    step: int, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps: the manifest without the plan, three plans, the manifest with the new one."""
    before = EngineFolder.open(built).manifest
    old = {name: sha256(built / name) for name in ("encoder.plan", "mlm.plan", "pooler.plan")}
    real, renames = Path.replace, []

    def crash(self: Path, target: Path) -> Path:
        if Path(target).parent == built:
            if len(renames) == step:
                raise Crash
            renames.append(Path(target).name)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(Crash):
        build(built)
    monkeypatch.undo()
    names = ["engine.json", "encoder.plan", "mlm.plan", "pooler.plan", "engine.json"]
    assert renames == names[:step]
    manifest = EngineFolder.open(built, verify=True).manifest
    if step == 0:
        assert manifest == before
        assert {name: sha256(built / name) for name in old} == old
    else:
        assert manifest.plan is None
        assert manifest.backends["tensorrt"] == {}
        assert not set(old) & set(manifest.files)
    # Whatever was left behind, the next build works.
    again = build(built)
    assert EngineFolder.open(built, verify=True).manifest == again
    assert again.plan is not None
    assert again.plan.profiles == (NEW,)


@pytest.mark.parametrize("when", ["staging", "writing", "exchange"])
def test_a_full_disk(when: str, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(built)

    def full(*args: object, **options: object) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if when == "staging":
        monkeypatch.setattr(Path, "mkdir", full)
    elif when == "writing":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(EngineFolder, "replace_manifest", full)
    with pytest.raises(
        PlanBuildError, match=r"cannot write the plans to .*No space left on device; make room"
    ):
        build(built)
    monkeypatch.undo()
    assert snapshot(built) == before


class TestAnEngineThatIsReplacedMeanwhile:
    """The plan is then not one of the engine that is there."""

    def during(self, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
        real = build_module.build_plan
        done: list[None] = []

        def build_plan(*args: Any, **options: Any) -> Any:
            if not done:
                act()
                done.append(None)
            return real(*args, **options)

        monkeypatch.setattr(build_module, "build_plan", build_plan)

    def test_by_another_export(
        self, built: Path, small_parts: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = small_parts("bf16")

        def swap() -> None:
            for name, data in snapshot(other).items():
                (built / name).write_bytes(data)

        self.during(monkeypatch, swap)
        with pytest.raises(PlanBuildError, match="was replaced while its plan was built; build it again"):
            build(built)
        assert EngineFolder.open(built).manifest.precision == "bf16"
        assert EngineFolder.open(built).manifest.plan is None

    def test_by_the_same_files(self, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the library has read may have been something else."""

        def rewrite() -> None:
            data = (built / "mlm.onnx").read_bytes()
            (built / "mlm.onnx").unlink()
            (built / "mlm.onnx").write_bytes(data)

        self.during(monkeypatch, rewrite)
        with pytest.raises(PlanBuildError, match="was replaced"):
            build(built)

    def test_a_drift_report_is_kept(self, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def measure() -> None:
            folder = EngineFolder.open(built)
            folder.replace_manifest(folder.manifest.with_drift({"backend": "onnxruntime", "passed": True}))

        self.during(monkeypatch, measure)
        assert build(built).drift == {"backend": "onnxruntime", "passed": True}


def test_one_build_at_a_time_exchanges_plans(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_held() -> bool:
        descriptor = os.open(built, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    real, held = EngineFolder.replace_manifest, []

    def replace_manifest(self: EngineFolder, manifest: Manifest) -> EngineFolder:
        held.append(is_held())
        return real(self, manifest)

    monkeypatch.setattr(EngineFolder, "replace_manifest", replace_manifest)
    # While the library works, nobody has to wait.
    build(built, progress=lambda: held.append(is_held()))
    assert held[-2:] == [True, True]
    assert not any(held[:-2])
    assert not is_held()
