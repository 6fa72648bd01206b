"""The backend on TensorRT plans, on a real GPU: a plan is built for it, and PyTorch is asked the same."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fake_machine import make_batch

from bertrt.backends import cuda
from bertrt.backends.base import BatchOutput, TokenBatch, Wanted
from bertrt.backends.cuda.objects import DeviceBuffer
from bertrt.backends.tensorrt.backend import TensorRTBackend
from bertrt.backends.tensorrt.library import find_library, library_problem
from bertrt.errors import (
    BackendRunError,
    DeviceMemoryError,
    EngineClosedError,
    InputError,
    SequenceTooLongError,
)
from bertrt.folder import EngineFolder
from bertrt.plans import Profile
from bertrt_export.plans import build_plans
from bertrt_export.plans.capabilities import choose_capabilities

pytestmark = pytest.mark.gpu

PROFILES = ("1x1..1x64..1x128", "1x1..4x64..8x128")
# float16 has 11 bits. Some tens of roundings of 2^-11 each, on hidden states of size 1 and logits of some tens; a wrong
# row, a stale buffer or a missing mask is off by whole units.
CLOSE = {"hidden_states": 0.05, "pooled": 0.05, "nsp_logits": 0.1, "mlm_logits": 0.3}


@pytest.fixture(scope="module")
def folder(gpu_engine: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> EngineFolder:
    if reason := library_problem():
        pytest.skip(reason)
    capability = cuda.device_properties(0).compute_capability
    try:
        choose_capabilities(find_library(), [capability], "fp16")
    except InputError as error:  # TensorRT for RTX knows GPUs of GeForce and RTX only
        pytest.skip(str(error))
    copy = EngineFolder.open(shutil.copytree(gpu_engine("fp16"), tmp_path_factory.mktemp("plan") / "engine"))
    build_plans(copy, profiles=[Profile.parse(text) for text in PROFILES], compute_capabilities=[capability])
    return EngineFolder.open(copy.path)


@pytest.fixture(scope="module")
def backend(folder: EngineFolder) -> Iterator[TensorRTBackend]:
    made = TensorRTBackend(folder)
    yield made
    made.close()


def everything(batch: TokenBatch, *, top_k: int = 7, candidates: int = 3) -> Wanted:
    generator = np.random.default_rng(batch.num_tokens)
    positions = generator.permutation(batch.num_tokens)[:20].astype(np.int64)
    return Wanted(
        mlm_positions=positions,
        mlm_logits=True,
        mlm_top_k=top_k,
        mlm_candidates=generator.integers(0, 8192, (len(positions), candidates)),
        hidden_states=True,
        pooled=True,
        nsp=True,
    )


@torch.inference_mode()
def check(
    model: transformers.BertForPreTraining, batch: TokenBatch, wanted: Wanted, found: BatchOutput
) -> None:
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
        "mlm_logits": model.cls.predictions(states[torch.from_numpy(wanted.mlm_positions)]),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(found, name), values.numpy(), rtol=0, atol=CLOSE[name])
    # What was computed from the logits agrees with them, whatever their own error: float32 sums over the vocabulary.
    assert found.mlm_logits is not None
    assert found.mlm_top_ids is not None
    assert wanted.mlm_candidates is not None
    logits = torch.from_numpy(found.mlm_logits)
    log_probs = logits.log_softmax(-1)
    best = log_probs.topk(wanted.mlm_top_k).values.numpy()
    close = {"rtol": 1e-4, "atol": 1e-3}
    np.testing.assert_allclose(found.mlm_top_log_probs, best, **close)
    named = np.take_along_axis(log_probs.numpy(), found.mlm_top_ids, axis=1)
    np.testing.assert_allclose(named, best, **close)
    chosen = np.take_along_axis(log_probs.numpy(), wanted.mlm_candidates, axis=1)
    np.testing.assert_allclose(found.mlm_candidate_log_probs, chosen, **close)


@pytest.mark.parametrize(("top_k", "candidates"), [(7, 3), (64, 16), (100, 20)])
def test_every_output_is_pytorchs(
    backend: TensorRTBackend, reference_model: Any, top_k: int, candidates: int
) -> None:
    batch = make_batch([3, 40, 1, 128, 17, 41, 2, 64, 65])
    wanted = everything(batch, top_k=top_k, candidates=candidates)
    # A shape's first run, its first by its own context, its capture, its graph.
    for _ in range(5):
        check(reference_model, batch, wanted, backend.run(batch, wanted))


def test_graphs_read_what_is_asked_now(backend: TensorRTBackend, reference_model: Any) -> None:
    for seed in range(8):
        batch = make_batch([60, 55, 64, 50], seed)
        wanted = everything(batch)
        check(reference_model, batch, wanted, backend.run(batch, wanted))


def test_the_same_shape_gives_the_same_answer_whatever_lies_beside(backend: TensorRTBackend) -> None:
    ours, wanted = make_batch([60], seed=9), Wanted(hidden_states=True, pooled=True)
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
        # A library may take better kernels after a while, whose sums are in another order.
        np.testing.assert_allclose(answer, answers[0], rtol=0, atol=CLOSE["hidden_states"])


def test_many_threads_at_once(backend: TensorRTBackend) -> None:
    batches = [make_batch([length, length // 2 + 1], length) for length in range(10, 128, 9)]
    wanted = [everything(batch) for batch in batches]
    alone = [backend.run(batch, want) for batch, want in zip(batches, wanted, strict=True)]
    start = threading.Barrier(8)

    def work(thread: int) -> None:
        start.wait()
        for turn in range(3 * len(batches)):
            index = (thread + turn) % len(batches)
            found = backend.run(batches[index], wanted[index])
            for name, tolerance in CLOSE.items():
                np.testing.assert_allclose(
                    getattr(found, name), getattr(alone[index], name), rtol=0, atol=tolerance
                )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_a_capture_by_other_code_is_not_disturbed(backend: TensorRTBackend) -> None:
    """In CUDA's global mode, as ONNX Runtime captures; and neither is a run, the first of its shape too."""
    runtime = cuda.load_module(cuda.RUNTIME)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            for _ in range(4):
                backend.run(make_batch([97, 33]), Wanted(pooled=True, hidden_states=True))
        except BaseException as error:
            errors.append(error)

    with cuda.on_device(0):
        _, stream = runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal
        assert runtime.cudaStreamBeginCapture(stream, mode)[0] == 0
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        status, graph = runtime.cudaStreamEndCapture(stream)
        assert status == 0
        runtime.cudaGraphDestroy(graph)
        runtime.cudaStreamDestroy(stream)
    assert errors == []


