"""PyTorch's contestants and the engine's answer as transformers does; here on a CPU, with a mark also on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from bertrt.errors import MeasurementError
from bertrt.tokenization import WordPieceTokenizer
from bertrt_bench.agreement import TOLERANCES, compare
from bertrt_bench.cases import Case, Question, SpecialIds, make_question
from bertrt_bench.contestants import Setup
from bertrt_bench.gpu import budgets, engines, lineup, rivals
from bertrt_bench.gpu.clock import Share
from bertrt_bench.process import ContestantProcess
from bertrt_export.demo import demo_folder

CASES = [
    Case(task="features", batch=3, sequence=16),
    Case(task="next-sentence", batch=3, sequence=16),
    Case.mix("features", [5, 40, 9, 9, 3]),
]


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    special = SpecialIds.of(WordPieceTokenizer.from_folder(demo_folder()))
    return [make_question(case, special=special, vocab_size=8192) for case in CASES]


@pytest.fixture(scope="module")
def expected(questions: list[Question]) -> list[dict[str, np.ndarray]]:
    """What transformers says in float32, each sequence alone."""
    model = transformers.BertForPreTraining.from_pretrained(demo_folder(), dtype=torch.float32).eval()
    answers = []
    for question in questions:
        tokens, states, logits = question.tokens, [], []
        for begin, end in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True):
            ids, segments = (
                torch.from_numpy(values[None, begin:end]).long()
                for values in (tokens.input_ids, tokens.token_type_ids)
            )
            with torch.inference_mode():
                output = model.bert(ids, token_type_ids=segments)
                states.append(output.last_hidden_state[0].numpy())
                logits.append(model.cls.seq_relationship(output.pooler_output).numpy())
        features = question.case.task == "features"
        answers.append(
            {"hidden_states": np.concatenate(states)} if features else {"logits": np.concatenate(logits)}
        )
    return answers


def setup(device: str = "cpu", precision: str = "fp32", engine: str = "") -> Setup:
    return Setup(engine=engine, threads=2, backend=device, reference=str(demo_folder()), precision=precision)


OPENERS = {"eager": rivals.open_eager, "sdpa": rivals.open_sdpa}


def check(contestant: object, precision: str, questions: list[Question], expected: list) -> None:
    for question, other in zip(questions, expected, strict=True):
        run = contestant.prepare(question)
        # Answers are the caller's own: a later one does not change an earlier one.
        first, again = run(), run()
        copies = {name: np.array(array) for name, array in first.items()}
        run()
        for answer in (first, again):
            assert {name: array.dtype for name, array in answer.items()} == dict.fromkeys(other, np.float32)
            assert compare(question.case, precision, answer, other).error <= TOLERANCES[precision]
        for name, array in copies.items():
            np.testing.assert_array_equal(array, first[name])


@pytest.mark.parametrize("attention", sorted(OPENERS))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pytorch_answers_as_transformers_does(
    attention: str, precision: str, questions: list[Question], expected: list
) -> None:
    contestant = OPENERS[attention](setup(precision=precision))
    check(contestant, precision, questions, expected)
    assert contestant.details["attention"] == attention
    assert contestant.details["dtype"] == precision
    assert contestant.details["compiled"] == "no"
    assert contestant.details["features of the mix"].startswith("blocks of ")
    assert contestant.versions == {"torch": torch.__version__}


@pytest.mark.parametrize(
    ("device", "precision"), [("cpu", "fp32"), pytest.param("cuda", "fp16", marks=pytest.mark.gpu)]
)
def test_compiled_pytorch_answers_as_transformers_does(
    tmp_path: Path, questions: list[Question], expected: list, share: Share, device: str, precision: str
) -> None:
    # In a process of its own, as it starts others to compile. It takes a minute on two processors.
    kind = lineup.compiled(precision, device).kind
    with ContestantProcess(kind, setup(device, precision), tmp_path, patience=share) as process:
        for index, (question, other) in enumerate(zip(questions[:2], expected[:2], strict=True)):
            folder = tmp_path / f"question-{index}"
            folder.mkdir()
            question.save(folder)
            process.prepare(index, question.case, folder)
            answer = process.answer(index, question.case, rows=10_000)
            assert compare(question.case, precision, answer, other).error <= TOLERANCES[precision]
            assert len(process.time(index, question.case, warmup=0, runs=2, seconds=0.0)) == 2
        assert process.details["compiled"] == "max-autotune"
        process.abandon()


def test_compiled_pytorch_has_fixed_shapes_only(questions: list[Question]) -> None:
    contestant = rivals.open_compiled(setup())
    assert contestant.details["compiled"] == "max-autotune"
    with pytest.raises(MeasurementError, match="compiled for fixed shapes"):
        contestant.prepare(questions[2])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_engine_answers_as_transformers_does(
    gpu_engine: Callable[[str], Path], precision: str, questions: list[Question], expected: list
) -> None:
    folder = str(gpu_engine(precision))
    contestant = engines.open_engine(setup("onnxruntime:cpu", precision, folder))
    check(contestant, precision, questions, expected)
    assert contestant.details["provider"] == "cpu"
    assert "onnxruntime" in contestant.versions


@pytest.mark.gpu
@pytest.mark.parametrize("attention", sorted(OPENERS))
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_pytorch_on_a_gpu(attention: str, precision: str, questions: list[Question], expected: list) -> None:
    contestant = OPENERS[attention](setup("cuda", precision))
    check(contestant, precision, questions, expected)
    assert "most that its allocator gave out" in contestant.details


def test_what_a_contestant_must_be_told() -> None:
    with pytest.raises(MeasurementError, match="PyTorch needs the folder of a checkpoint"):
        rivals.open_sdpa(Setup(engine="", threads=1, backend="cpu"))
    with pytest.raises(MeasurementError, match="needs to be told its backend"):
        engines.open_engine(Setup(engine="none", threads=1))


def test_no_gpu_for_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MeasurementError, match="sees no GPU; install its build for the CUDA"):
        rivals.open_sdpa(setup("cuda"))


def test_the_fastest_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(budgets.time, "perf_counter", lambda: clock[0])
    # The first run of each warms up; of the others the best counts.
    costs = {256: iter([1.0, 9.0, 5.0]), 1_024: iter([99.0, 4.0, 6.0])}

    def run(budget: int) -> Callable[[], dict[str, np.ndarray]]:
        def spend() -> dict[str, np.ndarray]:
            clock[0] += next(costs[budget])
            return {}

        return spend

    assert budgets.fastest({budget: run(budget) for budget in costs}) == 1_024

    def never() -> dict[str, np.ndarray]:
        raise AssertionError("there is no choice")

    assert budgets.fastest({7: never}) == 7
