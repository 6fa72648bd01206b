"""The native backend's side of the border: what it asks of the kernels, and what their failures become.

The kernels here are not ours but a stand-in that fails as it is told (`conftest.kernels`); what they compute is
tested in ``test_native_backend.py``.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from bertrt.backends.base import BatchOutput, TokenBatch, Wanted
from bertrt.backends.native import NativeBackend, instruction_sets
from bertrt.errors import (
    BackendRunError,
    BackendUnavailableError,
    BertRTError,
    EngineClosedError,
    EngineFolderError,
    InputError,
    ManifestError,
    MissingFileError,
    MissingHeadError,
    SequenceTooLongError,
    ShapeMismatchError,
    WeightFileError,
)
from bertrt.folder import MANIFEST_NAME, EngineFolder

CODES = {
    "invalid_argument": InputError,
    "not_found": MissingFileError,
    "bad_file": WeightFileError,
    "missing_head": MissingHeadError,
    "unsupported": BackendUnavailableError,
    "out_of_memory": BackendRunError,
    "system": BackendRunError,
    "of a later release": BackendRunError,
}


@pytest.fixture
def folder(demo_engine: Callable[..., Path]) -> EngineFolder:
    return EngineFolder.open(demo_engine("int8"), verify=False)


@pytest.fixture
def backend(folder: EngineFolder, kernels: ModuleType) -> NativeBackend:
    return NativeBackend(folder, threads=2)


def batch_of(*lengths: int) -> TokenBatch:
    tokens = sum(lengths)
    return TokenBatch(
        input_ids=np.arange(5, 5 + tokens, dtype=np.int32),
        token_type_ids=np.zeros(tokens, np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def test_how_the_weights_are_opened(
    folder: EngineFolder, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bertrt.backends.native.usable_cpus", lambda: 3)
    for value, on in ((None, False), ("", False), ("0", False), ("1", True)):
        if value is not None:
            monkeypatch.setenv("BERTRT_PIN_THREADS", value)
            monkeypatch.setenv("BERTRT_HUGE_PAGES", value)
        backend = NativeBackend(folder)
        assert (backend.name, backend.threads, backend.pads, backend.isa) == ("native", 3, False, "quick")
        weights = str(folder.path / "model.bertrt")
        # The folder compares the SHA-256 of the whole file, so the checksums inside it need not be.
        assert kernels.engines[-1].opened == {
            "path": weights,
            "threads": 3,
            "pin": on,
            "verify": False,
            "huge": on,
        }


@pytest.mark.parametrize("variable", ["BERTRT_PIN_THREADS", "BERTRT_HUGE_PAGES"])
@pytest.mark.parametrize("value", ["yes", "2", " 1", "on"])
def test_a_variable_that_is_neither_0_nor_1(
    value: str, variable: str, folder: EngineFolder, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=rf"{variable} must be 0 or 1, got '{value}'"):
        NativeBackend(folder)
    assert kernels.engines == []


def test_what_is_asked_of_the_kernels(backend: NativeBackend, kernels: ModuleType) -> None:
    batch = batch_of(4, 2)
    positions = np.array([5, 0, 5], np.int64)
    candidates = np.array([[1, 2], [3, 4], [5, 6]], np.int64)
    asked: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"hidden_states": True}, {"hidden_states": True}),
        ({"pooled": True, "nsp": True}, {"pooled": True, "nsp": True}),
        (
            {"mlm_positions": positions, "mlm_top_k": 3},
            {"mlm_positions": positions, "mlm_logits": False, "top_k": 3},
        ),
        (
            {"mlm_positions": positions, "mlm_logits": True, "mlm_candidates": candidates},
            {"mlm_positions": positions, "mlm_logits": True, "top_k": 0, "candidates": candidates},
        ),
    ]
    for wanted, expected in asked:
        backend.run(batch, Wanted(**wanted))
        arrays, options = kernels.runs[-1]
        for given, array in zip(arrays, (batch.input_ids, batch.token_type_ids, batch.offsets), strict=True):
            assert given.dtype == array.dtype
            np.testing.assert_array_equal(given, array)
        assert options.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(options[name], value)


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(mlm_positions=np.array([1]))])
def test_what_nobody_wants_is_not_computed(
    wanted: Wanted, backend: NativeBackend, kernels: ModuleType
) -> None:
    assert backend.run(batch_of(3), wanted) == BatchOutput()
    assert kernels.runs == []


def test_views_with_gaps_are_copied(backend: NativeBackend, kernels: ModuleType) -> None:
    wide = np.arange(12, dtype=np.int32)
    offsets = np.array([0, 9, 4, 9, 6], np.int64)[::2]
    assert not offsets.flags.c_contiguous
    batch = TokenBatch(wide[::2], np.zeros(12, np.int32)[::2], offsets)
    columns = np.asfortranarray(np.array([[1, 2], [3, 4]], np.int64))
    wanted = Wanted(mlm_positions=np.array([1, 7, 2], np.int64)[::2], mlm_candidates=columns)
    backend.run(batch, wanted)
    arrays, options = kernels.runs[-1]
    for given in (*arrays, options["mlm_positions"], options["candidates"]):
        assert given.flags.c_contiguous
    assert arrays[0].tolist() == [0, 2, 4, 6, 8, 10]
    assert options["candidates"].tolist() == [[1, 2], [3, 4]]


def test_answers_come_back_as_they_are(backend: NativeBackend, kernels: ModuleType) -> None:
    pooled = np.ones((1, 256), np.float32)
    kernels.answers = {"pooled": pooled}
    output = backend.run(batch_of(3), Wanted(pooled=True))
    assert output.pooled is pooled
    assert output.nsp_logits is None


def test_layers(backend: NativeBackend, kernels: ModuleType) -> None:
    kernels.answers = {"layers": np.ones((5, 3, 256), np.float32)}
    assert backend.run_layers(batch_of(3)).shape == (5, 3, 256)
    assert kernels.runs[-1][1] == {"layers": True}
    with pytest.raises(SequenceTooLongError):
        backend.run_layers(batch_of(513))


@pytest.mark.parametrize(("code", "expected"), CODES.items())
def test_failures_have_names(
    code: str,
    expected: type[BertRTError],
    backend: NativeBackend,
    folder: EngineFolder,
    kernels: ModuleType,
) -> None:
    kernels.fails_to_run = kernels.Error("token 3 is in the way", code)
    with pytest.raises(
        expected, match="failed on a batch .sequences: 2, tokens: 7.: token 3 is in the way"
    ) as run:
        backend.run(batch_of(3, 4), Wanted(pooled=True))
    assert type(run.value) is expected
    assert run.value.__cause__ is kernels.fails_to_run
    kernels.fails_to_load = kernels.Error("byte 9 is wrong", code)
    with pytest.raises(expected, match="cannot load the engine: byte 9 is wrong") as load:
        NativeBackend(folder)
    assert type(load.value) is expected
    assert issubclass(WeightFileError, EngineFolderError)


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("not_found", "; copy the folder again or export it anew"),
        ("out_of_memory", "; ask for less at once (token_budget), or run where there is more memory"),
        ("bad_file", ""),
        ("system", ""),
    ],
)
def test_the_advice_is_that_of_the_code(
    code: str, advice: str, folder: EngineFolder, kernels: ModuleType
) -> None:
    # A name may have any character.
    kernels.fails_to_load = kernels.Error("'a;b/model.bertrt' is in the way", code)
    with pytest.raises(BertRTError) as caught:
        NativeBackend(folder)
    assert str(caught.value).endswith(f": 'a;b/model.bertrt' is in the way{advice}")


def test_memory_that_cannot_be_had(backend: NativeBackend, folder: EngineFolder, kernels: ModuleType) -> None:
    """The answers' arrays are made before the kernels run, and fail in their own way."""
    kernels.fails_to_run = MemoryError()
    with pytest.raises(BackendRunError, match="sequences: 1, tokens: 3.: not enough memory; ask for less"):
        backend.run(batch_of(3), Wanted(pooled=True))
    kernels.fails_to_load = MemoryError()
    with pytest.raises(BackendRunError, match="cannot load the engine: not enough memory"):
        NativeBackend(folder)


