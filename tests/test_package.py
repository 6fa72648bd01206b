"""What is built for users: the wheel holds every module and every data file, the kernels, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("engine/bertrt", "export/bertrt_export", "benchmarks/bertrt_bench")
NATIVE = {
    f"bertrt/_native{sysconfig.get_config_var('EXT_SUFFIX')}",
    "bertrt/include/bertrt.h",
    "bertrt/lib/libbertrt.so",
}


def build_wheel(folder: Path, **settings: str) -> Path:
    code = (
        "import json, sys; from scikit_build_core.build import build_wheel; "
        "build_wheel(sys.argv[1], json.loads(sys.argv[2]))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(folder), json.dumps(settings)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    (wheel,) = folder.glob("bertrt-*.whl")
    return wheel


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def sources() -> set[str]:
    """The files that the repository has, by their places in a wheel."""
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    expected = {name.partition("/")[2] for name in tracked if (ROOT / name).is_file()}
    assert {
        "bertrt_export/demo/model.safetensors",
        "bertrt_export/drift/page.css",
        "bertrt/_native.pyi",
        "bertrt/py.typed",
    } <= expected
    return expected


def test_the_wheel_holds_the_packages_their_data_and_the_kernels(tmp_path: Path, sources: set[str]) -> None:
    # In the build folder of the installation, so that nothing is compiled twice.
    wheel = build_wheel(tmp_path)
    assert files_of(wheel) == sources | NATIVE
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{python}-{python}-" in wheel.name


def test_without_kernels_the_wheel_holds_python_alone(tmp_path: Path, sources: set[str]) -> None:
    settings = {"cmake.define.BERTRT_KERNELS": "OFF", "build-dir": str(tmp_path / "build")}
    assert files_of(build_wheel(tmp_path, **settings)) == sources
