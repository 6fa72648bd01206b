"""The contract of `Backend`, on every backend that there is: PyTorch's answers, and nothing that cannot be answered."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fake_machine import make_batch

from bertrt.backends.base import Backend, TokenBatch, Wanted
from bertrt.backends.registry import create_backend
from bertrt.errors import EngineClosedError, InputError, MissingHeadError, SequenceTooLongError
from bertrt.folder import EngineFolder
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.drift.layers import make_probe
from bertrt_export.exporter import export_engine


@pytest.fixture(scope="module")
def backend(backend_name: str, demo_engine: Callable[..., Path]) -> Backend:
    return create_backend(backend_name, EngineFolder.open(demo_engine("fp32")), 2)


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


def test_a_probe_sees_pytorchs_layers(
    backend: Backend, demo_engine: Callable[..., Path], reference_model: transformers.BertForPreTraining
) -> None:
    probe = make_probe(EngineFolder.open(demo_engine("fp32")), backend)
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


def test_a_head_that_is_not_there(
    backend_name: str, save_checkpoint: Any, small_bert: Any, tmp_path: Path
) -> None:
    bert = small_bert().bert
    plain = transformers.BertModel(bert.config, add_pooling_layer=False)
    out = tmp_path / "engine"
    with open_checkpoint(save_checkpoint(plain)) as checkpoint:
        export_engine(checkpoint, out)
    backend = create_backend(backend_name, EngineFolder.open(out), 1)
    batch = TokenBatch(np.ones(3, np.int32), np.zeros(3, np.int32), np.array([0, 3], np.int64))
    assert backend.run(batch, Wanted(hidden_states=True)).hidden_states is not None
    for wanted, name in (
        (Wanted(mlm_positions=np.array([1])), "masked-LM"),
        (Wanted(pooled=True), "pooler"),
        (Wanted(nsp=True), "next-sentence"),
    ):
        with pytest.raises(MissingHeadError, match=name):
            backend.run(batch, wanted)


def test_close_during_a_run_lets_it_end(backend_name: str, demo_engine: Callable[..., Path]) -> None:
    backend = create_backend(backend_name, EngineFolder.open(demo_engine("fp32")), 2)
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


def test_closed(backend_name: str, demo_engine: Callable[..., Path]) -> None:
    backend = create_backend(backend_name, EngineFolder.open(demo_engine("int8")), 1)
    assert backend.threads == 1
    assert isinstance(backend, Backend)
    backend.close()
    backend.close()
    with pytest.raises(EngineClosedError, match="load it again"):
        backend.run(make_batch([3]), Wanted(pooled=True))
