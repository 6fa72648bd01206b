"""Parts on devices: what fails, and what of the engine remains."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import transformers
from fake_machine import make_batch
from fake_sessions import (
    LOST,
    NO_MEMORY,
    STATES,
    Watched,
    Workers,
    check,
    everything,
    make_backend,
    pytorch,
)

from bertrt.backends.buckets import Buckets
from bertrt.backends.onnxruntime.bindings import SessionPlace
from bertrt.backends.onnxruntime.devices import DeviceSessionParts
from bertrt.backends.onnxruntime.providers import profiles_of
from bertrt.backends.onnxruntime.sessions import CPU_PROVIDER, load_graph
from bertrt.errors import (
    BackendRunError,
    DeviceLostError,
    DeviceMemoryError,
    EngineClosedError,
    HashMismatchError,
)
from bertrt.folder import EngineFolder


@pytest.mark.parametrize("part", ["encoder", "mlm", "pooler"])
@pytest.mark.parametrize(
    ("message", "kind"), [(NO_MEMORY, DeviceMemoryError), ("something else", BackendRunError)]
)
def test_a_run_that_fails_leaves_the_engine_usable(
    part: str,
    message: str,
    kind: type[Exception],
    exported: Callable[[str], EngineFolder],
    reference_model: transformers.BertForPreTraining,
) -> None:
    backend, workers = make_backend(exported("fp32"), graphs=True)
    batch = make_batch([12, 40])
    session = workers.sessions[0][part]
    session.failures.append(RuntimeError(f"[ONNXRuntimeError] : {message}"))
    with pytest.raises(
        BackendRunError, match=rf"failed in the {part} on a shape of [\dx]+ \(CPU\): .*{message}"
    ) as caught:
        backend.run(batch, everything([1]))
    assert type(caught.value) is kind
    check(backend.run(batch, everything([1])), pytorch(reference_model, batch, [1]))
    # The failed run may have been the one that was captured: its graph is never replayed.
    assert session.runs[-1] == "-1"
    assert session.runs[-2] not in {"-1", None}


@pytest.mark.parametrize("part", ["encoder", "mlm", "pooler"])
def test_a_lost_gpu_closes_the_engine(part: str, exported: Callable[[str], EngineFolder]) -> None:
    backend, workers = make_backend(exported("fp32"), 2)
    # Whichever of the two is taken.
    for sessions in workers.sessions:
        sessions[part].failures.append(RuntimeError(LOST))
    with pytest.raises(DeviceLostError, match="CUDA failure 700.*new process"):
        backend.run(make_batch([12]), everything([1]))
    for _ in range(2):
        with pytest.raises(EngineClosedError, match="when a GPU was lost: .*CUDA failure 700"):
            backend.run(make_batch([12]), STATES)
    backend.close()


def test_a_lost_gpu_wakes_who_waits(exported: Callable[[str], EngineFolder]) -> None:
    backend, workers = make_backend(exported("fp32"))
    encoder = workers.sessions[0]["encoder"]
    running, go = threading.Event(), threading.Event()

    def hold() -> None:
        running.set()
        assert go.wait(60)

    encoder.before = hold
    encoder.failures.append(RuntimeError(LOST))
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            backend.run(make_batch([12]), STATES)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    threads[0].start()
    assert running.wait(60)
    for thread in threads[1:]:
        thread.start()
    # All wait for the one worker, or are about to.
    go.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert sorted(type(error).__name__ for error in errors) == [
        "DeviceLostError",
        "EngineClosedError",
        "EngineClosedError",
    ]


def test_close_lets_runs_end_and_frees_the_sessions(exported: Callable[[str], EngineFolder]) -> None:
    backend, workers = make_backend(exported("fp32"))
    encoder = workers.sessions[0]["encoder"]
    expected = backend.run(make_batch([12, 300]), STATES).hidden_states
    running, go = threading.Event(), threading.Event()

    def hold() -> None:
        running.set()
        assert go.wait(60)

    encoder.before = hold
    found: list[Any] = []
    # Two blocks: the second begins after the engine was closed.
    thread = threading.Thread(
        target=lambda: found.append(backend.run(make_batch([12, 300]), STATES).hidden_states)
    )
    thread.start()
    assert running.wait(60)
    backend.close()
    with pytest.raises(EngineClosedError, match="load it again"):
        backend.run(make_batch([12]), STATES)
    go.set()
    thread.join(60)
    np.testing.assert_array_equal(found[0], expected)
    backend.close()
    # The worker's thread may let go of it a moment later.
    freed = threading.Event()
    weakref.finalize(encoder, freed.set)
    del encoder, workers, thread
    assert freed.wait(60)


def test_the_sessions_of_a_lost_gpu_are_never_freed(exported: Callable[[str], EngineFolder]) -> None:
    """ONNX Runtime ends the process when it frees a CUDA graph of a lost GPU."""
    backend, workers = make_backend(exported("fp32"))
    encoder = workers.sessions[0]["encoder"]
    encoder.failures.append(RuntimeError(LOST))
    with contextlib.suppress(DeviceLostError):
        backend.run(make_batch([12]), STATES)
    backend.close()
    session = weakref.ref(encoder)
    del encoder, workers, backend
    gc.collect()
    assert session() is not None


def test_a_gpu_that_fails_while_the_engine_is_loaded(exported: Callable[[str], EngineFolder]) -> None:
    folder = exported("fp32")

    class Failing(Watched):
        def run_with_iobinding(self, *_: Any) -> None:
            raise RuntimeError(NO_MEMORY)

    def refuse(part: str) -> Any:
        raise HashMismatchError(part)

    buckets = Buckets(profiles_of(folder.manifest.architecture), rebuild="nothing")
    for opener, error in (
        (lambda part: Failing(load_graph(folder, part, 1, [(CPU_PROVIDER, {})])), DeviceMemoryError),
        (refuse, HashMismatchError),
    ):
        place = SessionPlace(open=opener, device_type="cpu")
        good = Workers(folder).places[0]
        for places in ([place], [good, place]):
            with pytest.raises(error):
                DeviceSessionParts(places, buckets, folder.manifest.architecture, folder.manifest.heads)


def test_memory_that_there_is_not(
    exported: Callable[[str], EngineFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(onnxruntime.OrtValue):
        @classmethod
        def ortvalue_from_shape_and_type(cls, *_: Any, **__: Any) -> Any:
            raise RuntimeError(NO_MEMORY)

    monkeypatch.setattr(onnxruntime, "OrtValue", Full)
    with pytest.raises(DeviceMemoryError, match="cannot make the engine ready"):
        Workers(exported("fp32"))
