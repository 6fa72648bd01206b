"""The cache of the TensorRT provider's engines: whole or not at all, and mended where one is damaged."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from bertrt.backends.onnxruntime.engine_cache import open_cached
from bertrt.errors import BackendRunError, BackendUnavailableError

WHOLE = b"an engine"
DAMAGED = (
    "onnxruntime 1.31.1 cannot load 'encoder.onnx': [ONNXRuntimeError] : 11 : EP_FAIL : TensorRT EP could not "
    "deserialize engine from cache: /cache/x.engine"
)


class Provider:
    """Reads an engine where there is one, else builds it, as ONNX Runtime's provider does."""

    def __init__(self, during: Callable[[Path], object] = lambda folder: None) -> None:
        self.during = during
        self.built = self.read = 0

    def __call__(self, folder: Path) -> str:
        file = folder / "sm90.engine"
        if file.exists():
            self.read += 1
            if file.read_bytes() != WHOLE:
                raise BackendRunError("wrapped") from RuntimeError(DAMAGED)
            return "read"
        self.built += 1
        file.write_bytes(WHOLE[:3])
        self.during(folder)
        file.write_bytes(WHOLE)
        return "built"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "onnxruntime-tensorrt" / "hash"


def files(place: Path) -> list[str]:
    return sorted(path.name for path in place.parent.rglob("*") if not path.name.endswith(".lock"))


def test_it_is_built_once_and_read_from_then_on(place: Path) -> None:
    provider = Provider()
    assert [open_cached(place, provider) for _ in range(3)] == ["built", "read", "read"]
    assert files(place) == ["hash", "sm90.engine"]
    assert place.stat().st_mode & 0o077 == 0


def test_what_is_cut_short_never_takes_its_place(place: Path) -> None:
    def fail(_folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_cached(place, Provider(fail))
    assert files(place) == []
    assert open_cached(place, Provider()) == "built"


def test_a_process_that_is_killed_while_it_builds(place: Path) -> None:
    child = os.fork()
    if not child:
        open_cached(place, Provider(lambda folder: os._exit(9)))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    assert files(place) == [".hash.partial", "sm90.engine"]
    assert open_cached(place, Provider()) == "built"
    assert files(place) == ["hash", "sm90.engine"]


@pytest.mark.parametrize("left", [b"", WHOLE[:3], WHOLE + b"?"])
def test_a_damaged_engine_is_built_again(place: Path, left: bytes) -> None:
    open_cached(place, Provider())
    (place / "sm90.engine").write_bytes(left)
    provider = Provider()
    assert open_cached(place, provider) == "built"
    assert (provider.read, provider.built) == (1, 1)
    assert open_cached(place, provider) == "read"


def test_once_and_not_for_ever(place: Path) -> None:
    place.mkdir(parents=True)
    calls = []

    def damaged(folder: Path) -> None:
        calls.append(folder)
        raise BackendRunError(DAMAGED)

    with pytest.raises(BackendRunError, match="could not deserialize"):
        open_cached(place, damaged)
    assert len(calls) == 2


def test_another_failure_removes_nothing(place: Path) -> None:
    open_cached(place, Provider())

    def refuse(_folder: Path) -> None:
        raise BackendRunError("out of memory")

    with pytest.raises(BackendRunError, match="out of memory"):
        open_cached(place, refuse)
    assert open_cached(place, Provider()) == "read"


def test_one_builds_and_the_others_wait(place: Path) -> None:
    begun, go = threading.Event(), threading.Event()

    def hold(_folder: Path) -> None:
        begun.set()
        assert go.wait(60)

    first, second, found = Provider(hold), Provider(), []
    threads = [threading.Thread(target=lambda: found.append(open_cached(place, first)))]
    threads[0].start()
    assert begun.wait(60)
    threads.append(threading.Thread(target=lambda: found.append(open_cached(place, second))))
    threads[1].start()
    go.set()
    for thread in threads:
        thread.join(60)
    assert sorted(found) == ["built", "read"]
    assert second.built == 0


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendUnavailableError, match="set BERTRT_CACHE to a folder that can be written"):
        open_cached(tmp_path / "file" / "hash", Provider())
