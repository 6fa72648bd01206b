"""The engine folder: each violation has its own error, and a folder is written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bertrt.folder
from bertrt.errors import (
    EngineFolderError,
    EngineNotFoundError,
    HashMismatchError,
    ManifestError,
    MissingFileError,
    UnsafePathError,
    UnsupportedVersionError,
)
from bertrt.folder import MANIFEST_NAME, EngineFolder, sha256, write_file
from bertrt.manifest import FORMAT_VERSION, Manifest


@pytest.fixture
def folder(demo_engine: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the demo engine that a test may spoil."""
    return Path(shutil.copytree(demo_engine("int8"), tmp_path / "engine"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def test_opens_and_round_trips(folder: Path) -> None:
    opened = EngineFolder.open(folder)
    text = (folder / MANIFEST_NAME).read_text(encoding="utf-8")
    assert opened.manifest.to_json() == text
    assert Manifest.from_json(text) == opened.manifest
    assert opened.size() == sum(
        path.stat().st_size for path in folder.iterdir() if path.name != MANIFEST_NAME
    )


def test_no_folder_and_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(EngineNotFoundError, match="no engine folder.*bertrt export"):
        EngineFolder.open(tmp_path / "absent")
    with pytest.raises(EngineNotFoundError, match=r"no engine\.json.*bertrt export"):
        EngineFolder.open(tmp_path)


def test_missing_file(folder: Path) -> None:
    (folder / "model.onnx_data").unlink()
    with pytest.raises(MissingFileError, match="'model.onnx_data' is missing"):
        EngineFolder.open(folder)


def test_truncated_file_is_seen_without_hashing(folder: Path) -> None:
    path = folder / "model.onnx_data"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(HashMismatchError, match=f"{size - 1} bytes, the manifest says {size}"):
        EngineFolder.open(folder, verify=False)


def test_one_flipped_bit(folder: Path) -> None:
    path = folder / "model.onnx_data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    EngineFolder.open(folder, verify=False)
    with pytest.raises(HashMismatchError, match="SHA-256"):
        EngineFolder.open(folder)


def test_hashes_of_some_files(folder: Path) -> None:
    """Those that are going to be read; sizes are compared of all."""
    path = folder / "model.onnx_data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    opened = EngineFolder.open(folder, verify=False)
    opened.check()
    opened.check(hashes=["tokenizer.json", "engine.onnx"])
    with pytest.raises(HashMismatchError, match=r"model\.onnx_data.*SHA-256"):
        opened.check(hashes=["tokenizer.json", "model.onnx_data"])
    path.write_bytes(data[:-1])
    with pytest.raises(HashMismatchError, match=r"model\.onnx_data.* truncated or was replaced"):
        opened.check(hashes=["tokenizer.json"])


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "1", None, 1.5, True, 1.0])
def test_other_versions(folder: Path, version: object) -> None:
    edit(folder, lambda manifest: manifest.update(format_version=version))
    hint = "update bertrt" if version == FORMAT_VERSION + 1 else "export it again"
    with pytest.raises(UnsupportedVersionError, match=hint):
        EngineFolder.open(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "a/../../b",
        "..",
        "./engine.onnx",
        "a//b",
        "a\\..\\b",
        "C:/windows",
        "a\0b",
        "",
    ],
)
@pytest.mark.parametrize("place", ["files", "backends"])
def test_paths_that_leave_the_folder(folder: Path, name: str, place: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        if place == "files":
            manifest["files"][name] = {"size": 1, "sha256": "0" * 64}
        else:
            manifest["backends"]["onnxruntime"]["graph"] = name

    edit(folder, change)
    with pytest.raises(UnsafePathError, match="must lie inside the engine folder"):
        EngineFolder.open(folder)


def test_a_link_that_leaves_the_folder(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.move(folder / "engine.onnx", outside)
    (folder / "engine.onnx").symlink_to(outside)
    with pytest.raises(UnsafePathError, match="link that leaves .*export the engine again"):
        EngineFolder.open(folder)


def test_a_linked_folder_below_it_leaves_it_too(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.move(folder / "engine.onnx", outside)
    (folder / "sub").symlink_to(outside)

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"]["sub/engine.onnx"] = manifest["files"].pop("engine.onnx")
        manifest["backends"]["onnxruntime"]["graph"] = "sub/engine.onnx"

    edit(folder, change)
    with pytest.raises(UnsafePathError, match="'sub/engine.onnx' .* link that leaves"):
        EngineFolder.open(folder)


def test_a_link_to_the_whole_folder_is_fine(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(folder)
    assert EngineFolder.open(tmp_path / "current").manifest.precision == "int8"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"x"', "{}", '{"format": "other"}', "[" * 100_000],
    ids=["empty", "cut", "list", "null", "string", "bare", "other", "deep"],
)
def test_what_is_not_a_manifest(folder: Path, text: str) -> None:
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(ManifestError):
        EngineFolder.open(folder)


def test_bytes_that_are_not_utf8(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_bytes(b"\xff\xfe")
    with pytest.raises(ManifestError, match="'.*engine.json' is not UTF-8 .*export the engine again"):
        EngineFolder.open(folder)


def test_a_huge_manifest_is_not_read(folder: Path) -> None:
    with (folder / MANIFEST_NAME).open("wb") as file:
        file.truncate(5 << 20)
    with pytest.raises(ManifestError, match="'.*engine.json' is larger than .*export the engine again"):
        EngineFolder.open(folder)


@pytest.mark.parametrize(
    "field",
    ["source", "architecture", "precision", "dialect", "heads", "backends", "files", "graph", "versions"],
)
@pytest.mark.parametrize("value", [None, 3, "x", []])
def test_fields_of_the_wrong_type(folder: Path, field: str, value: object) -> None:
    edit(folder, lambda manifest: manifest.update({field: value}))
    if field == "dialect" and value is None:  # a folder without graphs has none
        assert EngineFolder.open(folder).manifest.dialect is None
        return
    with pytest.raises(ManifestError, match=field):
        EngineFolder.open(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", 255),
        ("vocab_size", 1 << 40),
        ("vocab_size", True),
        ("vocab_size", "8"),
        ("vocab_size", []),
        ("num_attention_heads", {}),
        ("layer_norm_eps", []),
        ("layer_norm_eps", "0"),
        ("layer_norm_eps", False),
        ("hidden_act", "swish"),
        ("hidden_act", []),
        ("hidden_act", {}),
        ("hidden_act", None),
    ],
)
def test_impossible_architectures(folder: Path, name: str, value: object) -> None:
    edit(folder, lambda manifest: manifest["architecture"].update({name: value}))
    with pytest.raises(ManifestError, match=name):
        EngineFolder.open(folder)


@pytest.mark.parametrize("roles", [None, 3, "engine.onnx", ["engine.onnx"]])
def test_roles_of_the_wrong_type(folder: Path, roles: object) -> None:
    edit(folder, lambda manifest: manifest["backends"].update(onnxruntime=roles))
    message = (
        f"'backends.onnxruntime' must be of type dict, got {type(roles).__name__}; export the engine again"
    )
    with pytest.raises(ManifestError, match=message):
        EngineFolder.open(folder)


def test_a_size_below_zero(folder: Path) -> None:
    edit(folder, lambda manifest: manifest["files"]["tokenizer.json"].update(size=-1))
    message = r"files\['tokenizer\.json'\]\.size' must be 0 bytes or more, got -1; export the engine again"
    with pytest.raises(ManifestError, match=message):
        EngineFolder.open(folder)


@pytest.mark.parametrize(("place", "field"), [((), "target"), (("source",), "kind")])
def test_words_that_are_none_of_ours(folder: Path, place: tuple[str, ...], field: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        for name in place:
            manifest = manifest[name]
        manifest[field] = "other"

    edit(folder, change)
    where = ".".join((*place, field))
    message = f"'{where}' must be one of .*, got 'other'; update bertrt, or export the engine again"
    with pytest.raises(ManifestError, match=message):
        EngineFolder.open(folder)


def test_a_backend_file_without_a_hash(folder: Path) -> None:
    edit(folder, lambda manifest: manifest["backends"]["onnxruntime"].update(graph="other.onnx"))
    with pytest.raises(
        ManifestError, match=r"'other\.onnx', which is not among 'files'; export the engine again"
    ):
        EngineFolder.open(folder)


@pytest.mark.parametrize(
    "name",
    [
        "added_tokens.json",
        "special_tokens_map.json",
        "vocab.txt",
        "other.bertrt",
        "other.onnx",
        "other.onnx_data",
        "pytorch_model.bin",
        "model.safetensors",
    ],
)
def test_a_file_that_a_reader_would_take_is_listed(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"{}")
    with pytest.raises(ManifestError, match=f"'{name}' .* not among the manifest's 'files'.*remove it"):
        EngineFolder.open(folder, verify=False)


def test_other_files_are_nobodys_business(folder: Path) -> None:
    for name in ("README.md", "drift.json", "drift.md", "drift.html", ".engine.json.0123456789ab"):
        (folder / name).write_bytes(b"x")
    EngineFolder.open(folder)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
def test_numbers_that_are_none(folder: Path, number: str) -> None:
    edit(folder, lambda manifest: manifest["graph"].update(nodes="HERE"))
    path = folder / MANIFEST_NAME
    path.write_text(path.read_text(encoding="utf-8").replace('"HERE"', number), encoding="utf-8")
    with pytest.raises(ManifestError, match=number.removeprefix("-")):
        EngineFolder.open(folder)


@pytest.mark.parametrize("place", ["source", "files", "versions"])
def test_half_a_surrogate_pair(folder: Path, place: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        if place == "source":
            manifest["source"]["name"] = "\ud800"
        else:
            manifest[place]["\udcff"] = "x"

    edit(folder, change)
    assert "\\ud" in (folder / MANIFEST_NAME).read_text(encoding="utf-8")
    with pytest.raises(ManifestError, match="surrogates not allowed"):
        EngineFolder.open(folder)


def test_paths_that_no_system_has(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineNotFoundError, match="no engine folder"):
        EngineFolder.open("a\0b")
    with pytest.raises(EngineFolderError, match="File name too long"):
        EngineFolder.open(tmp_path / ("x" * 5000))
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(EngineFolderError, match="symbolic links"):
        EngineFolder.open(tmp_path / "round")
    edit(folder, lambda manifest: manifest["files"].update({"x" * 5000: {"size": 1, "sha256": "0"}}))
    with pytest.raises(EngineFolderError, match="File name too long"):
        EngineFolder.open(folder)


def test_a_manifest_that_is_no_file(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    os.mkfifo(folder / MANIFEST_NAME)
    with pytest.raises(EngineFolderError, match="is not a file"):
        EngineFolder.open(folder)
    (folder / MANIFEST_NAME).unlink()
    (folder / MANIFEST_NAME).mkdir()
    with pytest.raises(EngineFolderError, match="is not a file"):
        EngineFolder.open(folder)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EIO])
def test_files_that_vanish_or_cannot_be_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(path: Path) -> str:
        raise OSError(number, os.strerror(number), str(path))

    # To root no file is unreadable, so the system's answer is played.
    monkeypatch.setattr(bertrt.folder, "sha256", refuse)
    expected = MissingFileError if number == errno.ENOENT else EngineFolderError
    with pytest.raises(expected, match="config.json.*(vanished|" + os.strerror(number) + ")"):
        EngineFolder.open(folder)


def test_it_knows_whether_it_was_changed(folder: Path, tmp_path: Path) -> None:
    opened = EngineFolder.open(folder)
    (folder / "drift.md").write_text("a report")
    assert opened.is_unchanged()
    data = (folder / "engine.onnx").read_bytes()
    (folder / "engine.onnx").write_bytes(data)
    assert not opened.is_unchanged()
    opened = EngineFolder.open(folder)
    write_file(folder / MANIFEST_NAME, (folder / MANIFEST_NAME).read_bytes())
    assert not opened.is_unchanged()
    opened = EngineFolder.open(folder)
    folder.rename(tmp_path / "retired")
    assert not opened.is_unchanged()


def test_every_error_is_one_of_ours() -> None:
    for error in (ManifestError, MissingFileError, HashMismatchError, UnsafePathError, EngineNotFoundError):
        assert issubclass(error, EngineFolderError)


def test_readers_see_the_old_or_the_new_manifest(folder: Path) -> None:
    opened = EngineFolder.open(folder)
    stop = threading.Event()
    failures: list[Exception] = []

    def read() -> None:
        while not stop.is_set():
            try:
                EngineFolder.open(folder, verify=False)
            except Exception as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for count in range(50):
        opened = opened.replace_manifest(opened.manifest.with_drift({"count": count}))
    stop.set()
    reader.join()
    assert not failures
    assert EngineFolder.open(folder).manifest.drift == {"count": 49}


def test_sha256_is_that_of_hashlib(tmp_path: Path) -> None:
    import hashlib

    data = os.urandom((1 << 20) + 17)
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()
