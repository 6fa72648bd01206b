"""Weight files that are broken, do not belong together, or would do harm are refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bertrt.errors import (
    BertRTError,
    CheckpointError,
    CorruptCheckpointError,
    TensorShapeError,
    UnsafePathError,
)
from bertrt_export.checkpoints import open_checkpoint


@pytest.fixture
def folder(
    small_bert: Callable[..., transformers.BertForPreTraining], save_checkpoint: Callable[..., Path]
) -> Path:
    return save_checkpoint(small_bert())


def refusal(folder: Path, kind: type[BertRTError]) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(folder)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert str(path) in refusal(folder, CorruptCheckpointError)


@pytest.fixture
def sharded(
    small_bert: Callable[..., transformers.BertForPreTraining], save_checkpoint: Callable[..., Path]
) -> Path:
    return save_checkpoint(small_bert(), max_shard_size="30KB")


def reindex(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/../../b", "..", "", "a\\b", "c:d", "nul\0"]
)
def test_index_that_names_a_file_outside(name: str, sharded: Path) -> None:
    (sharded.parent / "outside.safetensors").write_bytes(b"")
    reindex(sharded, lambda index: index.update({"cls.predictions.bias": name}))
    message = refusal(sharded, UnsafePathError)
    assert repr(name) in message
    assert "model.safetensors.index.json" in message


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_broken_index(text: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(sharded, CorruptCheckpointError)


def test_index_with_a_file_that_is_missing(sharded: Path) -> None:
    path = sorted(sharded.glob("model-*"))[1]
    path.unlink()
    message = refusal(sharded, CorruptCheckpointError)
    assert f"{path.name!r}, which is not there" in message


@pytest.mark.parametrize("name", ["a" * 5000, "a\ud800", "\x1b[31m"], ids=["long", "surrogate", "control"])
def test_index_with_a_file_that_cannot_be_there(name: str, sharded: Path) -> None:
    reindex(sharded, lambda index: index.update(dict.fromkeys(index, name)))
    message = refusal(sharded, CorruptCheckpointError)
    assert "which is not there" in message
    assert message.isprintable()
    assert len(message) < 500


def test_index_that_does_not_fit_its_files(sharded: Path) -> None:
    first = min(path.name for path in sharded.glob("model-*"))
    reindex(sharded, lambda index: index.update({"cls.predictions.bias": first}))
    assert "'cls.predictions.bias' among them" in refusal(sharded, CorruptCheckpointError)


def test_two_files_with_the_same_tensor(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("model-*"))
    save_file({**load_file(second), **load_file(first)}, second)
    assert "another file of the index does too" in refusal(sharded, CorruptCheckpointError)


@pytest.fixture
def pickled(folder: Path) -> Path:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_pytorch_file_without_pytorch(pickled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    message = refusal(pickled, CheckpointError)
    assert "pip install 'bertrt[torch]'" in message


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_pytorch_file(keep: float, pickled: Path) -> None:
    path = pickled / "pytorch_model.bin"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    assert str(path) in refusal(pickled, CorruptCheckpointError)


class Malicious:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_file_cannot_run_code(zipped: bool, pickled: Path, tmp_path: Path) -> None:
    target = tmp_path / "made by the checkpoint"
    torch.save(
        {"a": Malicious(str(target))}, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=zipped
    )
    assert "weights_only=True" in refusal(pickled, CorruptCheckpointError)
    assert not target.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.to("meta"),
        lambda tensor: torch._neg_view(tensor),
        lambda tensor: torch.zeros(1, 1).expand(tensor.shape),
        lambda tensor: torch.zeros(1, tensor.shape[1]).expand(tensor.shape),
    ],
    ids=["meta", "negated", "expanded", "one row"],
)
def test_pytorch_tensor_without_numbers_of_its_own(
    change: Callable[[torch.Tensor], torch.Tensor], pickled: Path
) -> None:
    path = pickled / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    tensors["cls.seq_relationship.weight"] = change(tensors["cls.seq_relationship.weight"])
    torch.save(tensors, path)
    assert "'cls.seq_relationship.weight' without a number of its own" in refusal(
        pickled, CorruptCheckpointError
    )


@pytest.mark.parametrize("value", [[torch.ones(2)], {"state_dict": {"a": torch.ones(2)}}, {3: torch.ones(2)}])
def test_pytorch_file_of_something_else(value: Any, pickled: Path) -> None:
    torch.save(value, pickled / "pytorch_model.bin")
    assert "does not hold a dictionary of tensors" in refusal(pickled, CorruptCheckpointError)


def test_pytorch_tensor_that_is_sparse(pickled: Path) -> None:
    path = pickled / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    tensors["cls.seq_relationship.weight"] = torch.eye(2, 24).to_sparse()
    torch.save(tensors, path)
    assert "stored as sparse_coo" in refusal(pickled, TensorShapeError)


def test_demo_needs_neither_pytorch_nor_transformers_nor_the_hub() -> None:
    code = (
        "import sys; from bertrt_export.checkpoints import open_checkpoint\n"
        "with open_checkpoint('demo') as checkpoint: checkpoint.tensor('pooler.dense.weight')\n"
        "print({'torch', 'transformers', 'huggingface_hub', 'onnx', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "set()\n"
