"""Parts on devices: the very executor that runs on GPUs, with the CPU as its device, against PyTorch.

Where the two differ, it is in what is handed to ONNX Runtime: the providers and the name of the device. What a GPU does
wrong is said by sessions that stand between the executor and the real ones.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from bertrt.backends.base import BatchOutput, TokenBatch, Wanted
from bertrt.backends.buckets import BucketRunner, Buckets
from bertrt.backends.onnxruntime import bindings as onnxruntime_bindings
from bertrt.backends.onnxruntime.backend import OnnxRuntimeBackend
from bertrt.backends.onnxruntime.bindings import SessionPlace
from bertrt.backends.onnxruntime.devices import DeviceSessionParts
from bertrt.backends.onnxruntime.providers import profiles_of, provider_problem
from bertrt.backends.onnxruntime.sessions import CPU_PROVIDER, load_graph
from bertrt.backends.padded import PaddedBackend
from bertrt.errors import (
    BackendRunError,
    DeviceLostError,
    DeviceMemoryError,
    EngineClosedError,
    HashMismatchError,
)
from bertrt.folder import EngineFolder
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.exporter import export_engine

LENGTHS = [3, 40, 1, 512, 17, 41, 2, 16, 15, 128, 129]
NO_MEMORY = "bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 939524096"
LOST = "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; expr=cudaStreamSynchronize(stream); "


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], EngineFolder]:
    """A function that exports the demo checkpoint in parts, once for each precision."""
    folders: dict[str, EngineFolder] = {}

    def export(precision: str = "fp32") -> EngineFolder:
        if precision not in folders:
            out = tmp_path_factory.mktemp("parts") / precision
            with open_checkpoint("demo") as checkpoint:
                export_engine(checkpoint, out, precision=precision, target="tensorrt")
            folders[precision] = EngineFolder.open(out)
        return folders[precision]

    return export


class Watched:
    """A session that notes each of its runs, and lets a test come between.

    Attributes:
        runs: the run's ``gpu_graph_id``, or ``None``.
        threads: which have run it.
        before: called before each run.
        failures: raised by the next runs, in order.
    """

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self.runs: list[str | None] = []
        self.threads: set[threading.Thread] = set()
        self.before: Callable[[], None] = lambda: None
        self.failures: list[Exception] = []

    def io_binding(self) -> onnxruntime.IOBinding:
        return self._session.io_binding()

    def run_with_iobinding(self, binding: onnxruntime.IOBinding, options: onnxruntime.RunOptions) -> None:
        try:
            self.runs.append(options.get_run_config_entry("gpu_graph_id"))
        except RuntimeError:
            self.runs.append(None)
        self.threads.add(threading.current_thread())
        self.before()
        if self.failures:
            raise self.failures.pop(0)
        self._session.run_with_iobinding(binding, options)


class Workers:
    """Places on the CPU, and the sessions that were opened for them; ``opened`` sees each before it is used."""

    def __init__(
        self,
        folder: EngineFolder,
        count: int = 1,
        *,
        graphs: bool = False,
        opened: Callable[[str, Watched], None] = lambda part, session: None,
    ) -> None:
        self._opened = opened
        self.sessions: list[dict[str, Watched]] = [{} for _ in range(count)]
        self.places = [
            SessionPlace(open=self._opener(folder, sessions), device_type="cpu", graphs=graphs)
            for sessions in self.sessions
        ]
        self.buckets = Buckets(profiles_of(folder.manifest.architecture), rebuild="nothing")
        self.executor = DeviceSessionParts(
            self.places, self.buckets, folder.manifest.architecture, folder.manifest.heads
        )

    def _opener(self, folder: EngineFolder, sessions: dict[str, Watched]) -> Callable[[str], Any]:
        opened = self._opened

        def open_part(part: str) -> Watched:
            sessions[part] = Watched(load_graph(folder, part, 1, [(CPU_PROVIDER, {})]))
            opened(part, sessions[part])
            return sessions[part]

        return open_part

    def backend(self, folder: EngineFolder) -> PaddedBackend:
        sizes, heads = folder.manifest.architecture, folder.manifest.heads
        runner = BucketRunner(self.executor, sizes, self.buckets)
        return PaddedBackend("onnxruntime", runner, architecture=sizes, heads=heads, threads=1)


def make_backend(folder: EngineFolder, count: int = 1, **options: Any) -> tuple[PaddedBackend, Workers]:
    workers = Workers(folder, count, **options)
    return workers.backend(folder), workers


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
        batch.input_ids[start:end], batch.token_type_ids[start:end], np.array([0, end - start], np.int64)
    )


def everything(positions: list[int]) -> Wanted:
    return Wanted(
        mlm_positions=np.array(positions, np.int64),
        mlm_logits=True,
        mlm_top_k=7,
        mlm_candidates=np.array([[position, 5, 8191] for position in positions], np.int64),
        hidden_states=True,
        pooled=True,
        nsp=True,
    )


STATES = Wanted(hidden_states=True)
NAMES = (
    "hidden_states",
    "pooled",
    "nsp_logits",
    "mlm_logits",
    "mlm_top_log_probs",
    "mlm_candidate_log_probs",
)


@torch.inference_mode()
def pytorch(
    model: transformers.BertForPreTraining, batch: TokenBatch, positions: list[int]
) -> dict[str, np.ndarray[Any, Any]]:
    """What the reference answers, sequence by sequence, without padding."""
    hidden, pooled = [], []
    for index in range(batch.num_sequences):
        one = sequence(batch, index)
        bert = model.bert(
            torch.from_numpy(one.input_ids).long()[None],
            token_type_ids=torch.from_numpy(one.token_type_ids).long()[None],
        )
        hidden.append(bert.last_hidden_state[0])
        pooled.append(bert.pooler_output[0])
    states = torch.cat(hidden)
    logits = model.cls.predictions(states[positions])
    log_probs = logits.log_softmax(-1)
    candidates = torch.tensor([[position, 5, 8191] for position in positions])
    found = {
        "hidden_states": states,
        "pooled": torch.stack(pooled),
        "nsp_logits": model.cls.seq_relationship(torch.stack(pooled)),
        "mlm_logits": logits,
        "mlm_top_log_probs": log_probs.topk(7).values,
        "mlm_candidate_log_probs": log_probs.gather(1, candidates),
        "log_probs": log_probs,
    }
    return {name: values.numpy() for name, values in found.items()}


def check(found: BatchOutput, expected: dict[str, np.ndarray[Any, Any]], precision: str = "fp32") -> None:
    """Compare all outputs.

    float32 sums in another order: 1e-4 on values of some tens, as for every backend. float16 rounds each operand of
    a product by up to 2^-11 of it: 25 products lie one behind the other (4 and attention's 2 in each of 4 layers,
    and the decoder), and in the worst case their errors add up, relative to the largest value.
    """
    for name in NAMES:
        largest = float(np.abs(expected[name]).max())
        tolerance = 25 * 2**-11 * largest if precision == "fp16" else 1e-4 * max(largest, 1)
        np.testing.assert_allclose(getattr(found, name), expected[name], rtol=0, atol=tolerance, err_msg=name)
    assert found.mlm_top_ids is not None
    # The ids may differ where two are equal to within the tolerance; the values named do not.
    named = np.take_along_axis(expected["log_probs"], found.mlm_top_ids, axis=1)
    largest = float(np.abs(expected["mlm_logits"]).max())
    tolerance = 50 * 2**-11 * largest if precision == "fp16" else 2e-4 * largest
    np.testing.assert_allclose(named, expected["mlm_top_log_probs"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
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


def feeds(ids: int, shape: tuple[int, int] = (2, 16)) -> dict[str, Any]:
    whole = np.full(shape, ids, np.int32)
    return {"input_ids": whole, "attention_mask": whole * 0 + 1, "token_type_ids": whole * 0}


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


@pytest.fixture(params=["cuda", "tensorrt"])
def on_a_gpu(
    request: pytest.FixtureRequest,
    exported: Callable[[str], EngineFolder],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[PaddedBackend]:
    if problem := provider_problem(request.param):
        pytest.skip(f"needs ONNX Runtime's provider {request.param}: {problem}")
    monkeypatch.setenv("BERTRT_CACHE", str(tmp_path))
    backend = OnnxRuntimeBackend(exported("fp16"), provider=request.param)
    yield backend
    backend.close()


@pytest.mark.gpu
def test_on_a_gpu(on_a_gpu: PaddedBackend, reference_model: transformers.BertForPreTraining) -> None:
    """Shapes in turn and again, so that graphs are captured, and replayed with other inputs."""
    for seed in range(3):
        for lengths in ([12], [300], LENGTHS, [512] * 8):
            batch = make_batch(lengths, seed=seed)
            positions = list(range(0, batch.num_tokens, 9))
            expected = pytorch(reference_model, batch, positions)
            check(on_a_gpu.run(batch, everything(positions)), expected, "fp16")
