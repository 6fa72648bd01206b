"""The backend on TensorRT plans: its answers, its graphs, its memory, its workers.

On a machine whose GPUs compute on the CPU (`fakes/`), and whose answers are compared with PyTorch's.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fake_machine as machine
import numpy as np
import pytest
import torch
import transformers

from bertrt.backends.base import BatchOutput, TokenBatch, Wanted
from bertrt.backends.registry import create_backend
from bertrt.backends.tensorrt import worker as tensorrt_worker
from bertrt.backends.tensorrt.backend import TensorRTBackend
from bertrt.errors import BackendUnavailableError, EngineClosedError, SequenceTooLongError
from bertrt.folder import EngineFolder

# Small, so that few sequences make several blocks; and as a user would have them.
PROFILES = ("1x1..1x64..1x128", "1x1..4x64..4x128")
LONG_PROFILES = ("1x1..1x64..1x512", "1x1..8x128..16x512")


CLOSE, FIELDS = machine.CLOSE, machine.FIELDS
make_batch, check_same = machine.make_batch, machine.check_same


@pytest.fixture(scope="module")
def folders(fake_plans: Callable[..., EngineFolder]) -> Callable[..., EngineFolder]:
    """A function that gives the demo engine with plans of a library; do not change it."""
    # 16 rows of the masked-LM head at a time, so that more positions take several runs.
    return partial(fake_plans, profiles=PROFILES, most_mlm_rows=16)


@pytest.fixture
def folder(folders: Callable[..., EngineFolder]) -> EngineFolder:
    return folders()


def everything(batch: TokenBatch, positions: list[int], *, top_k: int = 7, candidates: int = 3) -> Wanted:
    generator = np.random.default_rng(len(positions))
    return Wanted(
        mlm_positions=np.array(positions, np.int64),
        mlm_logits=True,
        mlm_top_k=top_k,
        mlm_candidates=generator.integers(0, 8192, (len(positions), candidates)),
        hidden_states=True,
        pooled=True,
        nsp=True,
    )


@torch.inference_mode()
def pytorch(model: transformers.BertForPreTraining, batch: TokenBatch, wanted: Wanted) -> dict[str, Any]:
    """What PyTorch answers, one sequence at a time."""
    hidden, pooled = [], []
    for start, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
        bert = model.bert(
            torch.from_numpy(batch.input_ids[start:end]).long()[None],
            token_type_ids=torch.from_numpy(batch.token_type_ids[start:end]).long()[None],
        )
        hidden.append(bert.last_hidden_state[0])
        pooled.append(bert.pooler_output[0])
    states, firsts = torch.cat(hidden), torch.stack(pooled)
    expected = {
        "hidden_states": states,
        "pooled": firsts,
        "nsp_logits": model.cls.seq_relationship(firsts),
    }
    if wanted.mlm_positions is not None:
        logits = model.cls.predictions(states[torch.from_numpy(wanted.mlm_positions)])
        log_probs = logits.log_softmax(-1)
        expected |= {"mlm_logits": logits, "log_probs": log_probs}
        expected["mlm_top_log_probs"] = log_probs.topk(wanted.mlm_top_k).values
        if wanted.mlm_candidates is not None:
            expected["mlm_candidate_log_probs"] = log_probs.gather(1, torch.from_numpy(wanted.mlm_candidates))
    return {name: value.numpy() for name, value in expected.items()}


def check(found: BatchOutput, expected: dict[str, Any]) -> None:
    log_probs = expected.get("log_probs")
    for name in FIELDS:
        values = getattr(found, name)
        if name == "mlm_top_ids" and values is not None:
            # Ids may differ where two log-probabilities are equal to within the tolerance; the values named do not.
            named = np.take_along_axis(log_probs, values, axis=1)
            np.testing.assert_allclose(named, expected["mlm_top_log_probs"], **CLOSE)
            assert values.dtype == np.int64
        elif values is not None:
            assert values.dtype == np.float32
            np.testing.assert_allclose(values, expected[name], **CLOSE)


@pytest.fixture(scope="module")
def reference(gpu_engine: Callable[[str], Path]) -> Callable[[TokenBatch, Wanted], BatchOutput]:
    """The same engine on ONNX Runtime, whose answers are compared with PyTorch's elsewhere; it is quicker."""
    return create_backend("onnxruntime", EngineFolder.open(gpu_engine("fp32")), 1, provider="cpu").run


