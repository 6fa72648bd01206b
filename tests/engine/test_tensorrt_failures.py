"""What can go wrong while TensorRT plans are loaded and run: too little memory, calls that fail, GPUs that are lost.

On a machine whose GPUs compute on the CPU (`fakes/`), where every call can be made to fail.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_machine as machine
import numpy as np
import pytest

from bertrt.backends.base import Wanted
from bertrt.backends.registry import create_backend
from bertrt.backends.tensorrt.backend import TensorRTBackend
from bertrt.errors import (
    BackendRunError,
    BackendUnavailableError,
    DeviceError,
    DeviceLostError,
    DeviceMemoryError,
    EngineClosedError,
)
from bertrt.folder import EngineFolder

PROFILES = ("1x1..1x32..1x64", "1x1..2x32..4x64")


make_batch = machine.make_batch
E = machine.fake_cuda.cudaError_t


@pytest.fixture(scope="module")
def folder(fake_plans: Callable[..., EngineFolder]) -> EngineFolder:
    """Do not change it."""
    return fake_plans(profiles=PROFILES, most_mlm_rows=8)


BATCH = make_batch([20, 30, 25])
WANTED = Wanted(
    hidden_states=True, pooled=True, nsp=True, mlm_positions=np.array([3, 40]), mlm_logits=True, mlm_top_k=5
)


WANTED_OF_ONE = Wanted(hidden_states=True)


@pytest.fixture(scope="module")
def expected(folder: EngineFolder) -> Any:
    """What ONNX Runtime answers."""
    return create_backend("onnxruntime", folder, 1, provider="cpu").run(BATCH, WANTED)


def check(found: Any, expected: Any) -> None:
    for name in ("hidden_states", "pooled", "nsp_logits", "mlm_logits", "mlm_top_log_probs"):
        # Float32 sums in another order, on values of some tens.
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)


# What may fail while a graph is captured: then the engine does without.
CAPTURE = {"cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"}
NO_GRAPH = "cannot be captured as a CUDA graph, and runs without, which is slower"
# What gives something back, whose failure is not ours to tell; what is asked about a failure;
# and what a thread exchanges when it comes to a device and goes (`test_cuda_process.py`).
QUIET = (
    "cudaFree",
    "cudaFreeHost",
    "cudaGetLastError",
    "cudaGetErrorString",
    "cudaMemGetInfo",
    "cuCtx",
    "cuThread",
)


def telling(calls: list[str]) -> list[str]:
    return sorted({call for call in calls if not call.startswith(QUIET) and not call.endswith("Destroy")})


@pytest.fixture
def turns(gpu: Any, folder: EngineFolder) -> dict[int, list[str]]:
    """What is called while a backend loads (0), and in the first runs of a shape."""
    calls = {}
    for turn in range(5):
        if turn == 0:
            backend = TensorRTBackend(folder)
        else:
            backend.run(BATCH, WANTED)
        calls[turn] = list(gpu.calls)
        gpu.calls.clear()
    backend.close()
    assert "cudaStreamBeginCapture" in calls[3]
    assert telling(calls[4]) == [
        *("cudaEventRecord", "cudaEventSynchronize", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaSetDevice"),
    ]
    return calls


def test_memory_that_runs_out_while_loading_leaves_nothing_behind(
    gpu: Any, folder: EngineFolder, turns: dict[int, list[str]]
) -> None:
    """At each allocation in turn: ours of device and host, the library's of engines and contexts, those of graphs."""
    count = 0
    for name in ("cudaMalloc", "cudaHostAlloc", "library:engine", "library:context", "cudaGraphInstantiate"):
        for at in range(1, turns[0].count(name) + 1):
            gpu.fail(name, E.cudaErrorMemoryAllocation, at=at)
            with pytest.raises(DeviceMemoryError, match=r"^GPU 1: .*(memory|smaller)"):
                TensorRTBackend(folder, devices=[1])
            gc.collect()
            assert not gpu.live()
            count += 1
    # Hidden state, scratch, inputs of three parts, six outputs; three engines and four contexts at least.
    assert count > 11 + 3 + 4
    # The second GPU fails: the first one gives all back too.
    gpu.fail("cudaMalloc", E.cudaErrorMemoryAllocation, at=turns[0].count("cudaMalloc") + 1)
    with pytest.raises(DeviceMemoryError, match="^GPU 1: "):
        TensorRTBackend(folder, devices=[0, 1])
    gc.collect()
    assert not gpu.live()


def test_calls_that_fail_while_loading_leave_nothing_behind(
    gpu: Any, folder: EngineFolder, turns: dict[int, list[str]]
) -> None:
    names = telling(turns[0])
    assert len(names) > 12
    assert set(names) > CAPTURE
    # The last of them are in a capture.
    captured = {"library:enqueue", "cudaMemcpyAsync"}
    for name in sorted(set(names) - CAPTURE):
        for at in {1, turns[0].count(name)} if name not in captured else {1}:
            gpu.fail(name, E.cudaErrorInvalidValue, at=at)
            with pytest.raises((BackendRunError, BackendUnavailableError)) as caught:
                TensorRTBackend(folder)
            assert "InvalidValue" in str(caught.value) or name.startswith("library:")
            gc.collect()
            assert not gpu.live(), name