def test_requests_are_checked_before_the_kernels_see_them(
    backend: NativeBackend, kernels: ModuleType
) -> None:
    batch = batch_of(3)
    batch.input_ids[1] = -1
    with pytest.raises(InputError, match="input_ids must be from 0"):
        backend.run(batch, Wanted(pooled=True))
    with pytest.raises(InputError, match="mlm_positions must be from 0 to 2"):
        backend.run(batch_of(3), Wanted(mlm_positions=np.array([3]), mlm_top_k=1))
    assert kernels.runs == []


def test_closed(backend: NativeBackend) -> None:
    backend.close()
    backend.close()
    for wanted in (Wanted(), Wanted(pooled=True)):
        with pytest.raises(EngineClosedError, match="load it again"):
            backend.run(batch_of(3), wanted)
    with pytest.raises(EngineClosedError, match="load it again"):
        backend.run_layers(batch_of(3))


def test_a_run_under_way_outlives_close(backend: NativeBackend, kernels: ModuleType) -> None:
    started, closed = threading.Event(), threading.Event()

    def wait(self: Any, *arrays: Any, **options: Any) -> dict[str, Any]:
        started.set()
        assert closed.wait(60)
        return {"pooled": np.zeros((1, 256), np.float32)}

    kernels.Engine.run = wait
    outputs: list[BatchOutput] = []
    runner = threading.Thread(target=lambda: outputs.append(backend.run(batch_of(3), Wanted(pooled=True))))
    runner.start()
    assert started.wait(60)
    backend.close()
    closed.set()
    runner.join(60)
    assert outputs
    assert outputs[0].pooled is not None


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("hidden_size", 128),
        ("vocab_size", 8000),
        ("num_attention_heads", 8),
        ("hidden_act", "relu"),
        ("layer_norm_eps", 1e-5),
        ("precision", "bf16"),
        ("mlm", False),
        ("nsp", False),
        ("pooler", False),
    ],
)
def test_weights_of_another_model(
    name: str, other: object, folder: EngineFolder, kernels: ModuleType
) -> None:
    kernels.architecture = {name: other}
    with pytest.raises(ShapeMismatchError, match=f"written for {name} {other}, the manifest says"):
        NativeBackend(folder)


def test_a_manifest_without_the_weights(
    demo_engine: Callable[..., Path], tmp_path: Path, kernels: ModuleType
) -> None:
    path = Path(shutil.copytree(demo_engine("int8"), tmp_path / "engine")) / MANIFEST_NAME
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["backends"]["native"] = {}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ManifestError, match="backend 'native' names no 'weights'"):
        NativeBackend(EngineFolder.open(path.parent))


def test_instruction_sets(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> list[tuple[str, bool, str]]:
        return [(isa.name, isa.active, isa.reason) for isa in instruction_sets()]

    lacking = ("huge", False, "the processor lacks it")
    assert found() == [lacking, ("quick", True, ""), ("plain", False, "")]
    monkeypatch.setenv("BERTRT_ISA", "plain")
    assert found() == [lacking, ("quick", False, ""), ("plain", True, "")]
    monkeypatch.setenv("BERTRT_ISA", "huge")
    assert found() == [lacking, ("quick", False, ""), ("plain", False, "")]
