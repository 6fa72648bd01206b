"""The backend on ONNX Runtime: its independence of the batch, its blocks, graphs that it refuses.

What every backend must do is tested in ``test_backends.py``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fake_machine import make_batch

from bertrt.backends.base import TokenBatch, Wanted
from bertrt.backends.onnxruntime.sessions import session_options
from bertrt.backends.padded import BlockLimits, split_by_length
from bertrt.backends.registry import create_backend
from bertrt.errors import (
    BackendRunError,
    ManifestError,
    ShapeMismatchError,
)
from bertrt.folder import MANIFEST_NAME, EngineFolder, record_files
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.exporter import export_engine


def sequence(batch: TokenBatch, index: int) -> TokenBatch:
    start, end = batch.offsets[index : index + 2]
    return TokenBatch(
        input_ids=batch.input_ids[start:end],
        token_type_ids=batch.token_type_ids[start:end],
        offsets=np.array([0, end - start], np.int64),
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("dialect", ["ort", "onnx"])
def test_an_answer_does_not_depend_on_its_neighbours(
    precision: str, dialect: str, demo_engine: Callable[..., Path]
) -> None:
    backend = create_backend("onnxruntime", EngineFolder.open(demo_engine(precision, dialect)), 2)
    batch = make_batch([30, 1, 200, 31, 64, 500, 7, 29, 33], seed=3)
    wanted = Wanted(hidden_states=True, pooled=True)
    together = backend.run(batch, wanted)
    for index in range(batch.num_sequences):
        alone = backend.run(sequence(batch, index), wanted)
        start, end = batch.offsets[index : index + 2]
        assert together.hidden_states is not None
        assert together.pooled is not None
        # float32 sums may be taken in another order for another number of rows. In int8 such a difference can
        # push a value over a rounding border, one step of a 127th in one term of 256: at most a percent or so
        # of a hidden state of size 1, where a shared scale would move all of them.
        tolerance = 0.05 if precision == "int8" else 1e-4
        np.testing.assert_allclose(
            together.hidden_states[start:end], alone.hidden_states, rtol=0, atol=tolerance
        )
        np.testing.assert_allclose(together.pooled[index], alone.pooled[0], rtol=0, atol=tolerance)
    backend.close()


def test_a_neighbour_with_an_outlier_moves_nothing_in_int8(
    small_bert: Any, save_checkpoint: Any, tmp_path: Path
) -> None:
    """What a scale shared by the whole tensor gets wrong: a huge activation elsewhere coarsens everything."""
    model = small_bert()
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight[:4] = 0.01
        model.bert.embeddings.word_embeddings.weight[60] = 0.0
        model.bert.embeddings.word_embeddings.weight[60, 0] = 1e4
        model.bert.embeddings.LayerNorm.weight[0] = 100.0
    out = tmp_path / "engine"
    with open_checkpoint(save_checkpoint(model)) as checkpoint:
        export_engine(checkpoint, out, precision="int8")
    backend = create_backend("onnxruntime", EngineFolder.open(out), 2)
    quiet = np.array([2, 7, 8, 9, 10, 3], np.int32)
    loud = np.array([2, 60, 60, 60, 60, 3], np.int32)
    zeros = np.zeros(12, np.int32)
    alone = backend.run(
        TokenBatch(quiet, zeros[:6], np.array([0, 6], np.int64)), Wanted(hidden_states=True)
    ).hidden_states
    together = backend.run(
        TokenBatch(np.concatenate([quiet, loud]), zeros, np.array([0, 6, 12], np.int64)),
        Wanted(hidden_states=True),
    ).hidden_states
    assert together is not None
    # A value at a rounding border may move by a step of its own row; a shared scale's steps would be near 1.
    np.testing.assert_allclose(together[:6], alone, rtol=0, atol=0.02)


def test_blocks_hold_every_sequence_once_and_little_padding() -> None:
    generator = np.random.default_rng(0)
    for lengths in (
        np.array([5]),
        np.array([1] * 300),
        np.array([512, 1]),
        generator.integers(1, 513, 200),
        np.arange(512, 0, -1),
    ):
        blocks = split_by_length(lengths.astype(np.int64), BlockLimits(small=256))
        assert sorted(np.concatenate(blocks).tolist()) == list(range(len(lengths)))
        for block in blocks:
            padded = lengths[block].max() * len(block)
            assert padded <= max(256, 1.15 * lengths[block].sum())


def test_threads_default_to_the_processors_that_may_be_used(
    demo_engine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bertrt.backends.onnxruntime.backend.usable_cpus", lambda: 3)
    assert create_backend("onnxruntime", EngineFolder.open(demo_engine("int8"))).threads == 3


def test_int8_asks_for_products_that_do_not_saturate(demo_engine: Callable[..., Path]) -> None:
    manifest = EngineFolder.open(demo_engine("int8")).manifest
    entry = "session.x64quantprecision"
    assert session_options(manifest, 1).get_session_config_entry(entry) == "1"


@pytest.fixture
def spoiled(demo_engine: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_engine("int8"), tmp_path / "engine"))


def resign(folder: Path, **changes: Any) -> None:
    """Write hashes that fit the files as they are now, as an attacker or a wrong tool would."""
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"] = {
        name: {"size": record.size, "sha256": record.sha256} for name, record in record_files(folder).items()
    }
    manifest.update(changes)
    path.write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x08\x0a" * 1000])
def test_a_corrupt_graph(spoiled: Path, data: bytes) -> None:
    (spoiled / "engine.onnx").write_bytes(data)
    resign(spoiled)
    with pytest.raises(BackendRunError, match="cannot load 'engine.onnx'"):
        create_backend("onnxruntime", EngineFolder.open(spoiled))


def test_a_truncated_graph_and_truncated_weights(spoiled: Path) -> None:
    graph = spoiled / "engine.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[: len(whole) // 2])
    resign(spoiled)
    with pytest.raises(BackendRunError, match="cannot load"):
        create_backend("onnxruntime", EngineFolder.open(spoiled))
    graph.write_bytes(whole)
    weights = spoiled / "model.onnx_data"
    weights.write_bytes(weights.read_bytes()[:100_000])
    resign(spoiled)
    with pytest.raises(BackendRunError, match="cannot load"):
        create_backend("onnxruntime", EngineFolder.open(spoiled))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 8000),
        ("max_position_embeddings", 1024),
        ("type_vocab_size", 3),
        ("num_hidden_layers", 5),
    ],
)
def test_a_graph_of_another_architecture(spoiled: Path, name: str, value: int) -> None:
    manifest = json.loads((spoiled / MANIFEST_NAME).read_text(encoding="utf-8"))
    true = manifest["architecture"][name]
    resign(spoiled, architecture={**manifest["architecture"], name: value})
    with pytest.raises(ShapeMismatchError, match=f"'engine.onnx' was built for {name} {true}.*says {value}"):
        create_backend("onnxruntime", EngineFolder.open(spoiled))


@pytest.mark.parametrize("head", ["mlm", "nsp", "pooler"])
def test_heads_that_are_not_the_graphs(
    head: str, spoiled: Path, small_bert: Any, save_checkpoint: Any, tmp_path: Path
) -> None:
    """Too few heads in the manifest of a graph that has all, too many in that of a graph that has none."""
    everything = {"mlm": True, "nsp": True, "pooler": True}
    if head != "nsp":  # next sentence has no input of its own, so a graph that has it too does no harm
        resign(spoiled, heads={**everything, head: False})
        with pytest.raises(
            ShapeMismatchError, match="the inputs of 'engine.onnx' are .*export the engine again"
        ):
            create_backend("onnxruntime", EngineFolder.open(spoiled))
    plain = transformers.BertModel(small_bert().config, add_pooling_layer=False)
    out = tmp_path / "plain"
    with open_checkpoint(save_checkpoint(plain)) as checkpoint:
        export_engine(checkpoint, out)
    resign(out, heads={**dict.fromkeys(everything, False), head: True})
    with pytest.raises(ShapeMismatchError, match="it is absent"):
        create_backend("onnxruntime", EngineFolder.open(out))


def test_a_graph_from_elsewhere(spoiled: Path) -> None:
    shutil.copy(spoiled / "model.onnx", spoiled / "engine.onnx")
    resign(spoiled)
    with pytest.raises(ShapeMismatchError, match="'hidden_states' of 'engine.onnx' has width none"):
        create_backend("onnxruntime", EngineFolder.open(spoiled))


@pytest.mark.parametrize("role", ["graph", "weights"])
def test_a_manifest_without_a_role(spoiled: Path, role: str) -> None:
    roles = {"graph": "engine.onnx", "weights": "model.onnx_data"}
    del roles[role]
    resign(spoiled, backends={"onnxruntime": roles})
    with pytest.raises(ManifestError, match=f"names no '{role}'"):
        create_backend("onnxruntime", EngineFolder.open(spoiled))
