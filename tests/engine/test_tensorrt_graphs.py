"""Contexts, graphs and memory of TensorRT plans: prepared before the first request, and no more from then on.

On a machine whose GPUs compute on the CPU (`fakes/`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fake_machine as machine
import numpy as np
import pytest

from bertrt.backends.base import Wanted
from bertrt.backends.registry import create_backend
from bertrt.backends.tensorrt import worker as tensorrt_worker
from bertrt.backends.tensorrt.backend import TensorRTBackend
from bertrt.folder import EngineFolder

PROFILES = ("1x1..1x64..1x128", "1x1..4x64..4x128")


make_batch, check_same = machine.make_batch, machine.check_same


@pytest.fixture(scope="module")
def folders(fake_plans: Callable[..., EngineFolder]) -> Callable[..., EngineFolder]:
    """A function that gives the demo engine with plans of a library; do not change it."""
    # 16 rows of the masked-LM head at a time, so that more positions take several runs.
    return partial(fake_plans, profiles=PROFILES, most_mlm_rows=16)


@pytest.fixture
def folder(folders: Callable[..., EngineFolder]) -> EngineFolder:
    return folders()


@pytest.fixture(scope="module")
def reference(gpu_engine: Callable[[str], Path]) -> Any:
    """The same engine on ONNX Runtime, whose answers are compared with PyTorch's elsewhere; it is quicker."""
    return create_backend("onnxruntime", EngineFolder.open(gpu_engine("fp32")), 1, provider="cpu").run


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt_rtx"])
def test_the_first_request_finds_all_prepared(
    gpu: Any, folders: Callable[..., EngineFolder], library: str
) -> None:
    backend = TensorRTBackend(folders(library))
    gpu.calls.clear()
    batch = make_batch([64])
    backend.run(batch, Wanted(mlm_positions=np.array([5], np.int64), mlm_top_k=5, pooled=True))
    backend.run(make_batch([60] * 4), Wanted(pooled=True, mlm_positions=np.arange(4), mlm_top_k=5))
    made = {
        "cudaMalloc",
        "cudaHostAlloc",
        "cudaStreamBeginCapture",
        "cudaGraphInstantiate",
        "library:context",
    }
    assert not made & set(gpu.calls)
    if library == "tensorrt":
        assert gpu.calls.count("cudaGraphLaunch") == 6
        assert "library:enqueue" not in gpu.calls
    else:
        # It captures by itself; a capture of ours around it would be refused. Its kernels are those of the shape, which
        # no other will take the place of.
        assert "cudaStreamBeginCapture" not in gpu.calls
        assert gpu.fallbacks == []
    backend.close()


def test_a_shape_of_tensorrt_rtx_gets_kernels_of_its_own_when_it_comes_again(
    gpu: Any, folders: Callable[..., EngineFolder], reference: Any
) -> None:
    backend = TensorRTBackend(folders("tensorrt_rtx"))
    batch, wanted = make_batch([100]), Wanted(hidden_states=True)
    counts = []
    for _ in range(4):
        check_same(backend.run(batch, wanted), reference(batch, wanted))
        counts.append(len(gpu.fallbacks))
    # Its first run does not wait for them.
    assert counts == [1, 1, 1, 1]
    backend.close()
    assert not gpu.live()


def test_a_shape_that_comes_once_gets_no_context_of_its_own(gpu: Any, folder: EngineFolder) -> None:
    backend = TensorRTBackend(folder)
    ready = gpu.live()
    for length in (20, 100, 120):
        backend.run(make_batch([length]), Wanted(hidden_states=True))
    assert gpu.live() == ready
    backend.run(make_batch([120]), Wanted(hidden_states=True))
    assert gpu.live() - ready == {"context": 1}
    backend.run(make_batch([120]), Wanted(hidden_states=True))
    assert gpu.live() - ready == {"context": 1, "graph": 1, "executables": 1}
    backend.close()


def test_a_shape_that_comes_once_in_a_while_pushes_out_no_other(
    gpu: Any, folder: EngineFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_worker, "MOST_GRAPHS", 1)
    backend = TensorRTBackend(folder)

    def contexts(length: int) -> int:
        """How many are made for a request of this length."""
        gpu.calls.clear()
        backend.run(make_batch([length]), Wanted(hidden_states=True))
        return gpu.calls.count("library:context")

    assert [contexts(length) for length in (20, 20, 20, 50, 50, 20, 50, 50)] == [0, 1, 0, 0, 1, 0, 0, 0]
    backend.close()


@pytest.mark.parametrize("most", [1, 6])
def test_memory_does_not_grow_and_old_graphs_make_room(
    most: int,
    gpu: Any,
    folder: EngineFolder,
    reference: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensorrt_worker, "MOST_GRAPHS", most)
    backend = TensorRTBackend(folder)
    ready, own = gpu.live(), 4  # contexts of two profiles and two heads
    generator = np.random.default_rng(0)
    for seed in range(40):
        length = int(generator.choice([16, 32, 48, 64, 80, 96]))
        batch = make_batch([length] * int(generator.choice([1, 2])), seed)
        wanted = Wanted(
            pooled=True,
            mlm_positions=np.arange(int(generator.integers(1, 5))),
            mlm_top_k=4,
            hidden_states=seed % 2 == 0,
        )
        check_same(backend.run(batch, wanted), reference(batch, wanted))
        live = gpu.live()
        assert live["executables"] <= live["context"] - own <= most
        assert {kind: live[kind] for kind in ("device", "pinned", "engine", "streams", "events")} == {
            kind: ready[kind] for kind in ("device", "pinned", "engine", "streams", "events")
        }
    # Some had to go: else nothing was proved. With one at most, the encoder's while it is still under way.
    assert gpu.calls.count("cudaGraphExecDestroy") > 6
    backend.close()
    assert not gpu.live()


def test_an_engine_that_nobody_closed_gives_all_back(gpu: Any, folder: EngineFolder) -> None:
    backend = TensorRTBackend(folder)
    backend.run(make_batch([20]), Wanted(pooled=True))
    assert gpu.live()
    del backend
    gc.collect()
    assert not gpu.live()
