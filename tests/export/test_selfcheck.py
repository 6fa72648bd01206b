"""The native kernels' part of the self-check, with kernels that answer as a test wants them to."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import bertrt_export.selfcheck as selfcheck
from bertrt.errors import BackendUnavailableError, ExportError, KernelsNotBuiltError
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.exporter import export_engine

Change = Callable[[dict[str, Any]], None]


class KernelsError(Exception):
    """The binding's exception."""


@pytest.fixture
def export(
    small_bert: Any, save_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """A function that exports a model with PyTorch in the kernels' place; gives what the kernels were asked."""

    def export(
        change: Change = lambda answer: None, *, answering: Any = None, **options: Any
    ) -> list[dict[str, Any]]:
        model = small_bert()
        answering = answering or model
        asked: list[dict[str, Any]] = []

        class Engine:
            def __init__(self, path: str, *, verify: bool) -> None:
                assert Path(path).name == "model.bertrt"
                assert verify

            @torch.inference_mode()
            def run(self, ids: Any, segments: Any, offsets: Any, **wanted: Any) -> dict[str, Any]:
                assert (ids.dtype, segments.dtype, offsets.dtype) == (np.int32, np.int32, np.int64)
                asked.append({"ids": ids, "segments": segments, "offsets": offsets, **wanted})
                parts: list[Any] = []
                for start, end in pairwise(offsets):
                    row = slice(start, end)
                    tensors = (
                        torch.from_numpy(values[row][None].astype(np.int64)) for values in (ids, segments)
                    )
                    row_ids, row_segments = tensors
                    hidden, pooled = answering.bert(row_ids, token_type_ids=row_segments)[:2]
                    logits, relation = answering.cls(hidden, pooled)
                    parts.append((logits[0], hidden[0], pooled, relation))
                names = ("mlm_logits", "hidden_states", "pooled", "nsp_logits")
                answer = {
                    name: torch.cat(values).numpy()
                    for name, values in zip(names, zip(*parts, strict=True), strict=True)
                }
                answer["mlm_logits"] = answer["mlm_logits"][wanted["mlm_positions"]]
                change(answer)
                return answer

        monkeypatch.setattr(
            selfcheck, "load_kernels", lambda: SimpleNamespace(Engine=Engine, Error=KernelsError)
        )
        with open_checkpoint(save_checkpoint(model)) as checkpoint:
            export_engine(checkpoint, tmp_path / "engine", **options)
        return asked

    return export


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_same_answers_pass(precision: str, export: Any) -> None:
    [asked] = export(precision=precision)
    assert asked["offsets"].tolist() == [0, 8, 9]
    assert asked["ids"].shape == asked["segments"].shape == (9,)
    assert asked["hidden_states"]
    assert asked["mlm_logits"]
    assert asked["pooled"]
    assert asked["nsp"]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_another_models_answers_do_not(precision: str, export: Any, small_bert: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"disagree about .* by .*expected of {precision}"):
        export(precision=precision, answering=small_bert(seed=1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["hidden_states", "mlm_logits", "pooled", "nsp_logits"])
def test_each_output_is_compared(output: str, export: Any) -> None:
    def move(answer: dict[str, Any]) -> None:
        answer[output] = answer[output] + 1

    with pytest.raises(ExportError, match=f"disagree about {output} by"):
        export(move, precision="int8")


def test_an_answer_that_is_not_finite(export: Any) -> None:
    def spoil(answer: dict[str, Any]) -> None:
        answer["pooled"][1, 2] = np.nan

    # Where there is no graph to compare with, too.
    with pytest.raises(
        ExportError, match=r"model\.bertrt gives 1 values that are not finite in 'pooled'.*bf16"
    ):
        export(spoil, precision="bf16")


def test_kernels_that_refuse_the_file(export: Any, tmp_path: Path) -> None:
    def refuse(answer: dict[str, Any]) -> None:
        raise KernelsError("the file is corrupt")

    with pytest.raises(ExportError, match=r"native kernels cannot run model\.bertrt: the file is corrupt"):
        export(refuse, precision="bf16")
    assert list(tmp_path.iterdir()) == []


def test_the_kernels_are_not_asked_where_they_have_no_file(export: Any) -> None:
    assert export(precision="fp16") == []
    assert export(precision="int8", backends=["onnxruntime"], overwrite=True) == []


def test_without_kernels(
    small_bert: Any, save_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise KernelsNotBuiltError("the native kernels are not built")

    monkeypatch.setattr(selfcheck, "load_kernels", missing)
    with open_checkpoint(save_checkpoint(small_bert())) as checkpoint:
        export_engine(checkpoint, tmp_path / "engine", precision="bf16")
    assert (tmp_path / "engine" / "model.bertrt").is_file()


def test_kernels_that_do_not_load(
    small_bert: Any, save_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise BackendUnavailableError("the native kernels are built but do not load")

    monkeypatch.setattr(selfcheck, "load_kernels", broken)
    with (
        open_checkpoint(save_checkpoint(small_bert())) as checkpoint,
        pytest.raises(ExportError, match="cannot check the engine: .* built but do not load"),
    ):
        export_engine(checkpoint, tmp_path / "engine", precision="bf16")
    assert list(tmp_path.iterdir()) == []