def test_memory_does_not_grow(folder: EngineFolder) -> None:
    backend = TensorRTBackend(folder)
    shapes = [[length] * count for count in (1, 2, 3, 4, 8) for length in range(16, 129, 16)]
    wanted = Wanted(pooled=True, hidden_states=True)

    def free() -> int:
        with cuda.on_device(0):
            return cuda.memory_info()[0]

    for turn in range(6):
        for lengths in shapes:
            backend.run(make_batch(lengths, turn), wanted)
        if turn == 3:  # all have their graphs, or have pushed out others
            settled = free()
    # Graphs that make room for others may leave gaps; what leaks would be some of each run's.
    assert settled - free() < 64 << 20
    backend.close()


def test_close_gives_memory_back(folder: EngineFolder) -> None:
    def free() -> int:
        with cuda.on_device(0):
            return cuda.memory_info()[0]

    TensorRTBackend(folder).close()  # what the library and CUDA keep for themselves
    before = free()
    for _ in range(3):
        backend = TensorRTBackend(folder)
        backend.run(make_batch([20]), Wanted(pooled=True))
        backend.close()
        with pytest.raises(EngineClosedError):
            backend.run(make_batch([20]), Wanted(pooled=True))
    assert before - free() < 64 << 20


def test_too_little_memory_is_an_error_that_leaves_nothing_behind(folder: EngineFolder) -> None:
    with cuda.on_device(0):
        free, _ = cuda.memory_info()
        # All but a little: the logits of the most rows alone are 32 MB.
        hog = DeviceBuffer(free - (8 << 20))
    try:
        with pytest.raises(BackendRunError):
            TensorRTBackend(folder)
        with cuda.on_device(0), pytest.raises(DeviceMemoryError, match=r"^GPU 0: .* are free"):
            DeviceBuffer(64 << 20)
    finally:
        with cuda.on_device(0):
            hog.close()
    # What failed has left the GPU usable.
    backend = TensorRTBackend(folder)
    assert backend.run(make_batch([20]), Wanted(pooled=True)).pooled is not None
    backend.close()


def test_questions_that_the_plan_or_the_machine_cannot_answer(
    backend: TensorRTBackend, folder: EngineFolder
) -> None:
    with pytest.raises(SequenceTooLongError, match="129 tokens, the plan's profiles hold at most 128"):
        backend.run(make_batch([129]), Wanted(pooled=True))
    with pytest.raises(InputError, match="there is no GPU"):
        TensorRTBackend(folder, devices=[cuda.device_count()])
    assert backend.device_names == (cuda.device_properties(0).name,)
