"""What is built for users: the wheel holds every module and every data file, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("engine/bertrt", "export/bertrt_export", "benchmarks/bertrt_bench")


def test_the_wheel_holds_the_packages_and_their_data(tmp_path: Path) -> None:
    code = "import sys; from scikit_build_core.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    (wheel,) = tmp_path.glob("bertrt-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
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
        "bertrt/py.typed",
    } <= expected
    assert found == expected
