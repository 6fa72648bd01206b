"""Parts on devices: the very executor that runs on GPUs, with the CPU as its device, against PyTorch.

Where the two differ, it is in what is handed to ONNX Runtime: the providers and the name of the device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from fake_machine import make_batch
from fake_sessions import (
    LENGTHS,
    NAMES,
    STATES,
    Workers,
    check,
    everything,
    feeds,
    make_backend,
    pytorch,
    sequence,
)

from bertrt.backends import cuda
from bertrt.backends.base import Wanted
from bertrt.backends.onnxruntime.backend import OnnxRuntimeBackend
from bertrt.backends.onnxruntime.providers import provider_problem
from bertrt.errors import (
    BackendRunError,
)
from bertrt.folder import EngineFolder


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "fp8"])
def test_every_output_is_pytorchs(
    precision: str,
    workers: int,
    exported: Callable[[str], EngineFolder],
    reference_model: transformers.BertForPreTraining,
) -> None:
    backend, _ = make_backend(exported(precision), workers)
    batch = make_batch(LENGTHS)
    generator = np.random.default_rng(1)
    # In any order, some sequences with none, some positions twice, more than the head runs on at once.
    positions = generator.permutation(batch.num_tokens)[:300].tolist()
    positions += positions[:2]
    expected = pytorch(reference_model, batch, positions)
    check(backend.run(batch, everything(positions)), expected, precision)


def test_the_cpus_executor_answers_the_same(exported: Callable[[str], EngineFolder]) -> None:
    """No padding but to the longest there, plain runs: `bertrt.backends.onnxruntime.parts.SessionParts`."""
    folder = exported("fp32")
    backend, _ = make_backend(folder)
    batch, positions = make_batch(LENGTHS, seed=5), list(range(0, 90, 7))
    plain = OnnxRuntimeBackend(folder, threads=1).run(batch, everything(positions))
    found = backend.run(batch, everything(positions))
    for name in NAMES:
        # float32 sums in another order, as above.
        np.testing.assert_allclose(
            getattr(found, name), getattr(plain, name), rtol=1e-4, atol=1e-4, err_msg=name
        )
    assert found.mlm_top_ids is not None
    assert found.mlm_top_ids.shape == (13, 7)


def test_an_answer_does_not_depend_on_its_neighbours(exported: Callable[[str], EngineFolder]) -> None:
    backend, _ = make_backend(exported("fp32"))
    batch, wanted = make_batch(LENGTHS, seed=3), Wanted(hidden_states=True, pooled=True)
    together = backend.run(batch, wanted)
    assert together.hidden_states is not None
    assert together.pooled is not None
    for index in range(batch.num_sequences):
        alone = backend.run(sequence(batch, index), wanted)
        start, end = batch.offsets[index : index + 2]
        # float32 sums may be taken in another order for another number of rows.
        np.testing.assert_allclose(together.hidden_states[start:end], alone.hidden_states, rtol=0, atol=1e-4)
        np.testing.assert_allclose(together.pooled[index], alone.pooled[0], rtol=0, atol=1e-4)


def test_inputs_of_an_earlier_run_are_gone(
    exported: Callable[[str], EngineFolder], reference_model: transformers.BertForPreTraining
) -> None:
    """Every shape keeps its memory: what a run left there must not show in the next."""
    backend, workers = make_backend(exported("fp32"))
    first, second = make_batch([30, 9, 31], seed=1), make_batch([31, 32, 4], seed=2)
    wanted = everything([0, 33, 50])
    before = len(workers.sessions[0]["encoder"].runs)
    found = [backend.run(batch, wanted) for batch in (first, second, first)]
    # One shape for all: 3 sequences of 32 tokens.
    assert len(workers.sessions[0]["encoder"].runs) == before + 3
    check(found[0], pytorch(reference_model, first, [0, 33, 50]))
    check(found[1], pytorch(reference_model, second, [0, 33, 50]))
    for name in NAMES:
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[2], name))


def test_results_are_nobody_elses_memory(exported: Callable[[str], EngineFolder]) -> None:
    executor = Workers(exported("fp32")).executor
    rows, candidates = np.array([3, 16]), np.zeros((2, 16), np.int64)

    def answers(ids: int) -> dict[str, Any]:
        with executor.encode(feeds(ids)) as encoded:
            return {
                "hidden_states": encoded.hidden_states(),
                **encoded.mlm(rows, candidates, ["mlm_logits", "mlm_top_ids"]),
                **encoded.pooler(rows, ["pooled"]),
            }

    first = answers(7)
    assert {name: values.shape for name, values in first.items()} == {
        "hidden_states": (2, 16, 256),
        "mlm_logits": (2, 8192),
        "mlm_top_ids": (2, 64),
        "pooled": (2, 256),
    }
    kept = {name: values.copy() for name, values in first.items()}
    second = answers(8)
    for name, values in kept.items():
        np.testing.assert_array_equal(first[name], values)
        assert not np.array_equal(second[name], values)
        assert first[name].flags.writeable


def test_what_is_not_asked_for_is_not_run(exported: Callable[[str], EngineFolder]) -> None:
    backend, workers = make_backend(exported("fp32"))
    sessions = workers.sessions[0]

    def counts() -> dict[str, int]:
        return {part: len(session.runs) for part, session in sessions.items()}

    before = counts()
    backend.run(make_batch([5, 9]), Wanted(pooled=True))
    assert counts() == {
        "encoder": before["encoder"] + 1,
        "mlm": before["mlm"],
        "pooler": before["pooler"] + 1,
    }
    backend.run(make_batch([5, 9]), Wanted(mlm_positions=np.array([1]), mlm_top_k=1))
    assert counts() == {
        "encoder": before["encoder"] + 2,
        "mlm": before["mlm"] + 1,
        "pooler": before["pooler"] + 1,
    }


def test_a_block_larger_than_the_memory_is_refused(exported: Callable[[str], EngineFolder]) -> None:
    """Outputs are bound by their address, so that nothing beneath would notice."""
    executor = Workers(exported("fp32")).executor
    for _ in range(2):
        with (
            pytest.raises(BackendRunError, match="16416 rows, there is room for 16384"),
            executor.encode(feeds(7, (1026, 16))),
        ):
            pass
    with executor.encode(feeds(7)) as encoded:
        many = np.zeros(257, np.int64)
        with pytest.raises(BackendRunError, match="room for 256"):
            encoded._worker.head("mlm", {"mlm_positions": many, "mlm_candidates": many[:, None]}, 257, [])


def test_two_workers_share_a_batch(exported: Callable[[str], EngineFolder]) -> None:
    backend, workers = make_backend(exported("fp32"), 2)
    assert workers.executor.limits.workers == 2
    before = [len(sessions["encoder"].runs) for sessions in workers.sessions]
    backend.run(make_batch([512] * 6), STATES)
    after = [len(sessions["encoder"].runs) for sessions in workers.sessions]
    assert all(late > early for early, late in zip(before, after, strict=True))
    # One after the other, each takes its turn.
    for _ in range(2):
        backend.run(make_batch([12]), STATES)
    assert [len(sessions["encoder"].runs) for sessions in workers.sessions] == [count + 1 for count in after]


def test_workers_run_side_by_side(exported: Callable[[str], EngineFolder]) -> None:
    backend, workers = make_backend(exported("fp32"), 2)
    # Neither goes on before the other is in its run too.
    both = threading.Barrier(2, timeout=60)
    for sessions in workers.sessions:
        sessions["encoder"].before = both.wait  # type: ignore[assignment]
    backend.run(make_batch([512] * 6), STATES)


def test_many_threads(
    exported: Callable[[str], EngineFolder], reference_model: transformers.BertForPreTraining
) -> None:
    """Each gets its own answer, and every session is run by one thread: CUDA graphs are kept for each."""
    backend, workers = make_backend(exported("fp32"), 2)
    batches = [make_batch([20 + index, 3, 14], seed=index) for index in range(8)]
    positions = [0, 1, 22]
    expected = [pytorch(reference_model, batch, positions) for batch in batches]
    failures: list[BaseException] = []
    together = threading.Barrier(len(batches))

    def ask(index: int) -> None:
        try:
            together.wait()
            for _ in range(5):
                check(backend.run(batches[index], everything(positions)), expected[index])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    ran = [set().union(*(session.threads for session in sessions.values())) for sessions in workers.sessions]
    assert [len(found) for found in ran] == [1, 1]
    assert ran[0] != ran[1]
    assert threading.current_thread() not in ran[0] | ran[1]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_on_a_gpu(
    provider: str,
    precision: str,
    exported: Callable[[str], EngineFolder],
    reference_model: transformers.BertForPreTraining,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Shapes in turn and again, so that graphs are captured, and replayed with other inputs."""
    if problem := provider_problem(provider):
        pytest.skip(f"needs ONNX Runtime's provider {provider}: {problem}")
    capability = cuda.device_properties(0).compute_capability
    if (provider, precision) == ("tensorrt", "fp8") and tuple(map(int, capability.split("."))) < (8, 9):
        pytest.skip(f"TensorRT computes in fp8 from compute capability 8.9 on, this GPU has {capability}")
    monkeypatch.setenv("BERTRT_CACHE", str(tmp_path))
    backend = OnnxRuntimeBackend(exported(precision), provider=provider)
    # TensorRT may compute float32 products in TF32, which has float16's 11 bits.
    accuracy = "fp16" if (provider, precision) == ("tensorrt", "fp32") else precision
    for seed in range(3):
        for lengths in ([12], [300], LENGTHS, [512] * 8):
            batch = make_batch(lengths, seed=seed)
            positions = list(range(0, batch.num_tokens, 9))
            expected = pytorch(reference_model, batch, positions)
            check(backend.run(batch, everything(positions)), expected, accuracy)
    backend.close()
