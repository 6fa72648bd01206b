"""The native backend on real engines: bit for bit the same answer wherever a sequence runs, and no hang anywhere.

What every backend must do is tested in ``test_backends.py``, what the kernels compute in
``tests/kernels/test_native_kernels.py``.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bertrt.backends.base import BatchOutput, TokenBatch, Wanted
from bertrt.backends.native import NativeBackend
from bertrt.batching import offsets_of
from bertrt.engine import Engine
from bertrt.errors import BackendUnavailableError, EngineClosedError, WeightFileError
from bertrt.folder import EngineFolder

pytest.importorskip("bertrt._native", reason="the native kernels are not built")

PRECISIONS = ["fp32", "bf16", "int8"]
VOCABULARY = 8192
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 511, 512]


def sequence(length: int, seed: int) -> TokenBatch:
    generator = np.random.default_rng(seed)
    return TokenBatch(
        input_ids=generator.integers(0, VOCABULARY, length).astype(np.int32),
        token_type_ids=generator.integers(0, 2, length).astype(np.int32),
        offsets=np.array([0, length], np.int64),
    )


def packed(sequences: list[TokenBatch]) -> TokenBatch:
    return TokenBatch(
        input_ids=np.concatenate([one.input_ids for one in sequences]),
        token_type_ids=np.concatenate([one.token_type_ids for one in sequences]),
        offsets=offsets_of([one.num_tokens for one in sequences]),
    )


def everything(batch: TokenBatch, positions: Any) -> Wanted:
    places = np.asarray(positions, np.int64)
    here = batch.input_ids[places].astype(np.int64)
    return Wanted(
        mlm_positions=places,
        mlm_logits=True,
        mlm_top_k=9,
        mlm_candidates=np.stack([here, VOCABULARY - 1 - here], axis=1),
        hidden_states=True,
        pooled=True,
        nsp=True,
    )


def assert_same_bits(ours: BatchOutput, theirs: BatchOutput) -> None:
    for field in fields(BatchOutput):
        one, other = getattr(ours, field.name), getattr(theirs, field.name)
        assert (one is None) == (other is None), field.name
        if one is not None:
            assert one.shape == other.shape, field.name
            assert one.tobytes() == other.tobytes(), field.name


@pytest.fixture(scope="module")
def open_backend(demo_engine: Callable[..., Path]) -> Callable[..., NativeBackend]:
    """A function that loads a demo engine, once for each precision and number of threads."""
    backends: dict[tuple[str, int], NativeBackend] = {}

    def load(precision: str, threads: int = 2) -> NativeBackend:
        key = precision, threads
        if key not in backends:
            folder = EngineFolder.open(demo_engine(precision), verify=False)
            backends[key] = NativeBackend(folder, threads=threads)
        return backends[key]

    return load


@pytest.fixture(scope="module")
def alone(open_backend: Callable[..., NativeBackend]) -> Callable[..., BatchOutput]:
    """A function that runs a sequence alone on one thread, with every output at every position."""
    answers: dict[tuple[str, int, int], BatchOutput] = {}

    def run(precision: str, length: int, seed: int) -> BatchOutput:
        key = precision, length, seed
        if key not in answers:
            batch = sequence(length, seed)
            wanted = everything(batch, np.arange(length))
            answers[key] = open_backend(precision, 1).run(batch, wanted)
        return answers[key]

    return run


def part(output: BatchOutput, batch: TokenBatch, index: int) -> BatchOutput:
    """What an output with every position in order says of one sequence."""
    start, end = batch.offsets[index : index + 2]
    rows = {"pooled": slice(index, index + 1), "nsp_logits": slice(index, index + 1)}
    return BatchOutput(
        **{
            field.name: getattr(output, field.name)[rows.get(field.name, slice(start, end))]
            for field in fields(BatchOutput)
        }
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    chosen=st.lists(st.tuples(st.sampled_from(LENGTHS[:-2]), st.integers(0, 2)), min_size=1, max_size=9),
    threads=st.sampled_from([1, 2, 3]),
)
def test_random_batches_change_no_bit(
    precision: str,
    chosen: list[tuple[int, int]],
    threads: int,
    open_backend: Callable[..., NativeBackend],
    alone: Callable[..., BatchOutput],
) -> None:
    batch = packed([sequence(length, seed) for length, seed in chosen])
    output = open_backend(precision, threads).run(batch, everything(batch, np.arange(batch.num_tokens)))
    for index, (length, seed) in enumerate(chosen):
        assert_same_bits(part(output, batch, index), alone(precision, length, seed))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_length_in_one_batch_changes_no_bit(
    precision: str, open_backend: Callable[..., NativeBackend], alone: Callable[..., BatchOutput]
) -> None:
    """Long and short ones together, with more and with fewer threads than processors."""
    batch = packed([sequence(length, 0) for length in LENGTHS])
    for threads in (1, 2, 3, 8):
        output = open_backend(precision, threads).run(batch, everything(batch, np.arange(batch.num_tokens)))
        for index, length in enumerate(LENGTHS):
            assert_same_bits(part(output, batch, index), alone(precision, length, 0))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_part_is_the_same_bits_as_in_the_whole(
    precision: str, open_backend: Callable[..., NativeBackend]
) -> None:
    """Whatever else is asked for; positions in any order, and more than once."""
    backend = open_backend(precision)
    batch = packed([sequence(length, 1) for length in (40, 7, 130)])
    positions = np.array([150, 3, 3, 46, 0, 176, 150], np.int64)
    wanted = everything(batch, positions)
    whole = backend.run(batch, wanted)
    heads = ("mlm_logits", "mlm_top_k", "mlm_candidates")
    for number in range(1 << 6):
        names = [
            name for bit, name in enumerate((*heads, "hidden_states", "pooled", "nsp")) if number >> bit & 1
        ]
        asked: dict[str, Any] = {name: getattr(wanted, name) for name in names}
        if any(name in heads for name in names):
            asked["mlm_positions"] = positions
        given = backend.run(batch, Wanted(**asked))
        outputs = {"nsp": ["nsp_logits"], "mlm_top_k": ["mlm_top_ids", "mlm_top_log_probs"]}
        outputs["mlm_candidates"] = ["mlm_candidate_log_probs"]
        expected = {output: getattr(whole, output) for name in names for output in outputs.get(name, [name])}
        assert_same_bits(given, BatchOutput(**expected))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_outputs_of_the_head_agree(precision: str, open_backend: Callable[..., NativeBackend]) -> None:
    """The running sums over the vocabulary against float64 over all the logits."""
    batch = packed([sequence(length, 2) for length in (33, 5)])
    positions = np.array([0, 37, 12, 12], np.int64)
    candidates = np.array([[0, VOCABULARY - 1, 77]] * 4, np.int64)
    wanted = Wanted(mlm_positions=positions, mlm_logits=True, mlm_top_k=VOCABULARY, mlm_candidates=candidates)
    output = open_backend(precision).run(batch, wanted)
    assert output.mlm_logits is not None
    assert output.mlm_top_ids is not None
    logits = output.mlm_logits.astype(np.float64)
    log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    # Of equal logits the lower id comes first.
    order = np.argsort(-output.mlm_logits, axis=1, kind="stable")
    np.testing.assert_array_equal(output.mlm_top_ids, order)
    # A sum of 8,192 float32 terms, each rounded to 2^-24 of the largest: 8192 * 2^-24 = 5e-4 at the very worst.
    close = {"rtol": 0, "atol": 5e-4}
    np.testing.assert_allclose(
        output.mlm_top_log_probs, np.take_along_axis(log_probs, order, axis=1), **close
    )
    np.testing.assert_allclose(
        output.mlm_candidate_log_probs, np.take_along_axis(log_probs, candidates, axis=1), **close
    )
    for k in (1, 2, 5, 63, 64, 65, 1000):
        fewer = open_backend(precision).run(batch, Wanted(mlm_positions=positions, mlm_top_k=k))
        assert fewer.mlm_top_ids is not None
        np.testing.assert_array_equal(fewer.mlm_top_ids, order[:, :k])
        np.testing.assert_array_equal(fewer.mlm_top_log_probs, output.mlm_top_log_probs[:, :k])


def test_heads_without_rows(open_backend: Callable[..., NativeBackend]) -> None:
    batch = sequence(5, 0)
    none = np.zeros(0, np.int64)
    output = open_backend("int8").run(
        batch,
        Wanted(mlm_positions=none, mlm_logits=True, mlm_top_k=3, mlm_candidates=np.zeros((0, 4), np.int64)),
    )
    shapes = {
        field.name: value.shape
        for field in fields(BatchOutput)
        if (value := getattr(output, field.name)) is not None
    }
    assert shapes == {
        "mlm_logits": (0, VOCABULARY),
        "mlm_top_ids": (0, 3),
        "mlm_top_log_probs": (0, 3),
        "mlm_candidate_log_probs": (0, 4),
    }
    empty = Wanted(mlm_positions=np.array([1]), mlm_candidates=np.zeros((1, 0), np.int64))
    assert open_backend("int8").run(batch, empty).mlm_candidate_log_probs.shape == (1, 0)  # type: ignore[union-attr] # asked for


def test_engines_and_threads_at_once(open_backend: Callable[..., NativeBackend]) -> None:
    """Three engines, four callers each, more threads than processors: the same bits, and nobody waits for ever."""
    batches = [packed([sequence(length, seed) for length in (64, 9, 200)]) for seed in range(4)]
    backends = [
        open_backend(precision, threads) for precision, threads in zip(PRECISIONS, (1, 2, 4), strict=True)
    ]
    wanted = Wanted(hidden_states=True, pooled=True, nsp=True)
    expected = {
        (one, other): backends[one].run(batches[other], wanted) for one in range(3) for other in range(4)
    }
    together = threading.Barrier(12, timeout=60)

    def ask(one: int, other: int) -> None:
        together.wait()
        for _ in range(5):
            assert_same_bits(backends[one].run(batches[other], wanted), expected[one, other])

    with ThreadPoolExecutor(12) as pool:
        for outcome in [pool.submit(ask, *key) for key in expected]:
            outcome.result(timeout=300)


def test_engines_that_are_closed_while_they_run(demo_engine: Callable[..., Path]) -> None:
    folder = EngineFolder.open(demo_engine("int8"), verify=False)
    batch = packed([sequence(length, 0) for length in (200, 30)])
    wanted = Wanted(hidden_states=True)
    first = NativeBackend(folder, threads=2)
    expected = first.run(batch, wanted)
    for _ in range(10):
        backend = NativeBackend(folder, threads=2)
        outputs: list[BatchOutput] = []

        def run(backend: NativeBackend = backend, outputs: list[BatchOutput] = outputs) -> None:
            with contextlib.suppress(EngineClosedError):
                outputs.append(backend.run(batch, wanted))

        runners = [threading.Thread(target=run) for _ in range(3)]
        for runner in runners:
            runner.start()
        # One that has not begun yet may find the engine closed; those that have begun end.
        while not outputs and any(runner.is_alive() for runner in runners):
            time.sleep(0.001)
        backend.close()
        assert outputs
        for runner in runners:
            runner.join(timeout=60)
            assert not runner.is_alive()
        for output in outputs:
            assert_same_bits(output, expected)


def test_no_processor_is_busy_when_nobody_asks(open_backend: Callable[..., NativeBackend]) -> None:
    backend = open_backend("int8", 2)
    batch = packed([sequence(64, 0)])
    backend.run(batch, Wanted(pooled=True))
    shares = []
    for _ in range(5):
        backend.run(batch, Wanted(pooled=True))
        time.sleep(0.01)
        began, used = time.monotonic(), time.process_time()
        time.sleep(0.2)
        shares.append((time.process_time() - used) / (time.monotonic() - began))
    # A worker that spins takes a whole processor; this interpreter itself takes a little at times.
    assert min(shares) < 0.1, shares


FORKING = """
import multiprocessing, os, sys
import numpy as np
from bertrt.backends.base import TokenBatch, Wanted
from bertrt.backends.native import NativeBackend
from bertrt.errors import BertRTError
from bertrt.folder import EngineFolder