@pytest.mark.parametrize("turn", [1, 2, 3, 4])
def test_calls_that_fail_in_a_run_leave_the_engine_usable(
    gpu: Any, folder: EngineFolder, turns: dict[int, list[str]], expected: Any, turn: int
) -> None:
    """In a shape's first run, the first by its own context, its capture, its graph."""
    for name in sorted(set(telling(turns[turn])) - CAPTURE):
        if turn == 3 and name in {"library:enqueue", "cudaMemcpyAsync"}:
            continue  # of a capture: see below
        with_failure = TensorRTBackend(folder)
        for _ in range(turn - 1):
            with_failure.run(BATCH, WANTED)
        gpu.fail(name, E.cudaErrorInvalidValue)
        with pytest.raises(DeviceError) as caught:
            with_failure.run(BATCH, WANTED)
        assert not isinstance(caught.value, DeviceLostError), name
        for _ in range(3):
            check(with_failure.run(BATCH, WANTED), expected)
        with_failure.close()
        del caught
        gc.collect()
        assert not gpu.live(), name


@pytest.mark.parametrize("name", [*sorted(CAPTURE), "library:enqueue", "cudaMemcpyAsync"])
def test_a_capture_that_fails_costs_no_answer(
    gpu: Any, folder: EngineFolder, turns: dict[int, list[str]], expected: Any, name: str
) -> None:
    backend = TensorRTBackend(folder)
    prepared = gpu.live()["executables"]
    for _ in range(2):
        check(backend.run(BATCH, WANTED), expected)
    gpu.fail(name, E.cudaErrorInvalidValue)
    with pytest.warns(RuntimeWarning, match=f"^the encoder {NO_GRAPH}.*InvalidValue") as caught:
        check(backend.run(BATCH, WANTED), expected)
    assert len(caught) == 1
    # Said once; and the pooler, which nothing befell, has its graph.
    for _ in range(3):
        check(backend.run(BATCH, WANTED), expected)
    assert gpu.live()["executables"] == prepared + 1
    backend.close()
    gc.collect()
    assert not gpu.live()


def test_a_library_that_lets_nothing_be_captured(gpu: Any, folder: EngineFolder, expected: Any) -> None:
    gpu.refuses_captures = True
    with pytest.warns(RuntimeWarning, match=NO_GRAPH) as caught:
        backend = TensorRTBackend(folder)
    # For each part, and not for each shape.
    assert [str(warning.message).split()[1] for warning in caught] == ["encoder", "mlm", "pooler"]
    assert "update TensorRT or the NVIDIA driver" in str(caught[0].message)
    assert "operation not permitted when capturing" in str(caught[0].message)
    gpu.calls.clear()
    for _ in range(5):
        check(backend.run(BATCH, WANTED), expected)
    assert not CAPTURE & set(gpu.calls)
    backend.close()
    assert not gpu.live()


@pytest.mark.parametrize("turn", [1, 3, 4])
def test_a_lost_gpu_closes_the_engine(
    gpu: Any, folder: EngineFolder, turns: dict[int, list[str]], turn: int
) -> None:
    for name in telling(turns[turn]):
        backend = TensorRTBackend(folder)
        for _ in range(turn - 1):
            backend.run(BATCH, WANTED)
        gpu.fail(name, E.cudaErrorIllegalAddress)
        with pytest.raises(DeviceLostError, match=r"^GPU 0: lost, as it could not .*cudaErrorIllegalAddress"):
            backend.run(BATCH, WANTED)
        for _ in range(2):
            with pytest.raises(
                EngineClosedError, match=r"the engine closed itself, since a GPU failed: GPU 0: lost"
            ):
                backend.run(BATCH, WANTED)
        gpu.calls.clear()
        backend.close()
        # It was closed already.
        assert gpu.calls == []
        del backend
        gc.collect()
        # As in a new process.
        gpu.lost.clear()
        for kind in ("allocations", "streams", "events", "graphs", "executables"):
            getattr(gpu, kind).clear()


