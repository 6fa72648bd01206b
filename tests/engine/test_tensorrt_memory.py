"""Too little memory for the contexts and graphs of TensorRT plans: answers come first, and nothing is tried for ever.

On a machine whose GPUs compute on the CPU (`fakes/`), where every call can be made to fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fake_machine as machine
import numpy as np
import pytest

from bertrt.backends.base import Wanted
from bertrt.backends.registry import create_backend
from bertrt.backends.tensorrt.backend import TensorRTBackend
from bertrt.folder import EngineFolder

PROFILES = ("1x1..1x32..1x64", "1x1..2x32..4x64")


make_batch, check = machine.make_batch, machine.check_same
E = machine.fake_cuda.cudaError_t
BATCH = make_batch([20, 30, 25])
WANTED = Wanted(
    hidden_states=True, pooled=True, nsp=True, mlm_positions=np.array([3, 40]), mlm_logits=True, mlm_top_k=5
)
WANTED_OF_ONE = Wanted(hidden_states=True)


@pytest.fixture(scope="module")
def folder(fake_plans: Callable[..., EngineFolder]) -> EngineFolder:
    """Do not change it."""
    return fake_plans(profiles=PROFILES, most_mlm_rows=8)


@pytest.fixture(scope="module")
def expected(folder: EngineFolder) -> Any:
    """What ONNX Runtime answers."""
    return create_backend("onnxruntime", folder, 1, provider="cpu").run(BATCH, WANTED)


@pytest.mark.parametrize("name", ["library:context", "cudaGraphInstantiate"])
def test_where_there_is_no_memory_for_graphs_there_are_answers(
    gpu: Any, folder: EngineFolder, expected: Any, name: str
) -> None:
    backend = TensorRTBackend(folder)
    prepared = gpu.live()["executables"]
    for _ in range(100):
        gpu.fail(name, E.cudaErrorMemoryAllocation)
    tried = []
    for _ in range(30):
        gpu.calls.clear()
        check(backend.run(BATCH, WANTED), expected)
        tried.append(gpu.calls.count("library:context"))
    # Those that were prepared have made room one after the other, and then nobody tries any more.
    assert prepared > 3
    assert sum(tried) >= prepared
    assert tried[-10:] == [0] * 10
    assert gpu.live()["executables"] == 0
    backend.close()
    assert not gpu.live()


def test_as_many_graphs_as_memory_holds_are_kept(gpu: Any, folder: EngineFolder, expected: Any) -> None:
    """More shapes than there is memory for: none is given up and made again in every round."""
    backend = TensorRTBackend(folder)
    prepared = gpu.live()["executables"]
    # Room for two more contexts with their graphs.
    gpu.capacity = gpu.used() + 2 * (4096 + 512)
    shapes = [(length,) for length in (16, 32, 48, 64)] + [(64, 64), (48,) * 3, (48,) * 4]
    made = []
    for _ in range(12):
        gpu.calls.clear()
        for lengths in shapes:
            backend.run(make_batch(lengths), WANTED_OF_ONE)
        made.append(gpu.calls.count("library:context"))
        assert gpu.live()["executables"] <= prepared + 2
    # What is prepared and nobody asks for has made room.
    assert gpu.live()["executables"] == prepared + 2
    assert made[4:] == [0] * 8
    check(backend.run(BATCH, WANTED), expected)
    backend.close()
    assert not gpu.live()


def test_a_first_run_without_memory_gets_that_of_the_graphs(
    gpu: Any, folder: EngineFolder, expected: Any
) -> None:
    backend = TensorRTBackend(folder)
    prepared = gpu.live()["executables"]
    gpu.fail("library:enqueue", E.cudaErrorMemoryAllocation)
    check(backend.run(BATCH, WANTED), expected)
    assert gpu.live()["executables"] == 0
    # Half as many may come back.
    for _ in range(5):
        check(backend.run(BATCH, WANTED), expected)
    for length in (16, 32, 48, 64) * 3:
        backend.run(make_batch([length]), WANTED_OF_ONE)
    assert gpu.live()["executables"] == prepared // 2
    backend.close()
    assert not gpu.live()


def test_graphs_under_way_are_waited_for_before_they_make_room(
    gpu: Any, folder: EngineFolder, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No others, with whose memory the library would wait for all.
    monkeypatch.setattr("bertrt.backends.tensorrt.worker.MOST_GRAPHS", 2)
    backend = TensorRTBackend(folder)
    for _ in range(3):
        backend.run(BATCH, Wanted(hidden_states=True))
    for _ in range(2):
        backend.run(BATCH, Wanted(pooled=True))
    # The encoder's graph has been launched when there is no memory for the pooler's.
    gpu.fail("cudaGraphInstantiate", E.cudaErrorMemoryAllocation)
    found = backend.run(BATCH, Wanted(pooled=True))
    np.testing.assert_allclose(found.pooled, expected.pooled, rtol=1e-4, atol=1e-4)
    assert gpu.live()["executables"] == 1
    # It has been launched again when there is none for the first run of the head's graph.
    gpu.fail("library:enqueue", E.cudaErrorMemoryAllocation)
    found = backend.run(BATCH, Wanted(mlm_positions=np.array([3, 40]), mlm_logits=True))
    np.testing.assert_allclose(found.mlm_logits, expected.mlm_logits, rtol=1e-4, atol=1e-4)
    assert gpu.live()["executables"] == 0
    backend.close()
