"""The backend on ONNX Runtime against PyTorch, its errors, and its independence of the batch."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bertrt.backends import registry
from bertrt.backends.base import Backend, TokenBatch, Wanted
from bertrt.backends.onnxruntime import session_options, split_by_length
from bertrt.backends.registry import BackendStatus, backend_status, create_backend
from bertrt.errors import (
    BackendRunError,
    BackendUnavailableError,
    EngineClosedError,
    InputError,
    ManifestError,
    MissingHeadError,
    SequenceTooLongError,
    ShapeMismatchError,
)
from bertrt.folder import MANIFEST_NAME, EngineFolder, record_files
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.exporter import export_engine
from bertrt_export.graph.probe import LayerProbe


@pytest.fixture(scope="module")
def backend(demo_engine: Callable[..., Path]) -> Backend:
    return create_backend("onnxruntime", EngineFolder.open(demo_engine("fp32")), 2)


def make_batch(lengths: list[int], seed: int = 0) -> TokenBatch:
    generator = np.random.default_rng(seed)
    tokens = sum(lengths)
    return TokenBatch(
        input_ids=generator.integers(5, 8000, tokens).astype(np.int32),
        token_type_ids=generator.integers(0, 2, tokens).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def sequence(batch: TokenBatch, index: int) -> TokenBatch:
    start, end = batch.offsets[index : index + 2]
    return TokenBatch(
        input_ids=batch.input_ids[start:end],
        token_type_ids=batch.token_type_ids[start:end],
        offsets=np.array([0, end - start], np.int64),
    )


def everything(batch: TokenBatch, positions: list[int]) -> Wanted:
    return Wanted(
        mlm_positions=np.array(positions, np.int64),
        mlm_logits=True,
        mlm_top_k=7,
        mlm_candidates=np.array([[position, 5, 8191] for position in positions], np.int64),
        hidden_states=True,
        pooled=True,
        nsp=True,
    )


def test_every_output_is_pytorchs(backend: Backend, reference_model: transformers.BertForPreTraining) -> None:
    lengths = [3, 40, 1, 512, 17, 41, 2]
    batch = make_batch(lengths)
    generator = np.random.default_rng(1)
    # In any order, some sequences with none, some positions twice.
    positions = generator.permutation(batch.num_tokens)[:50].tolist()
    positions += positions[:2]
    outputs = backend.run(batch, everything(batch, positions))
    hidden, pooled, nsp = [], [], []
    with torch.inference_mode():
        for index in range(batch.num_sequences):
            one = sequence(batch, index)
            bert = reference_model.bert(
                torch.from_numpy(one.input_ids).long()[None],
                token_type_ids=torch.from_numpy(one.token_type_ids).long()[None],
            )
            hidden.append(bert.last_hidden_state[0])
            pooled.append(bert.pooler_output[0])
            nsp.append(reference_model.cls.seq_relationship(bert.pooler_output)[0])
        states = torch.cat(hidden)
        logits = reference_model.cls.predictions(states[positions])
        log_probs = logits.log_softmax(-1)
        top = log_probs.topk(7)
    # Float32 sums in another order: 1e-4 on values of some tens.
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(outputs.hidden_states, states.numpy(), **close)
    np.testing.assert_allclose(outputs.pooled, torch.stack(pooled).numpy(), **close)
    np.testing.assert_allclose(outputs.nsp_logits, torch.stack(nsp).numpy(), **close)
    np.testing.assert_allclose(outputs.mlm_logits, logits.numpy(), **close)
    np.testing.assert_allclose(outputs.mlm_top_log_probs, top.values.numpy(), **close)
    candidates = np.array([[position, 5, 8191] for position in positions])
    np.testing.assert_allclose(
        outputs.mlm_candidate_log_probs,
        np.take_along_axis(log_probs.numpy(), candidates, axis=1),
        **close,
    )
    assert outputs.mlm_top_ids is not None
    assert outputs.mlm_top_ids.dtype == np.int64
    # The ids may differ where two log-probabilities are equal to within the tolerance; the values named do not.
    np.testing.assert_allclose(
        np.take_along_axis(log_probs.numpy(), outputs.mlm_top_ids, axis=1), top.values.numpy(), **close
    )


def test_only_what_is_wanted_comes_back(backend: Backend) -> None:
    batch = make_batch([4, 9])
    outputs = backend.run(batch, Wanted(pooled=True))
    assert outputs.pooled is not None
    for name in (
        "mlm_logits",
        "mlm_top_ids",
        "mlm_top_log_probs",
        "mlm_candidate_log_probs",
        "hidden_states",
        "nsp_logits",
    ):
        assert getattr(outputs, name) is None
    empty = backend.run(batch, Wanted(mlm_positions=np.zeros(0, np.int64), mlm_top_k=3))
    assert empty.mlm_top_ids is not None
    assert empty.mlm_top_ids.shape == (0, 3)
    assert backend.run(batch, Wanted()) == type(outputs)()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("dialect", ["ort", "onnx"])
def test_an_answer_does_not_depend_on_its_neighbours(
    precision: str, dialect: str, demo_engine: Callable[..., Path]
) -> None:
    backend = create_backend(None, EngineFolder.open(demo_engine(precision, dialect)), 2)
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
    backend = create_backend(None, EngineFolder.open(out), 2)
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


def test_layer_probe_sees_pytorchs_layers(
    demo_engine: Callable[..., Path], reference_model: transformers.BertForPreTraining
) -> None:
    probe = LayerProbe(EngineFolder.open(demo_engine("fp32")), threads=2)
    batch = make_batch([12, 12])
    with torch.inference_mode():
        expected = reference_model.bert(
            torch.from_numpy(batch.input_ids).long().view(2, 12),
            token_type_ids=torch.from_numpy(batch.token_type_ids).long().view(2, 12),
            output_hidden_states=True,
        ).hidden_states
    found = probe.run(batch)
    assert len(found) == len(expected) == 5
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy().reshape(24, -1), rtol=1e-4, atol=1e-4)
    probe.close()


def test_blocks_hold_every_sequence_once_and_little_padding() -> None:
    generator = np.random.default_rng(0)
    for lengths in (
        np.array([5]),
        np.array([1] * 300),
        np.array([512, 1]),
        generator.integers(1, 513, 200),
        np.arange(512, 0, -1),
    ):
        blocks = split_by_length(lengths.astype(np.int64))
        assert sorted(np.concatenate(blocks).tolist()) == list(range(len(lengths)))
        for block in blocks:
            padded = lengths[block].max() * len(block)
            assert padded <= max(256, 1.15 * lengths[block].sum())


def change(**fields: Any) -> Any:
    return fields


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (change(mlm_positions=np.array([13])), "mlm_positions must be from 0 to 12"),
        (change(mlm_positions=np.array([-1])), "mlm_positions must be from 0 to 12"),
        (change(mlm_positions=np.array([[1]])), r"int64 of shape \[n\]"),
        (change(mlm_positions=np.array([1.0])), r"int64 of shape \[n\]"),
        (change(mlm_positions=np.array([1]), mlm_top_k=-1), "mlm_top_k"),
        (change(mlm_positions=np.array([1]), mlm_top_k=8193), "mlm_top_k"),
        (change(mlm_positions=np.array([1]), mlm_candidates=np.array([[8192]])), "mlm_candidates"),
        (change(mlm_positions=np.array([1]), mlm_candidates=np.array([[1], [2]])), r"shape \[1, c\]"),
        (change(mlm_top_k=3), "need mlm_positions"),
        (change(mlm_logits=True), "need mlm_positions"),
    ],
)
def test_requests_out_of_range(backend: Backend, wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        backend.run(make_batch([13]), Wanted(**wanted))


@pytest.mark.parametrize(("field", "value"), [("input_ids", 8192), ("input_ids", -1), ("token_type_ids", 2)])
def test_ids_out_of_range(backend: Backend, field: str, value: int) -> None:
    batch = make_batch([13])
    getattr(batch, field)[4] = value
    with pytest.raises(InputError, match=field):
        backend.run(batch, Wanted(hidden_states=True))


def test_513_tokens(backend: Backend) -> None:
    with pytest.raises(SequenceTooLongError, match="513 tokens, the model has 512 positions"):
        backend.run(make_batch([4, 513]), Wanted(hidden_states=True))


@pytest.mark.parametrize(
    ("ids", "segments", "offsets"),
    [
        (np.zeros(3, np.int64), np.zeros(3, np.int32), [0, 3]),
        (np.zeros(3, np.int32), np.zeros(2, np.int32), [0, 3]),
        (np.zeros((3, 1), np.int32), np.zeros((3, 1), np.int32), [0, 3]),
        (np.zeros(3, np.int32), np.zeros(3, np.int32), [0]),
        (np.zeros(3, np.int32), np.zeros(3, np.int32), [0, 2]),
        (np.zeros(3, np.int32), np.zeros(3, np.int32), [1, 3]),
        (np.zeros(3, np.int32), np.zeros(3, np.int32), [0, 2, 2, 3]),
        (np.zeros(3, np.int32), np.zeros(3, np.int32), [0, 4, 3]),
        (np.zeros(0, np.int32), np.zeros(0, np.int32), [0, 0]),
    ],
)
def test_batches_that_are_none(ids: Any, segments: Any, offsets: list[int]) -> None:
    with pytest.raises(InputError, match="TokenBatch"):
        TokenBatch(ids, segments, np.array(offsets, np.int64))


def test_a_head_that_is_not_there(save_checkpoint: Any, small_bert: Any, tmp_path: Path) -> None:
    bert = small_bert().bert
    plain = transformers.BertModel(bert.config, add_pooling_layer=False)
    out = tmp_path / "engine"
    with open_checkpoint(save_checkpoint(plain)) as checkpoint:
        export_engine(checkpoint, out)
    backend = create_backend(None, EngineFolder.open(out), 1)
    batch = TokenBatch(np.ones(3, np.int32), np.zeros(3, np.int32), np.array([0, 3], np.int64))
    assert backend.run(batch, Wanted(hidden_states=True)).hidden_states is not None
    for wanted, name in (
        (Wanted(mlm_positions=np.array([1])), "masked-LM"),
        (Wanted(pooled=True), "pooler"),
        (Wanted(nsp=True), "next-sentence"),
    ):
        with pytest.raises(MissingHeadError, match=name):
            backend.run(batch, wanted)


def test_threads_default_to_the_processors_that_may_be_used(
    demo_engine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bertrt.backends.onnxruntime.usable_cpus", lambda: 3)
    assert create_backend(None, EngineFolder.open(demo_engine("int8"))).threads == 3


def test_close_during_a_run_lets_it_end(demo_engine: Callable[..., Path]) -> None:
    backend = create_backend(None, EngineFolder.open(demo_engine("fp32")), 2)
    batch = make_batch([300, 200])
    expected = backend.run(batch, Wanted(hidden_states=True)).hidden_states
    started, results = threading.Event(), []

    def run() -> None:
        started.set()
        with contextlib.suppress(EngineClosedError):
            while True:
                results.append(backend.run(batch, Wanted(hidden_states=True)).hidden_states)

    runner = threading.Thread(target=run)
    runner.start()
    started.wait()
    while not results:
        pass
    backend.close()
    runner.join(timeout=60)
    assert not runner.is_alive()
    for states in results:
        np.testing.assert_allclose(states, expected, rtol=0, atol=1e-4)


def test_int8_asks_for_products_that_do_not_saturate(demo_engine: Callable[..., Path]) -> None:
    manifest = EngineFolder.open(demo_engine("int8")).manifest
    entry = "session.x64quantprecision"
    assert session_options(manifest, 1).get_session_config_entry(entry) == "1"


def test_closed(demo_engine: Callable[..., Path]) -> None:
    backend = create_backend(None, EngineFolder.open(demo_engine("int8")), 1)
    assert backend.threads == 1
    assert isinstance(backend, Backend)
    backend.close()
    backend.close()
    with pytest.raises(EngineClosedError, match="load it again"):
        backend.run(make_batch([3]), Wanted(pooled=True))


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
        create_backend(None, EngineFolder.open(spoiled))


def test_a_truncated_graph_and_truncated_weights(spoiled: Path) -> None:
    graph = spoiled / "engine.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[: len(whole) // 2])
    resign(spoiled)
    with pytest.raises(BackendRunError, match="cannot load"):
        create_backend(None, EngineFolder.open(spoiled))
    graph.write_bytes(whole)
    weights = spoiled / "model.onnx_data"
    weights.write_bytes(weights.read_bytes()[:100_000])
    resign(spoiled)
    with pytest.raises(BackendRunError, match="cannot load"):
        create_backend(None, EngineFolder.open(spoiled))


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
    with pytest.raises(ShapeMismatchError, match=f"built for {name} {true}.*says {value}"):
        create_backend(None, EngineFolder.open(spoiled))


@pytest.mark.parametrize("head", ["mlm", "nsp", "pooler"])
def test_heads_that_are_not_the_graphs(
    head: str, spoiled: Path, small_bert: Any, save_checkpoint: Any, tmp_path: Path
) -> None:
    """Too few heads in the manifest of a graph that has all, too many in that of a graph that has none."""
    everything = {"mlm": True, "nsp": True, "pooler": True}
    if head != "nsp":  # next sentence has no input of its own, so a graph that has it too does no harm
        resign(spoiled, heads={**everything, head: False})
        with pytest.raises(ShapeMismatchError, match="the graph's inputs are"):
            create_backend(None, EngineFolder.open(spoiled))
    plain = transformers.BertModel(small_bert().config, add_pooling_layer=False)
    out = tmp_path / "plain"
    with open_checkpoint(save_checkpoint(plain)) as checkpoint:
        export_engine(checkpoint, out)
    resign(out, heads={**dict.fromkeys(everything, False), head: True})
    with pytest.raises(ShapeMismatchError, match="it is absent"):
        create_backend(None, EngineFolder.open(out))


def test_a_graph_from_elsewhere(spoiled: Path) -> None:
    shutil.copy(spoiled / "model.onnx", spoiled / "engine.onnx")
    resign(spoiled)
    with pytest.raises(ShapeMismatchError, match="'hidden_states' has width none"):
        create_backend(None, EngineFolder.open(spoiled))


@pytest.mark.parametrize("role", ["graph", "weights"])
def test_a_manifest_without_a_role(spoiled: Path, role: str) -> None:
    roles = {"graph": "engine.onnx", "weights": "model.onnx_data"}
    del roles[role]
    resign(spoiled, backends={"onnxruntime": roles})
    with pytest.raises(ManifestError, match=f"names no '{role}'"):
        create_backend(None, EngineFolder.open(spoiled))


def test_backends_that_cannot_run_say_why(spoiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = EngineFolder.open(spoiled)
    with pytest.raises(BackendUnavailableError, match="no backend 'nope'; there are onnxruntime"):
        create_backend("nope", folder)
    for threads in (0, -1, True, 1.5, "2", 10**9):
        with pytest.raises(InputError, match="threads must be a whole number"):
            create_backend(None, folder, threads)  # type: ignore[arg-type] # that is what is tested
    resign(spoiled, backends={"other": {"graph": "engine.onnx"}})
    with pytest.raises(BackendUnavailableError, match="has files for other only"):
        create_backend("onnxruntime", EngineFolder.open(spoiled))
    assert backend_status() == [
        BackendStatus(name="onnxruntime", available=True, version=backend_status()[0].version)
    ]
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    (status,) = backend_status()
    assert not status.available
    with pytest.raises(BackendUnavailableError, match=r"pip install \"bertrt\[ort\]\""):
        create_backend(None, folder)
