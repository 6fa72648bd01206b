"""Parts on devices: each shape is a CUDA graph of its own, and nothing disturbs its capture."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import transformers
from fake_machine import make_batch
from fake_sessions import (
    STATES,
    Watched,
    check,
    everything,
    make_backend,
    pytorch,
)

from bertrt.backends.base import Wanted
from bertrt.backends.onnxruntime import bindings as onnxruntime_bindings
from bertrt.folder import EngineFolder


def test_every_shape_is_a_graph_of_its_own(
    exported: Callable[[str], EngineFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_bindings, "MOST_GRAPHS", 18)
    backend, workers = make_backend(exported("fp32"), graphs=True)
    encoder, mlm, pooler = (workers.sessions[0][part] for part in ("encoder", "mlm", "pooler"))
    # While it is loaded: single sequences of 16 lengths. 0 would be a run that names no graph.
    assert encoder.runs == [str(1 + index) for index in range(16)]
    assert mlm.runs == pooler.runs == ["1"]
    for lengths, graph in (
        ([12], "1"),
        ([512], "16"),
        ([12, 12], "17"),
        ([40, 40], "18"),
        ([12, 5], "17"),
        ([70, 70], "-1"),
        ([70, 70], "-1"),
        ([12, 12], "17"),
    ):
        backend.run(make_batch(lengths), STATES)
        assert encoder.runs[-1] == graph, lengths
    backend.run(make_batch([12, 12]), Wanted(pooled=True, mlm_positions=np.array([1, 2, 3]), mlm_logits=True))
    assert mlm.runs == pooler.runs == ["1", "2"]


def test_nothing_else_runs_while_a_graph_is_captured(exported: Callable[[str], EngineFolder]) -> None:
    """On any GPU: ONNX Runtime captures in a way that others disturb."""
    lock, running, disturbed = threading.Lock(), [0], []

    class Counting:
        """In the place of a session's run: how many there are, and whether one was to be alone."""

        def __init__(self, session: Watched) -> None:
            self._session, self._run = session, session.run_with_iobinding
            self._seen: set[str] = set()

        def __call__(self, binding: Any, options: onnxruntime.RunOptions) -> None:
            graph = options.get_run_config_entry("gpu_graph_id")
            captures = graph != "-1" and graph not in self._seen
            with lock:
                self._seen.add(graph)
                running[0] += 1
                if captures and running[0] > 1:
                    disturbed.append(graph)
                others = running[0]
            self._run(binding, options)
            with lock:
                if captures and running[0] > others:
                    disturbed.append(graph)
                running[0] -= 1

    def opened(part: str, session: Watched) -> None:
        session.run_with_iobinding = Counting(session)  # type: ignore[method-assign]

    backend, workers = make_backend(exported("fp32"), 2, graphs=True, opened=opened)
    lengths = [[5] * count + [size] for count in (1, 2, 3) for size in (9, 40, 90, 200)]
    failures: list[BaseException] = []

    def ask(index: int) -> None:
        try:
            for round_ in range(len(lengths)):
                batch = make_batch(lengths[(index + round_) % len(lengths)])
                backend.run(
                    batch, Wanted(hidden_states=True, mlm_positions=np.arange(index + 1), mlm_logits=True)
                )
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert disturbed == []
    for sessions in workers.sessions:
        assert len(set(sessions["encoder"].runs) - {"-1"}) > 16


@pytest.mark.parametrize("part", ["encoder", "mlm", "pooler"])
@pytest.mark.parametrize("late", [False, True])
def test_a_part_that_cannot_be_captured_runs_without(
    part: str,
    late: bool,
    exported: Callable[[str], EngineFolder],
    reference_model: transformers.BertForPreTraining,
) -> None:
    """At the first shape, while the engine is loaded, or at one that comes later; said once, for all its shapes."""
    refused = RuntimeError(
        "[ONNXRuntimeError] : CUDA failure 900: operation not permitted when stream is capturing ; GPU=0 ; expr=x"
    )

    def opened(name: str, session: Watched) -> None:
        session.failures += [refused] if name == part and not late else []

    said = rf"cannot capture the {part} .*slower \(CPU\): .*failure 900"
    with contextlib.nullcontext() if late else pytest.warns(RuntimeWarning, match=said):
        backend, workers = make_backend(exported("fp32"), graphs=True, opened=opened)
    batch = make_batch([12, 40, 3])
    expected = pytorch(reference_model, batch, [1, 20])
    session = workers.sessions[0][part]
    if late:
        session.failures.append(refused)
        with pytest.warns(RuntimeWarning, match=said):
            check(backend.run(batch, everything([1, 20])), expected)
        assert session.runs[-2] not in {"-1", None}
    check(backend.run(batch, everything([1, 20])), expected)
    assert session.runs[-1] == "-1"
    others = [runs for name, watched in workers.sessions[0].items() if name != part for runs in watched.runs]
    assert "-1" not in others


def test_without_graphs_no_run_names_one(exported: Callable[[str], EngineFolder]) -> None:
    backend, workers = make_backend(exported("fp32"))
    backend.run(make_batch([12, 40]), everything([1]))
    for session in workers.sessions[0].values():
        assert set(session.runs) == {None}