folder = EngineFolder.open(sys.argv[1], verify=False)
backend = NativeBackend(folder, threads=2)
lengths = [100, 30, 7]
batch = TokenBatch(
    np.arange(137, dtype=np.int32), np.zeros(137, np.int32), np.cumsum([0, *lengths]).astype(np.int64)
)

def answer(_=None):
    try:
        return backend.run(batch, Wanted(pooled=True)).pooled.tobytes()
    except BertRTError as error:
        return str(error)

expected = answer()
assert isinstance(expected, bytes)

# A child may work or refuse, and a new engine of its own works; the parent goes on as before.
child = os.fork()
if child == 0:
    found = answer()
    fresh = NativeBackend(folder, threads=2).run(batch, Wanted(pooled=True)).pooled.tobytes()
    os._exit(0 if found == expected and fresh == expected else 1 if isinstance(found, bytes) else 2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, 2)
assert answer() == expected
with multiprocessing.get_context("fork").Pool(2) as pool:
    answers = pool.map(answer, range(4))
assert all(found == expected or isinstance(found, str) for found in answers)
assert len(set(answers)) == 1
assert answer() == expected
print("done", "works" if answers[0] == expected else answers[0])
"""


def test_after_a_fork(demo_engine: Callable[..., Path]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FORKING, str(demo_engine("int8"))], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("done "), result.stdout


def test_threads_that_stay_on_their_processors(
    demo_engine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = EngineFolder.open(demo_engine("int8"), verify=False)
    batch = packed([sequence(length, 0) for length in (64, 9)])
    expected = NativeBackend(folder, threads=2).run(batch, Wanted(pooled=True))
    mine = os.sched_getaffinity(0)
    monkeypatch.setenv("BERTRT_PIN_THREADS", "1")
    assert_same_bits(NativeBackend(folder, threads=2).run(batch, Wanted(pooled=True)), expected)
    # The caller's thread is not the pool's to bind.
    assert os.sched_getaffinity(0) == mine


def test_weights_in_huge_pages(demo_engine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = EngineFolder.open(demo_engine("int8"), verify=False)
    batch = packed([sequence(length, 0) for length in (64, 9)])
    wanted = everything(batch, [3, 70])
    expected = NativeBackend(folder, threads=2).run(batch, wanted)
    monkeypatch.setenv("BERTRT_HUGE_PAGES", "1")
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not switch.exists() or "[never]" in switch.read_text(encoding="ascii"):
        with pytest.raises(BackendUnavailableError, match="huge pages were asked for, but this system has"):
            NativeBackend(folder, threads=2)
        return

    def times_mapped() -> int:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        return maps.count(str(folder.path / "model.bertrt"))

    before = times_mapped()
    backend = NativeBackend(folder, threads=2)
    assert_same_bits(backend.run(batch, wanted), expected)
    assert times_mapped() == before  # a copy, then
    monkeypatch.setenv("BERTRT_HUGE_PAGES", "0")
    other = NativeBackend(folder, threads=2)
    assert_same_bits(other.run(batch, wanted), expected)
    assert times_mapped() == before + 1


@pytest.mark.parametrize("value", ["sse9", "AVX2", "avx2,amx"])
def test_an_instruction_set_that_there_is_not(
    value: str, demo_engine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BERTRT_ISA", value)
    for backend in (None, "native"):
        with pytest.raises(BackendUnavailableError, match=f"BERTRT_ISA.*{value}"):
            Engine.load(demo_engine("int8"), backend=backend)


@pytest.mark.parametrize("data", [b"", b"not a weight file" * 100, b"BERTRTW\0" + bytes(4088)])
def test_a_file_of_something_else(
    data: bytes, demo_engine: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = EngineFolder.open(demo_engine("int8"), verify=False)
    (tmp_path / "other.bertrt").write_bytes(data)
    monkeypatch.setattr(EngineFolder, "file", lambda self, name: tmp_path / "other.bertrt")
    with pytest.raises(WeightFileError, match="cannot load the engine: .*other.bertrt"):
        NativeBackend(folder)


def test_the_demo_answers(demo_engine: Callable[..., Path]) -> None:
    """By default, and as onnxruntime does."""
    text = "He opened the [MASK] and went into the house."
    for precision in ("fp32", "int8"):
        with (
            Engine.load(demo_engine(precision)) as engine,
            Engine.load(demo_engine(precision), backend="onnxruntime") as other,
        ):
            assert engine.backend.name == "native"
            ours, theirs = engine.fill_mask(text), other.fill_mask(text)
            assert [row["token_str"] for row in ours][:3] == [row["token_str"] for row in theirs][:3]
