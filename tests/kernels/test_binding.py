"""The binding ``bertrt._native``: what it takes and gives, what it refuses and with which words."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

native = pytest.importorskip("bertrt._native", reason="the native kernels are not built")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def weights(demo_engine: Callable[..., Path]) -> str:
    return str(demo_engine("int8") / "model.bertrt")


@pytest.fixture(scope="module")
def engine(weights: str) -> Any:
    return native.Engine(weights)


def batch_of(*lengths: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = random.integers(0, 8192, offsets[-1]).astype(np.int32)
    return ids, random.integers(0, 2, offsets[-1]).astype(np.int32), offsets


def test_the_stub_is_the_module_s(tmp_path: Path) -> None:
    pytest.importorskip("nanobind", reason="nanobind's stub generator is not installed")
    stub = tmp_path / "_native.pyi"
    pattern = ROOT / "kernels" / "src" / "python.stub"
    command = [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "bertrt._native", "-p", str(pattern)]
    subprocess.run([*command, "-o", str(stub)], check=True)
    committed = (ROOT / "engine" / "bertrt" / "_native.pyi").read_text(encoding="utf-8")
    assert committed == stub.read_text(encoding="utf-8"), "make it again: make stub"


def test_an_engine_says_what_it_is(engine: Any, weights: str) -> None:
    assert engine.isa == native.active_isa()
    assert 1 <= engine.threads <= (os.cpu_count() or 1)
    assert native.Engine(weights, threads=3).threads == 3
    assert engine.weight_bytes == Path(weights).stat().st_size
    assert engine.architecture == {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "vocab_size": 8192,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": float(np.float32(1e-12)),
        "precision": "int8",
        "mlm": True,
        "nsp": True,
        "pooler": True,
    }


def test_outputs_are_arrays_of_numpy_s_own(engine: Any) -> None:
    batch = batch_of(5, 1, 9)
    positions = np.array([14, 0, 0, 5])
    everything = engine.run(
        *batch,
        mlm_positions=positions,
        mlm_logits=True,
        top_k=3,
        candidates=np.array([[1, 2]] * 4),
        hidden_states=True,
        pooled=True,
        nsp=True,
        layers=True,
    )
    assert {name: (array.shape, str(array.dtype)) for name, array in everything.items()} == {
        "mlm_logits": ((4, 8192), "float32"),
        "mlm_top_ids": ((4, 3), "int64"),
        "mlm_top_log_probs": ((4, 3), "float32"),
        "mlm_candidate_log_probs": ((4, 2), "float32"),
        "hidden_states": ((15, 256), "float32"),
        "pooled": ((3, 256), "float32"),
        "nsp_logits": ((3, 2), "float32"),
        "layers": ((5, 15, 256), "float32"),
    }
    assert all(array.flags.owndata and array.flags.c_contiguous for array in everything.values())
    # A position that is asked for twice is answered twice.
    assert np.array_equal(everything["mlm_logits"][1], everything["mlm_logits"][2])
    assert np.array_equal(everything["layers"][-1], everything["hidden_states"])


def test_every_output_is_the_same_alone(engine: Any) -> None:
    batch = batch_of(40, 3, 64, 17)
    asked = {
        "mlm_logits": {"mlm_positions": np.array([123, 41, 0]), "mlm_logits": True},
        "mlm_top_ids": {"mlm_positions": np.array([123, 41, 0]), "top_k": 9},
        "mlm_candidate_log_probs": {
            "mlm_positions": np.array([123, 41, 0]),
            "candidates": np.array([[5], [6], [7]]),
        },
        "hidden_states": {"hidden_states": True},
        "pooled": {"pooled": True},
        "nsp_logits": {"nsp": True},
        "layers": {"layers": True},
    }
    everything = engine.run(*batch, **{key: value for part in asked.values() for key, value in part.items()})
    for name, part in asked.items():
        assert np.array_equal(engine.run(*batch, **part)[name], everything[name]), name


# Lengths that are computed by one thread each, by the whole team, and by both in turn.
@pytest.mark.parametrize(
    "lengths", [[512] * 3, [1, 512, 7, 33, 128], [100] * 70, [512, 16], [1], [300] * 2 + [3] * 40]
)
def test_sequences_are_answered_alike_however_the_work_is_laid_out(weights: str, lengths: list[int]) -> None:
    ids, segments, offsets = batch_of(*lengths)
    positions = np.random.default_rng(1).integers(0, len(ids), 70)
    wanted = {"mlm_positions": positions, "top_k": 4, "hidden_states": True, "pooled": True, "nsp": True}
    alone = native.Engine(weights, threads=1)
    expected = alone.run(ids, segments, offsets, **wanted)
    for threads in (2, 3, 5):
        found = native.Engine(weights, threads=threads).run(ids, segments, offsets, **wanted)
        for name, array in expected.items():
            assert np.array_equal(found[name], array), (name, threads)
    for i in (0, len(lengths) - 1):
        begin, end = offsets[i], offsets[i + 1]
        one = alone.run(
            ids[begin:end], segments[begin:end], np.array([0, end - begin]), hidden_states=True, nsp=True
        )
        assert np.array_equal(one["hidden_states"], expected["hidden_states"][begin:end])
        assert np.array_equal(one["nsp_logits"][0], expected["nsp_logits"][i])


def test_many_more_positions_than_a_block_of_the_head_has(engine: Any) -> None:
    batch = batch_of(90, 110)
    positions = np.random.default_rng(2).permutation(200)
    together = engine.run(*batch, mlm_positions=positions, mlm_logits=True)["mlm_logits"]
    for index in (0, 63, 64, 199):
        one = engine.run(*batch, mlm_positions=positions[index : index + 1], mlm_logits=True)["mlm_logits"]
        assert np.array_equal(one[0], together[index])


def test_nothing_asked_for_is_nothing_computed(engine: Any) -> None:
    assert engine.run(*batch_of(3)) == {}
    none = np.zeros(0, np.int64)
    found = engine.run(*batch_of(3), mlm_positions=none, mlm_logits=True, top_k=2)
    assert {name: array.shape for name, array in found.items()} == {
        "mlm_logits": (0, 8192),
        "mlm_top_ids": (0, 2),
        "mlm_top_log_probs": (0, 2),
    }


IDS, SEGMENTS, OFFSETS = batch_of(4, 6)


def changed(array: np.ndarray, index: int, value: int) -> np.ndarray:
    copy = array.copy()
    copy[index] = value
    return copy


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            (changed(IDS, 3, 8192), SEGMENTS, OFFSETS),
            {},
            r"input_ids\[3\] is 8192, but must be from 0 to 8191",
        ),
        ((changed(IDS, 9, -1), SEGMENTS, OFFSETS), {}, r"input_ids\[9\] is -1, but must be from 0 to 8191"),
        ((IDS, changed(SEGMENTS, 1, 2), OFFSETS), {}, r"token_type_ids\[1\] is 2, but must be from 0 to 1"),
        ((IDS, SEGMENTS[:9], OFFSETS), {}, "token_type_ids has 9 elements, but input_ids has 10"),
        ((IDS[:0], SEGMENTS[:0], OFFSETS), {}, "tokens is 0, but must be at least 1"),
        ((IDS, SEGMENTS, OFFSETS[:1]), {}, "offsets has 1 elements, but must have at least 2"),
        ((IDS, SEGMENTS, changed(OFFSETS, 0, 1)), {}, r"offsets\[0\] is 1, but must be 0"),
        ((IDS, SEGMENTS, changed(OFFSETS, 1, 0)), {}, r"offsets\[1\] is 0, but must be from 1 .* to 10"),
        ((IDS, SEGMENTS, changed(OFFSETS, 1, 11)), {}, r"offsets\[1\] is 11, but must be from 1 .* to 10"),
        ((IDS, SEGMENTS, changed(OFFSETS, 1, -5)), {}, r"offsets\[1\] is -5"),
        ((IDS, SEGMENTS, changed(OFFSETS, 2, 9)), {}, r"offsets\[2\] is 9, .* the number of tokens, 10"),
        ((IDS, SEGMENTS, changed(OFFSETS, 2, 1 << 62)), {}, r"offsets\[2\] is 4611686018427387904"),
        ((IDS, SEGMENTS, OFFSETS), {"top_k": 1}, "top_k and candidates need mlm_positions"),
        (
            (IDS, SEGMENTS, OFFSETS),
            {"mlm_positions": np.array([0, 10])},
            r"mlm_positions\[1\] is 10, .* 0 to 9",
        ),
        ((IDS, SEGMENTS, OFFSETS), {"mlm_positions": np.array([-1])}, r"mlm_positions\[0\] is -1"),
        (
            (IDS, SEGMENTS, OFFSETS),
            {"mlm_positions": np.array([1]), "top_k": 8193},
            "top_k is 8193, but must be from 0 to .* 8192",
        ),
        ((IDS, SEGMENTS, OFFSETS), {"mlm_positions": np.array([1]), "top_k": -1}, "top_k is -1"),
        (
            (IDS, SEGMENTS, OFFSETS),
            {"mlm_positions": np.array([1]), "candidates": np.array([[7, 8192]])},
            r"candidates\[1\] is 8192, but must be from 0 to 8191",
        ),
        (
            (IDS, SEGMENTS, OFFSETS),
            {"mlm_positions": np.array([1, 2]), "candidates": np.array([[7]])},
            "candidates has 1 rows, but mlm_positions has 2",
        ),
    ],
)
def test_refusals(
    engine: Any, arguments: tuple[np.ndarray, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(native.Error, match=message) as caught:
        engine.run(*arguments, hidden_states=True, **options)
    assert caught.value.code == "invalid_argument"
    assert caught.value.args == (str(caught.value),)


def test_a_sequence_longer_than_the_positions(engine: Any) -> None:
    with pytest.raises(
        native.Error, match=r"sequence 1 \(.*\) has 513 tokens, but the model has 512 positions"
    ):
        engine.run(*batch_of(3, 513), hidden_states=True)


@pytest.mark.parametrize(
    ("wanted", "head"),
    [
        ({"mlm_positions": np.array([0]), "top_k": 1}, "masked-LM"),
        ({"mlm_positions": np.zeros(0, np.int64)}, "masked-LM"),
        ({"pooled": True}, "pooler"),
        ({"nsp": True}, "next-sentence"),
    ],
)
def test_a_head_that_is_not_there(wanted: dict[str, Any], head: str) -> None:
    encoder = native.Engine(str(ROOT / "kernels" / "fuzz" / "seeds" / "bf16-encoder.bertrt"))
    assert not encoder.architecture["mlm"]
    batch = np.zeros(1, np.int32), np.zeros(1, np.int32), np.array([0, 1])
    with pytest.raises(native.Error, match=f"this engine has no {head} head") as caught:
        encoder.run(*batch, **wanted)
    assert caught.value.code == "missing_head"
    assert encoder.run(*batch, hidden_states=True)["hidden_states"].shape == (1, 8)


@pytest.mark.parametrize(
    "arguments",
    [
        (IDS.astype(np.int64), SEGMENTS, OFFSETS),
        (IDS.astype(np.float32), SEGMENTS, OFFSETS),
        (IDS, SEGMENTS, OFFSETS.astype(np.int32)),
        (IDS.reshape(2, 5), SEGMENTS, OFFSETS),
        (np.repeat(IDS, 2)[::2], SEGMENTS, OFFSETS),
        (IDS.tolist(), SEGMENTS, OFFSETS),
        (IDS, SEGMENTS, None),
    ],
)
def test_other_types_are_not_converted(engine: Any, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError):
        engine.run(*arguments, hidden_states=True)


def test_read_only_arrays_will_do(engine: Any) -> None:
    batch = batch_of(4)
    for array in batch:
        array.flags.writeable = False
    assert engine.run(*batch, hidden_states=True)["hidden_states"].shape == (4, 256)


@pytest.mark.parametrize(
    ("path", "options", "code", "message"),
    [
        ("/nowhere/model.bertrt", {}, "not_found", "/nowhere/model.bertrt"),
        (__file__, {}, "bad_file", "weight file"),
        (None, {"threads": -1}, "invalid_argument", "threads is -1, but must be from 1 to 1024, or 0"),
        (None, {"threads": 5000}, "invalid_argument", "threads is 5000"),
    ],
)
def test_what_cannot_be_opened(
    weights: str, path: str | None, options: dict[str, Any], code: str, message: str
) -> None:
    with pytest.raises(native.Error, match=message) as caught:
        native.Engine(path or weights, **options)
    assert caught.value.code == code


def test_the_variable_names_an_instruction_set(monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    usable = [name for name, problem in native.isa_status() if not problem]
    assert native.active_isa() == usable[0]
    for name in usable:
        monkeypatch.setenv("BERTRT_ISA", name)
        assert native.Engine(weights).isa == name
    monkeypatch.setenv("BERTRT_ISA", "")
    assert native.active_isa() == usable[0]
    monkeypatch.setenv("BERTRT_ISA", "mmx")
    with pytest.raises(native.Error, match="BERTRT_ISA=mmx is not the name .*amx, avx512-bf16") as caught:
        native.active_isa()
    assert caught.value.code == "unsupported"
    for name, problem in native.isa_status():
        if problem:
            monkeypatch.setenv("BERTRT_ISA", name)
            with pytest.raises(native.Error, match=f"BERTRT_ISA={name} cannot be used here: .*portable"):
                native.Engine(weights)


@pytest.mark.parametrize("kind", ["int8", "float"])
def test_the_peak_is_a_rate(kind: str) -> None:
    # Any processor of the last ten years does 10^8 operations a second, none does 10^15 on a core.
    assert 1e8 < native.peak(kind, seconds=0.01) < 1e15
    assert 1e8 < native.peak(kind, "portable", 0.01) < 1e15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int4",), "kind is 'int4', but must be 'int8' or 'float'"),
        (("int8", "mmx"), "'mmx' is not the name of an instruction set"),
        (("int8", None, 0.0), "seconds is 0.0"),
    ],
)
def test_peaks_that_there_are_not(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(native.Error, match=message):
        native.peak(*arguments)


def test_other_threads_run_meanwhile(engine: Any) -> None:
    batch = batch_of(*[512] * 60)
    ended = threading.Event()

    def compute() -> None:
        engine.run(*batch, hidden_states=True)
        ended.set()

    thread = threading.Thread(target=compute)
    thread.start()
    turns = 0
    # With the lock held, the first turn would come when the run has ended, however long it takes.
    while not ended.wait(0.001):
        turns += 1
    thread.join()
    assert turns > 3