# Answers.


@pytest.mark.parametrize(
    ("library", "top_k", "candidates"),
    [
        ("tensorrt", 7, 3),
        ("tensorrt", 64, 16),
        ("tensorrt", 65, 3),
        ("tensorrt", 7, 17),
        ("tensorrt", 8192, 40),
        ("tensorrt_rtx", 7, 3),
        ("tensorrt_rtx", 65, 17),
    ],
)
def test_every_output_is_pytorchs(
    gpu: Any,
    folders: Callable[..., EngineFolder],
    reference_model: transformers.BertForPreTraining,
    library: str,
    top_k: int,
    candidates: int,
) -> None:
    batch = make_batch([3, 40, 1, 512, 17, 41, 2, 64, 65, 128, 129])
    # In any order, more than the head takes at a time, some sequences with none, some positions twice.
    positions = np.random.default_rng(1).permutation(batch.num_tokens)[:35].tolist()
    wanted = everything(batch, positions + positions[:2], top_k=top_k, candidates=candidates)
    expected = pytorch(reference_model, batch, wanted)
    backend = TensorRTBackend(folders(library, profiles=LONG_PROFILES))
    # The first run of a shape, its first by a context of its own, its capture, its graph.
    for _ in range(4):
        found = backend.run(batch, wanted)
        assert all(getattr(found, name) is not None for name in FIELDS)
        check(found, expected)
    assert ("cudaGraphLaunch" in gpu.calls) == (library == "tensorrt")
    backend.close()


def test_graphs_read_what_is_asked_now(gpu: Any, folder: EngineFolder, reference: Any) -> None:
    """The same shape with other tokens, positions and candidates: a buffer that was not filled again would show."""
    backend = TensorRTBackend(folder)
    launches = []
    for seed in range(8):
        generator = np.random.default_rng(seed)
        # Of one bucket each: 4x64 tokens, 8 rows of the masked-LM head.
        batch = make_batch(generator.integers(49, 65, 4).tolist(), seed)
        count = int(generator.integers(5, 9))
        wanted = everything(batch, generator.integers(0, batch.num_tokens, count).tolist())
        gpu.calls.clear()
        check_same(backend.run(batch, wanted), reference(batch, wanted))
        launches.append(gpu.calls.count("cudaGraphLaunch"))
    # Encoder, pooler, masked LM: from the third run on as graphs.
    assert launches[2:] == [3] * 6
    backend.close()


def test_only_what_is_wanted_is_run_and_comes_back(gpu: Any, folder: EngineFolder) -> None:
    backend = TensorRTBackend(folder)
    batch = make_batch([4, 9])
    gpu.calls.clear()
    found = backend.run(batch, Wanted(pooled=True))
    assert found.pooled is not None
    assert sum(getattr(found, name) is None for name in FIELDS) == len(FIELDS) - 1
    # Two parts, and a copy to the device for each, and one back.
    assert gpu.calls.count("library:enqueue") + gpu.calls.count("cudaGraphLaunch") == 2
    assert gpu.calls.count("cudaMemcpyAsync") == 3
    empty = backend.run(batch, Wanted(mlm_positions=np.zeros(0, np.int64), mlm_top_k=3))
    assert empty.mlm_top_ids is not None
    assert empty.mlm_top_ids.shape == (0, 3)
    gpu.calls.clear()
    assert backend.run(batch, Wanted()) == BatchOutput()
    assert gpu.calls == []
    backend.close()


def test_a_run_without_results_is_waited_for(gpu: Any, folder: EngineFolder, reference: Any) -> None:
    """No position lies in the first block, so nothing is copied back from it; the next one may not overtake it."""
    backend = TensorRTBackend(folder)
    batch = make_batch([128] * 8 + [20])
    wanted = Wanted(mlm_positions=np.array([8 * 128 + 7], np.int64), mlm_top_k=3)
    for _ in range(3):
        check_same(backend.run(batch, wanted), reference(batch, wanted))
    backend.close()


