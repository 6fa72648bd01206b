"""What is measured: options, cases, and whether answers are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bertrt.backends.base import TokenBatch
from bertrt.errors import AnswersDisagreeError, InputError, MeasurementError
from bertrt_bench.agreement import TOLERANCES
from bertrt_bench.cases import Case, Question
from bertrt_bench.gpu.judge import Judge
from bertrt_bench.gpu.options import FULL, GpuOptions
from bertrt_bench.gpu.subject import open_subject
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.demo import demo_folder, evaluation_text

CASE = Case(task="features", batch=2, sequence=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "tpu"}, "device must be one of cuda, cpu, got 'tpu'"),
        ({"minutes": 0}, "minutes must be a number above 0"),
        ({"minutes": float("nan")}, "minutes must be a number above 0"),
        ({"minutes": 1e6}, "at most 1440"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"only": ("torch", "")}, "an empty word"),
        ({"text": Path("absent")}, "--text 'absent' is no file"),
        ({"lengths_from": Path("absent")}, "--lengths-from 'absent' is no file"),
    ],
)
def test_options_out_of_range(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GpuOptions(out=Path("out"), **changes)


def test_which_checkpoint() -> None:
    full, rehearsal = (GpuOptions(out=Path("out"), device=device) for device in ("cuda", "cpu"))
    # Random weights have a speed, but no answers to lose.
    assert (full.speed_source, full.drift_source) == (("bert-base-cased", True), "demo")
    assert (rehearsal.speed_source, rehearsal.drift_source) == (("demo", False), "demo")
    named = GpuOptions(out=Path("out"), checkpoint="mine")
    assert (named.speed_source, named.drift_source) == (("mine", False), "mine")


def test_the_cases_of_a_gpu_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Random weights of the smallest model there is, as the real ones take seconds.
    architecture, _ = monkeypatched_random(monkeypatch)
    subject = open_subject(GpuOptions(out=tmp_path / "out"), tmp_path)
    assert (subject.checkpoint, subject.random, subject.architecture) == (
        "bert-base-cased",
        True,
        architecture,
    )
    shapes = {(case.batch, case.sequence) for case in subject.cases if case.lengths is None}
    assert shapes == set(FULL.shapes) == {(1, 128), (8, 128), (32, 128), (1, 384), (32, 384)}
    assert {case.task for case in subject.cases} == {"features", "next-sentence"}
    # The weights lie in a folder for PyTorch, and are those that jobs draw again from the seed.
    with (
        open_checkpoint(subject.weights) as written,
        open_checkpoint("bert-base-cased", random=True) as drawn,
    ):
        for name in drawn.tensor_names:
            np.testing.assert_array_equal(written.tensor(name), drawn.tensor(name))
    # Lengths are counted with a real vocabulary.
    with open_checkpoint("demo") as demo:
        first = evaluation_text().read_text(encoding="utf-8").splitlines()[0]
        ((encoded,),) = demo.tokenizer.encode([first], max_length=512)
    assert subject.lengths.tokens[0] == encoded.input_ids.shape[0]
    for case, folder in zip(subject.cases, subject.questions, strict=True):
        assert isinstance(Question.load(folder, case).tokens, TokenBatch)


def monkeypatched_random(monkeypatch: pytest.MonkeyPatch) -> tuple:
    from dataclasses import replace

    from bertrt_export.checkpoints import opening, random_weights

    architecture, tokenizer = random_weights.random_model("bert-base-cased")
    small = replace(
        architecture, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8
    )
    monkeypatch.setattr(opening, "random_model", lambda name: (small, tokenizer))
    return small, tokenizer


def test_a_model_that_is_too_short_or_lacks_a_head(small_bert, save_checkpoint, tmp_path: Path) -> None:
    model = small_bert().bert
    folder = save_checkpoint(model)
    subject = open_subject(GpuOptions(out=tmp_path / "out", checkpoint=str(folder)), tmp_path)
    assert subject.checkpoint == str(subject.weights) == str(folder.absolute())
    assert {case.task for case in subject.cases} == {"features"}
    assert all(case.lengths is not None for case in subject.cases)
    assert subject.left_out["features at 1x128"] == "the model has 50 positions"
    assert subject.left_out["next-sentence at 32x384"] == "the checkpoint has no next-sentence head"
    assert subject.to_json()["mix"]["most"] == 50


@pytest.fixture
def judge() -> Judge:
    with open_checkpoint(demo_folder()) as checkpoint:
        return Judge(architecture=checkpoint.architecture)


def answer(noise: float) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    states = random.standard_normal((8, 256))
    return {"hidden_states": (states + noise * random.standard_normal((8, 256))).astype(np.float32)}


def test_the_first_answer_is_the_measure(judge: Judge) -> None:
    assert judge.check("first", "fp32", CASE, answer(0)) == {"reference": "first"}
    found = judge.check("second", "fp16", CASE, answer(0.01))
    assert (found["reference"], found["tolerance"]) == ("first", TOLERANCES["fp16"])
    # The noise is relative to what deviates from the mean token, of 8: sqrt(7/8) of all.
    assert found["error"] == pytest.approx(0.01 / (7 / 8) ** 0.5, rel=0.05)
    with pytest.raises(
        AnswersDisagreeError, match="third and first disagree .* tolerance 0.001; it is not timed"
    ):
        judge.check("third", "fp32", CASE, answer(0.01))
    # fp8 is as coarse as int8, and a coarse measure is coarse for all.
    assert judge.check("fourth", "fp8", CASE, answer(0.1))["tolerance"] == TOLERANCES["int8"]
    other = Case(task="features", batch=4, sequence=2)
    judge.check("fourth", "fp8", other, answer(0.1))
    assert judge.check("first", "fp32", other, answer(0))["tolerance"] == TOLERANCES["int8"]


def test_an_answer_that_is_none(judge: Judge) -> None:
    with pytest.raises(MeasurementError, match="'hidden_states' missing"):
        judge.check("first", "fp32", CASE, {})
    # Nor does it become the measure.
    assert judge.check("second", "fp32", CASE, answer(0)) == {"reference": "second"}
    spoiled = answer(0)
    spoiled["hidden_states"][3, 5] = np.nan
    with pytest.raises(AnswersDisagreeError, match="NaN or infinite"):
        judge.check("third", "fp32", CASE, spoiled)
