"""The weight files of a local checkpoint: which ones there are, one or several, and their hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertrt.backends.base import Float32
from bertrt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsafePathError,
)
from bertrt.manifest import safe_name
from bertrt_export.checkpoints.safetensors_file import SafetensorsFile
from bertrt_export.checkpoints.store import TensorInfo, TensorStore, quote
from bertrt_export.checkpoints.torch_file import TorchFile

# In the order in which transformers looks for them.
SAFETENSORS_NAMES = ("model.safetensors", "model.safetensors.index.json")
TORCH_NAMES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

_LARGEST_JSON = 16 << 20
_CHUNK = 1 << 20


def open_weights(folder: Path) -> tuple[TensorStore, str]:
    """Open the weights of a folder.

    Returns:
        The tensors, and the SHA-256 (hexadecimal) of the weight files, one after the other in the order of
        their names.

    Raises:
        CheckpointNotFoundError: there are none in a format that is read.
        CorruptCheckpointError: a file cannot be parsed, or an index does not fit its files.
        UnsafePathError: an index names a file outside the folder.
    """
    for name in (*SAFETENSORS_NAMES, *TORCH_NAMES):
        path = folder / name
        if path.is_file():
            paths = _indexed(folder, path) if name.endswith(".json") else {path: frozenset[str]()}
            opener = SafetensorsFile if name in SAFETENSORS_NAMES else TorchFile
            store = _Files.open(paths, opener)
            try:
                return store, _sha256(sorted(paths))
            except BaseException:
                store.close()
                raise
    hint = "; it is an engine folder, already exported" if (folder / "engine.json").is_file() else ""
    raise CheckpointNotFoundError(
        f"{str(folder)!r} has no weights that BertRT reads "
        f"({', '.join((*SAFETENSORS_NAMES, *TORCH_NAMES))}){hint}; give the folder that save_pretrained wrote"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CorruptCheckpointError: the file is not JSON, not an object, or too large to be either.
        CheckpointError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_JSON + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        if len(data) > _LARGEST_JSON:
            raise ValueError(f"larger than {_LARGEST_JSON} bytes")
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path} is not JSON ({error}); get the file anew") from error
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"{path} is not a JSON object; get the file anew")
    return value


def _indexed(folder: Path, index: Path) -> dict[Path, frozenset[str]]:
    """Read an index: for each file, the tensors that it must hold."""
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise CorruptCheckpointError(f"{index} has no 'weight_map' of tensors to files; get the file anew")
    names: dict[Path, set[str]] = {}
    for tensor, file in entries.items():
        if not isinstance(file, str):
            raise CorruptCheckpointError(f"{index} gives no file name for {quote(tensor)}; get the file anew")
        try:
            # By its name only: in the hub's cache every file is a link to elsewhere.
            path = folder / safe_name(file)
        except UnsafePathError as error:
            raise UnsafePathError(
                f"{index} names the file {quote(file)}, which lies outside its folder; do not use this checkpoint"
            ) from error
        names.setdefault(path, set()).add(tensor)
    for path in names:
        try:
            there = path.is_file()
        except OSError:
            # A name that no file system takes.
            there = False
        if not there:
            raise CorruptCheckpointError(
                f"{index} names {quote(path.name)}, which is not there; get the checkpoint anew"
            )
    return {path: frozenset(tensors) for path, tensors in names.items()}


@dataclass(frozen=True, slots=True)
class _Files:
    """One or several weight files as one store."""

    stores: Mapping[str, TensorStore]
    infos: Mapping[str, TensorInfo]
    opened: tuple[TensorStore, ...]

    @classmethod
    def open(cls, paths: Mapping[Path, frozenset[str]], opener: Callable[[Path], TensorStore]) -> _Files:
        """Open files, each of which must hold the tensors named for it."""
        stores: dict[str, TensorStore] = {}
        infos: dict[str, TensorInfo] = {}
        opened: list[TensorStore] = []
        try:
            for path, needed in sorted(paths.items()):
                store = opener(path)
                opened.append(store)
                if missing := sorted(needed - store.infos.keys()):
                    raise CorruptCheckpointError(
                        f"{path} lacks tensors that the index says it holds ({len(missing)}), "
                        f"{quote(missing[0])} among them; get the checkpoint anew"
                    )
                if twice := sorted(stores.keys() & store.infos.keys()):
                    raise CorruptCheckpointError(
                        f"{path} holds {quote(twice[0])}, and another file of the index does too; "
                        "get the checkpoint anew"
                    )
                stores.update(dict.fromkeys(store.infos, store))
                infos.update(store.infos)
        except BaseException:
            for store in opened:
                store.close()
            raise
        return cls(stores, infos, tuple(opened))

    def read(self, name: str) -> Float32:
        return self.stores[name].read(name)

    def close(self) -> None:
        for store in self.opened:
            store.close()


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    try:
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    digest.update(view[:count])
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()