def test_an_answer_is_the_callers_own(gpu: Any, folder: EngineFolder) -> None:
    backend = TensorRTBackend(folder)
    wanted = Wanted(hidden_states=True, pooled=True)
    first = backend.run(make_batch([20]), wanted)
    assert first.hidden_states is not None
    kept = first.hidden_states.copy()
    for seed in range(1, 5):
        backend.run(make_batch([20], seed), wanted)
    np.testing.assert_array_equal(first.hidden_states, kept)
    backend.close()
    np.testing.assert_array_equal(first.hidden_states, kept)


def test_the_same_shape_gives_the_same_bits_whatever_lies_beside(gpu: Any, folder: EngineFolder) -> None:
    backend = TensorRTBackend(folder)
    ours = make_batch([60], seed=9)
    wanted = Wanted(hidden_states=True, pooled=True)
    answers = []
    for seed in range(5):
        others = make_batch([60, 64, 50], seed)
        batch = TokenBatch(
            np.concatenate([others.input_ids, ours.input_ids]),
            np.concatenate([others.token_type_ids, ours.token_type_ids]),
            np.append(others.offsets, others.num_tokens + 60),
        )
        found = backend.run(batch, wanted)
        assert found.hidden_states is not None
        assert found.pooled is not None
        answers.append(np.concatenate([found.hidden_states[-60:], found.pooled[-1:]]))
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer, answers[0])
    backend.close()


def test_results_larger_than_a_piece_of_pinned_memory(
    gpu: Any,
    folder: EngineFolder,
    reference: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensorrt_worker, "_PIECE", 5000)
    backend = TensorRTBackend(folder)
    batch = make_batch([100, 90])
    wanted = everything(batch, [3, 100, 150])
    check_same(backend.run(batch, wanted), reference(batch, wanted))
    backend.close()


def test_a_sequence_that_no_profile_holds(folders: Callable[..., EngineFolder], gpu: Any) -> None:
    folder = folders(profiles=("1x1..4x64..4x96",))
    backend = TensorRTBackend(folder)
    with pytest.raises(
        SequenceTooLongError, match="97 tokens, the plan's profiles hold at most 96"
    ) as caught:
        backend.run(make_batch([3, 97]), Wanted(pooled=True))
    assert f"bertrt build {folder.path} --profile 1x1..4x64..4x96 --profile 1x1..1x97..1x97" in str(
        caught.value
    )
    assert backend.run(make_batch([3, 96]), Wanted(pooled=True)).pooled is not None
    backend.close()


def test_profiles_that_are_no_grid(folders: Callable[..., EngineFolder], gpu: Any, reference: Any) -> None:
    """Many short sequences, or few long ones: blocks that no profile holds are cut."""
    backend = TensorRTBackend(folders(profiles=("1x1..8x32..16x32", "1x1..1x128..2x300")))
    batch = make_batch([300, 290, 280, 270, 40, 30, 30, 20, 10, 5] * 2)
    wanted = everything(batch, list(range(0, batch.num_tokens, 97)))
    check_same(backend.run(batch, wanted), reference(batch, wanted))
    backend.close()


# Workers.


def test_two_gpus_share_a_batch(gpu: Any, folder: EngineFolder, reference: Any) -> None:
    backend = TensorRTBackend(folder, devices=[1, 0])
    assert backend.devices == (1, 0)
    assert backend.device_names == ("Imaginary GPU 1", "Imaginary GPU 0")
    assert backend.threads == 2
    used: set[int] = set()
    gpu.hooks["cudaEventSynchronize"] = lambda: used.add(gpu.current)
    batch = make_batch([128] * 20)
    wanted = everything(batch, [5, 1000, 2500])
    check_same(backend.run(batch, wanted), reference(batch, wanted))
    assert used == {0, 1}
    backend.close()
    assert not gpu.live()


