"""Built-in engines: exported once into the cache folder, however many processes ask and however one of them ends."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bertrt import __version__
from bertrt.builtin import resolve
from bertrt.engine import Engine
from bertrt.errors import EngineFolderError, EngineNotFoundError, ExportError
from bertrt.folder import EngineFolder
from bertrt_export import demo_engine

# A distribution as an installer leaves it, whose entry points export an engine of 1,000 bytes, or fail.
EXPORTER = """
import os
from pathlib import Path

from bertrt.architecture import BertArchitecture
from bertrt.folder import record_files, write_folder
from bertrt.manifest import Heads, Manifest, Source


def export(out):
    with open(os.environ["STUB_LOG"], "a") as log:
        log.write("exported\\n")
    if "STUB_WAITS" in os.environ:
        print("exporting", flush=True)
        input()
    with write_folder(out) as folder:
        (folder / "model.onnx").write_bytes(b"x" * 1000)
        architecture = BertArchitecture.from_config({"model_type": "bert"})
        manifest = Manifest(
            source=Source(kind="random", name="stub", seed=0), architecture=architecture, precision="fp32",
            dialect="ort", heads=Heads(mlm=True, nsp=True, pooler=True), backends={}, files=record_files(folder),
        )
        (folder / "engine.json").write_text(manifest.to_json())


def without_extra(out):
    import a_package_that_is_not_installed


