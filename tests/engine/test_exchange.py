"""One folder in the place of another: what is there at the moment at which a process is killed."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from bertrt import exchange
from bertrt.exchange import put_in_place
from bertrt.folder import MANIFEST_NAME, write_folder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A new one, an old one, and a free name."""
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST_NAME).write_text(name)
    return tmp_path / "new", tmp_path / "old", tmp_path / "retired"


def refuse(code: int) -> None:
    raise OSError(code, os.strerror(code))


def test_the_new_one_is_there_and_the_old_one_beside_it(folders: tuple[Path, Path, Path]) -> None:
    new, old, retired = folders
    put_in_place(new, old, retired)
    assert (old / MANIFEST_NAME).read_text() == "new"
    assert (retired / MANIFEST_NAME).read_text() == "old"
    assert not new.exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL])
def test_a_system_that_exchanges_no_names(
    code: int, folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_exchange", lambda *_: refuse(code))
    test_the_new_one_is_there_and_the_old_one_beside_it(folders)


def test_another_failure_is_told(folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    new, old, retired = folders
    monkeypatch.setattr(exchange, "_exchange", lambda *_: refuse(errno.EACCES))
    with pytest.raises(PermissionError):
        put_in_place(new, old, retired)
    assert (old / MANIFEST_NAME).read_text() == "old"


def test_a_second_rename_that_fails_takes_the_first_back(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    new, old, retired = folders
    monkeypatch.setattr(exchange, "_exchange", lambda *_: refuse(errno.ENOSYS))
    new.rename(new.with_name("gone"))
    with pytest.raises(FileNotFoundError):
        put_in_place(new, old, retired)
    assert (old / MANIFEST_NAME).read_text() == "old"


@pytest.mark.parametrize("call", range(1, 12))
def test_killed_at_any_call_there_is_an_engine(
    call: int, folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each call of the system that puts names or data onto the disk."""
    _, out, _ = folders
    child = os.fork()
    if not child:
        calls = 0

        def killing(function: object) -> object:
            def call_(*arguments: object, **options: object) -> object:
                nonlocal calls
                calls += 1
                if calls == call:
                    os._exit(9)
                return function(*arguments, **options)  # type: ignore[operator]

            return call_

        monkeypatch.setattr(Path, "replace", killing(Path.replace))
        monkeypatch.setattr(os, "fsync", killing(os.fsync))
        monkeypatch.setattr(os, "unlink", killing(os.unlink))
        monkeypatch.setattr(exchange, "_exchange", killing(exchange._exchange))
        with write_folder(out, overwrite=True) as partial:
            (partial / MANIFEST_NAME).write_text("new")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in {0, 9}
    assert (out / MANIFEST_NAME).read_text() in {"old", "new"}


def test_a_reader_always_finds_one(tmp_path: Path) -> None:
    out = tmp_path / "engine"
    stop, missing = threading.Event(), []
    with write_folder(out) as first:
        (first / MANIFEST_NAME).write_text("{}")

    def look() -> None:
        while not stop.is_set():
            if not out.is_dir():
                missing.append(1)

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(100):
        with write_folder(out, overwrite=True) as partial:
            (partial / MANIFEST_NAME).write_text("{}")
    stop.set()
    reader.join()
    assert missing == []


def test_all_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr("bertrt.folder.sync", lambda path: synced.append(path.name))
    with write_folder(tmp_path / "engine") as folder:
        (folder / "below").mkdir()
        (folder / "below" / "file").write_text("x")
        partial = folder.name
    assert set(synced[:-1]) == {"file", "below", partial}
    # And then the name itself.
    assert synced[-1] == tmp_path.name