def test_only_the_gpu_that_was_asked_for_is_touched(gpu: Any, folder: EngineFolder) -> None:
    backend = create_backend("tensorrt", folder, devices=[1])
    backend.run(make_batch([20]), Wanted(pooled=True))
    # No context on another, and the caller's thread has none that it did not have before.
    assert gpu.contexts == {1}
    assert gpu.current is None
    gpu.choose(0)
    backend.run(make_batch([20]), Wanted(pooled=True))
    assert gpu.current == 0
    backend.close()
    assert gpu.current == 0
    assert backend.threads == 1
    assert backend.pads


@pytest.mark.parametrize("devices", [[0], [0, 1]])
def test_many_threads_at_once(gpu: Any, folder: EngineFolder, devices: list[int]) -> None:
    backend = TensorRTBackend(folder, devices=devices)
    batches = [make_batch([length, length // 2 + 1], length) for length in range(10, 130, 20)]
    wanted = [everything(batch, [1, batch.num_tokens - 1]) for batch in batches]
    # As one thread answers them: the same kernels on the same shapes.
    alone = [backend.run(batch, want) for batch, want in zip(batches, wanted, strict=True)]
    start = threading.Barrier(8)

    def work(thread: int) -> None:
        start.wait()
        for turn in range(2 * len(batches)):
            index = (thread + turn) % len(batches)
            found = backend.run(batches[index], wanted[index])
            for name in FIELDS:
                np.testing.assert_array_equal(getattr(found, name), getattr(alone[index], name))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    backend.close()
    assert not gpu.live()


def test_captures_by_other_code_do_not_disturb(gpu: Any, folder: EngineFolder, reference: Any) -> None:
    """While ONNX Runtime, in the same process, captures graphs of its own."""
    gpu.foreign_capture = True
    backend = TensorRTBackend(folder)
    batch = make_batch([100, 20])
    wanted = everything(batch, [3, 70])
    for _ in range(4):
        check_same(backend.run(batch, wanted), reference(batch, wanted))
    backend.close()
    assert not gpu.foreign_spoilt
    assert not gpu.live()


def test_a_process_that_was_forked_is_refused(gpu: Any, folder: EngineFolder, reference: Any) -> None:
    engines: list[TensorRTBackend] = [TensorRTBackend(folder), TensorRTBackend(folder)]
    batch, wanted = make_batch([20]), Wanted(hidden_states=True, pooled=True)
    engines[0].run(batch, wanted)
    ready = gpu.live()

    def child() -> None:
        match = r"was forked from process \d+, which had used CUDA before; .* load engines for GPUs after the fork"
        for _ in range(2):
            with pytest.raises(BackendUnavailableError, match=match):
                engines[0].run(batch, wanted)
        with pytest.raises(BackendUnavailableError, match=match):
            TensorRTBackend(folder)
        # Nothing of the parent's goes, whether it is closed or forgotten.
        engines[0].close()
        engines.clear()
        gc.collect()
        assert gpu.live() == ready
        assert not gpu.violations

    machine.forked(child)
    check_same(engines[0].run(batch, wanted), reference(batch, wanted))
    for engine in engines:
        engine.close()
    assert not gpu.live()


def test_close_during_a_run_lets_it_end(gpu: Any, folder: EngineFolder, reference: Any) -> None:
    """In the middle of the first of several blocks."""
    backend = TensorRTBackend(folder)
    batch = make_batch([128] * 9 + [10])
    wanted = Wanted(hidden_states=True, pooled=True)
    closed = []

    def close() -> None:
        if not closed:
            closed.append(gpu.live())
            backend.close()
            with pytest.raises(EngineClosedError, match="load it again"):
                backend.run(batch, wanted)

    gpu.hooks["cudaEventSynchronize"] = close
    check_same(backend.run(batch, wanted), reference(batch, wanted))
    assert closed[0]
    assert not gpu.live()
    with pytest.raises(EngineClosedError, match="the engine is closed; load it again"):
        backend.run(batch, wanted)
    backend.close()
