"""Writing an engine folder: whole or not at all, and never over what is none."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bertrt.errors import ExportError
from bertrt.folder import record_files, write_file, write_folder


@pytest.fixture
def folder(demo_engine: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the demo engine that a test may spoil."""
    return Path(shutil.copytree(demo_engine("int8"), tmp_path / "engine"))


def test_write_folder_is_all_or_nothing(tmp_path: Path) -> None:
    out = tmp_path / "engine"
    with pytest.raises(KeyboardInterrupt), write_folder(out) as folder:
        (folder / "half").write_bytes(b"x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with write_folder(out) as folder:
        (folder / "whole").write_bytes(b"x")
        assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_write_folder_follows_the_umask(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.umask(0o027)\n"
        "from pathlib import Path\n"
        "from bertrt.folder import write_file, write_folder\n"
        f"with write_folder(Path({str(tmp_path / 'engine')!r})) as folder: write_file(folder / 'a', b'x')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert stat.S_IMODE((tmp_path / "engine").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "engine" / "a").stat().st_mode) == 0o640


def test_write_folder_overwrites_engines_only(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--overwrite"), write_folder(folder):
        pass
    with write_folder(folder, overwrite=True) as new:
        (new / "new").write_bytes(b"x")
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
    with pytest.raises(ExportError, match="not an engine folder"), write_folder(folder, overwrite=True):
        pass
    assert (folder / "new").exists()


def test_a_failed_overwrite_leaves_the_old_one(folder: Path, tmp_path: Path) -> None:
    before = record_files(folder)
    with pytest.raises(RuntimeError, match="boom"), write_folder(folder, overwrite=True) as new:
        (new / "half").write_bytes(b"x")
        raise RuntimeError("boom")
    assert record_files(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_write_folder_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file" / "engine", Path("/proc/bertrt/engine")):
        with pytest.raises(ExportError, match="cannot write"), write_folder(place):
            pass


def test_write_file_replaces_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, b"three")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]