def test_a_kernel_that_fails_is_an_error_of_its_own_run(
    gpu: Any, folder: EngineFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found when the stream is waited for, not when it is enqueued."""
    backend = TensorRTBackend(folder, devices=[0, 1])

    def fail(context: Any, *_: Any) -> None:
        raise context._gpu.illegal_address()

    with monkeypatch.context() as patch:
        patch.setattr(machine.fake_tensorrt.IExecutionContext, "_compute", fail)
        # Nothing is copied back, so that only the end of the block waits.
        with pytest.raises(DeviceLostError):
            backend.run(BATCH, Wanted(mlm_positions=np.zeros(0, np.int64), mlm_top_k=1))
    with pytest.raises(EngineClosedError, match="GPU 0: lost"):
        backend.run(BATCH, WANTED)
    # The other GPU's worker has given all back.
    assert not [allocation for allocation in gpu.allocations.values() if allocation.device == 1]


@pytest.mark.parametrize("threads", [1, 6])
def test_nobody_waits_for_a_worker_that_is_lost_or_closed(
    gpu: Any, folder: EngineFolder, threads: int
) -> None:
    for lose in (True, False):
        gpu.lost.clear()
        backend = TensorRTBackend(folder)
        outcomes: list[str] = []

        def run(backend: TensorRTBackend = backend, outcomes: list[str] = outcomes) -> None:
            try:
                backend.run(BATCH, WANTED)
                outcomes.append("answer")
            except EngineClosedError:
                outcomes.append("closed")

        waiting = [threading.Thread(target=run) for _ in range(threads)]

        def interfere(backend: TensorRTBackend = backend, waiting: Any = waiting, lose: bool = lose) -> None:
            gpu.hooks.clear()
            for thread in waiting:
                thread.start()
            # Until every one has begun its run and waits for the worker.
            while backend._executor._pool._runs < threads + 1:
                pass
            if lose:
                gpu.lost[0] = E.cudaErrorECCUncorrectable
            else:
                backend.close()

        gpu.hooks["cudaEventSynchronize"] = interfere
        if lose:
            with pytest.raises(DeviceLostError, match="ECCUncorrectable"):
                backend.run(BATCH, WANTED)
        else:
            assert backend.run(BATCH, WANTED).pooled is not None
        for thread in waiting:
            thread.join(timeout=60)
            assert not thread.is_alive()
        # Runs that had begun before it was closed end as if nothing had happened.
        assert outcomes == ["closed" if lose else "answer"] * threads


def test_the_librarys_words_are_in_the_error(gpu: Any, folder: EngineFolder) -> None:
    backend = TensorRTBackend(folder)
    gpu.fail("library:enqueue", E.cudaErrorInvalidValue)
    with pytest.raises(
        DeviceError, match=r"GPU 0: TensorRT could not run the encoder: enqueueV3: .*cudaErrorInvalidValue"
    ):
        backend.run(BATCH, WANTED)
    # Tried once more when all graphs are gone.
    for _ in range(2):
        gpu.fail("library:enqueue", E.cudaErrorMemoryAllocation)
    with pytest.raises(DeviceMemoryError, match=r"not enough memory to run the encoder.* free .*enqueueV3"):
        backend.run(make_batch([50]), WANTED_OF_ONE)
    backend.close()


def test_an_error_of_the_caller_gives_the_worker_back(
    gpu: Any, folder: EngineFolder, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TensorRTBackend(folder)
    with monkeypatch.context() as patch:
        patch.setattr("bertrt.backends.parts._best_first", lambda found, top_k: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            backend.run(BATCH, WANTED)
    check(backend.run(make_batch([20, 30, 25]), WANTED), expected)
    backend.close()


def test_what_a_failed_run_left_under_way_is_waited_for(
    gpu: Any, gpu_engine: Callable[[str], Path], tmp_path: Path
) -> None:
    """Else the next inputs would go where it still reads: candidates where it looks for positions."""
    folder = machine.fake_plans.build_plans(
        gpu_engine("fp32"), tmp_path / "engine", PROFILES, most_mlm_rows=64
    )
    reference = create_backend("onnxruntime", folder, 1, provider="cpu")
    backend = TensorRTBackend(folder)
    batch = make_batch([64, 64])
    many, one = (
        Wanted(mlm_positions=np.arange(count), mlm_candidates=np.full((count, 16), 8000)) for count in (64, 1)
    )
    for _ in range(3):  # until it is a graph
        backend.run(batch, many)
    # The first copy that is no part of a graph is that of the results.
    gpu.fail("cudaMemcpyAsync", E.cudaErrorInvalidValue)
    with pytest.raises(DeviceError, match="could not copy"):
        backend.run(batch, many)
    found, expected = backend.run(batch, one), reference.run(batch, one)
    np.testing.assert_allclose(
        found.mlm_candidate_log_probs, expected.mlm_candidate_log_probs, rtol=1e-4, atol=1e-4
    )
    backend.close()


def test_a_library_that_does_not_start(
    gpu: Any, folder: EngineFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(logger: Any) -> None:
        logger.log(1, "createInferRuntime: Error Code 6: API Usage Error (CUDA initialization failure)")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(sys.modules["tensorrt"], "Runtime", fail)
    with pytest.raises(DeviceError, match="GPU 0: TensorRT could not start: .*CUDA initialization failure"):
        TensorRTBackend(folder)
    assert not gpu.live()