def full_disk(out):
    with write_folder(out) as folder:
        (folder / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device")


def full_disk_outside(out):
    out.mkdir()
    (out / "half").write_bytes(b"x")
    raise OSError(28, "No space left on device")


class Versioned:
    version = "one"

    def __call__(self, out):
        export(out)


versioned = Versioned()


def interrupted(out):
    out.mkdir()
    (out / "half").write_bytes(b"x")
    raise KeyboardInterrupt


def writes_nothing(out):
    pass
"""
ENTRY_POINTS = """
[bertrt.builtin_engines]
stub = stub_exporter:export
lacking = no_such_module:export
without-extra = stub_exporter:without_extra
full-disk = stub_exporter:full_disk
full-disk-outside = stub_exporter:full_disk_outside
versioned = stub_exporter:versioned
interrupted = stub_exporter:interrupted
writes-nothing = stub_exporter:writes_nothing
"""
CHILD = "from bertrt.builtin import resolve; print('asking', flush=True); input(); print(resolve('stub'), flush=True)"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder (not there yet) of a process in which the stub is installed."""
    site = tmp_path / "site"
    metadata = site / "stub_exporter-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "stub_exporter.py").write_text(EXPORTER)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: stub-exporter\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "stub_exporter", raising=False)
    # For the processes that tests start.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, sys.path)]))
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("BERTRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def exports(cache: Path) -> int:
    log = cache.parent / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def visible(cache: Path) -> list[str]:
    """What is in the cache folder besides lock files."""
    paths = cache.iterdir() if cache.exists() else ()
    return sorted(path.name for path in paths if not path.name.endswith(".lock"))


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def kill() -> None:
        for process in started:
            process.kill()

    # A process that waits for ever is a failed assertion, not a test run that hangs.
    watchdog = threading.Timer(120, kill)
    watchdog.start()
    yield started
    watchdog.cancel()
    for process in started:
        process.kill()
        process.communicate()


def ask(processes: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    """Start a process that will resolve the stub when it is sent a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    processes.append(process)
    assert line(process) == "asking"
    return process


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def send(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_it_is_exported_once_and_kept(cache: Path) -> None:
    target = cache / f"stub-{__version__}-fp32"
    assert resolve("stub") == target
    assert EngineFolder.open(target).manifest.source.name == "stub"
    assert resolve("stub") == target
    assert exports(cache) == 1
    assert visible(cache) == [target.name]


def test_processes_that_ask_at_once_share_one_export(
    cache: Path, processes: list[subprocess.Popen[str]]
) -> None:
    asking = [ask(processes) for _ in range(3)]
    for process in asking:
        send(process)
    found = [Path(line(process)) for process in asking]
    assert [process.wait(timeout=60) for process in asking] == [0, 0, 0]
    assert set(found) == {cache / f"stub-{__version__}-fp32"}
    EngineFolder.open(found[0])
    assert exports(cache) == 1


def test_one_that_asks_during_an_export_waits_for_it(
    cache: Path, processes: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_WAITS", "1")
    first, second = ask(processes), ask(processes)
    send(first)
    assert line(first) == "exporting"
    send(second)
    assert visible(cache) == [f".stub-{__version__}-fp32.partial"]
    send(first)
    found = line(first)
    # Were the second to export too, it would print "exporting" instead.
    assert line(second) == found == str(cache / f"stub-{__version__}-fp32")
    assert exports(cache) == 1


def test_a_killed_export_is_made_again(
    cache: Path, processes: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_WAITS", "1")
    first = ask(processes)
    send(first)
    assert line(first) == "exporting"
    first.kill()
    first.wait()
    monkeypatch.delenv("STUB_WAITS")
    assert resolve("stub") == cache / f"stub-{__version__}-fp32"
    assert exports(cache) == 2
    assert visible(cache) == [f"stub-{__version__}-fp32"]


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.onnx", 10)


def remove_manifest(folder: Path) -> None:
    (folder / "engine.json").unlink()


def raise_version(folder: Path) -> None:
    manifest = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps({**manifest, "format_version": 99}))


def change_a_byte(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"y" * 1000)


@pytest.mark.parametrize("damage", [truncate, remove_manifest, raise_version, change_a_byte])
def test_an_engine_that_no_longer_opens_is_made_again(cache: Path, damage: object) -> None:
    assert callable(damage)
    target = resolve("stub")
    damage(target)
    assert resolve("stub") == target
    EngineFolder.open(target)
    assert exports(cache) == 2
    assert visible(cache) == [target.name]


def test_a_file_in_its_place_is_replaced(cache: Path) -> None:
    cache.mkdir()
    (cache / f"stub-{__version__}-fp32").write_text("not a folder")
    EngineFolder.open(resolve("stub"))


def test_hashes_are_left_out_on_request(cache: Path) -> None:
    target = resolve("stub")
    change_a_byte(target)
    assert resolve("stub", verify=False) == target
    assert exports(cache) == 1


def test_an_existing_engine_wins(cache: Path) -> None:
    (cache.parent / "stub").mkdir()
    (cache.parent / "stub" / "engine.json").write_text("")
    assert resolve("stub") == Path("stub")
    assert resolve(cache.parent / "stub") == cache.parent / "stub"
    assert exports(cache) == 0


def test_a_folder_of_something_else_does_not_hide_it(cache: Path) -> None:
    (cache.parent / "stub").mkdir()
    assert resolve("stub") == cache / f"stub-{__version__}-fp32"
    assert resolve("./stub") == Path("stub")
    assert resolve(cache.parent / "site") == cache.parent / "site"


def test_another_version_is_another_engine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve("versioned")
    assert first == cache / f"versioned-{__version__}-one-fp32"
    monkeypatch.setattr(sys.modules["stub_exporter"].versioned, "version", "two", raising=False)
    assert resolve("versioned") == cache / f"versioned-{__version__}-two-fp32"
    assert resolve("versioned") != first
    assert exports(cache) == 2


def test_the_version_of_the_demo_follows_the_exporter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(demo_engine.__file__).parent
    for name in (
        "graph/model.py",
        "graph/products.py",
        "native/model.py",
        "quantize.py",
        "exporter.py",
        "targets.py",
        "demo/model.safetensors",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(package / name, tmp_path / name)
    monkeypatch.setattr(demo_engine, "__file__", str(tmp_path / "demo_engine.py"))
    seen = [demo_engine.export_demo_engine.version]
    assert demo_engine.export_demo_engine.version == seen[0]
    changed = ("graph/model.py", "native/model.py", "quantize.py", "exporter.py", "targets.py")
    for name in (*changed, "demo/model.safetensors"):
        with (tmp_path / name).open("ab") as file:
            file.write(b"#")
        seen.append(demo_engine.export_demo_engine.version)
    assert len(set(seen)) == 7


def test_to_ask_for_the_version_of_the_demo_loads_no_exporter() -> None:
    code = (
        "import sys; from bertrt_export.demo_engine import export_demo_engine as demo; assert demo.version; "
        "assert not {'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_that_no_system_has(cache: Path) -> None:
    for name in ("x" * 5000, "a\0b"):
        assert resolve(name) == Path(name)
        with pytest.raises(EngineFolderError):
            Engine.load(name)


def test_other_names_are_left_alone(cache: Path) -> None:
    assert resolve("no-such-engine") == Path("no-such-engine")
    assert resolve("../stub") == Path("../stub")
    with pytest.raises(EngineNotFoundError, match="no-such-engine"):
        Engine.load("no-such-engine")
    assert not cache.exists()


@pytest.mark.parametrize("name", ["lacking", "without-extra"])
def test_a_missing_exporter_says_what_to_install(cache: Path, name: str) -> None:
    with pytest.raises(
        ExportError, match=r'cannot be imported here .*; install it with: pip install "bertrt\[export\]"'
    ):
        resolve(name)
    assert visible(cache) == []


@pytest.mark.parametrize("name", ["full-disk", "full-disk-outside"])
def test_a_full_disk(cache: Path, name: str) -> None:
    with pytest.raises(ExportError, match="No space left on device; set BERTRT_CACHE") as caught:
        resolve(name)
    assert f"{str(cache)!r}" in str(caught.value)
    assert ".partial" not in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert visible(cache) == []


def test_an_interrupted_export_leaves_nothing(cache: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        resolve("interrupted")
    assert visible(cache) == []


def test_an_exporter_that_writes_nothing(cache: Path) -> None:
    with pytest.raises(EngineNotFoundError):
        resolve("writes-nothing")
    assert visible(cache) == []


def test_a_cache_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Below a file: refused to every user, where a folder's permissions are not to root.
    (cache.parent / "file").write_text("")
    monkeypatch.setenv("BERTRT_CACHE", str(cache.parent / "file" / "cache"))
    with pytest.raises(
        ExportError, match=r"cannot write the built-in engine 'stub' to the cache folder .*BERTRT_CACHE"
    ):
        resolve("stub")
    assert exports(cache) == 0


def test_an_engine_in_a_cache_that_cannot_be_written_is_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = resolve("stub")
    for path in cache.iterdir():
        if path.name.endswith(".lock"):
            path.unlink()
    # No lock is taken for an engine that opens, so nothing is written.
    assert resolve("stub") == target
    assert [path.name for path in cache.iterdir()] == [target.name]


def test_where_the_cache_is(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"stub-{__version__}-fp32"
    monkeypatch.setenv("HOME", str(cache.parent / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent / "xdg"))
    assert resolve("stub") == cache / name
    monkeypatch.setenv("BERTRT_CACHE", "relative")
    assert resolve("stub") == cache.parent / "relative" / name
    monkeypatch.setenv("BERTRT_CACHE", "")
    assert resolve("stub") == cache.parent / "xdg" / "bertrt" / name
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert resolve("stub") == cache.parent / "home" / ".cache" / "bertrt" / name
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert resolve("stub") == cache.parent / "home" / ".cache" / "bertrt" / name


def test_a_user_without_a_home(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("BERTRT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(ExportError, match="set BERTRT_CACHE"):
        resolve("stub")
