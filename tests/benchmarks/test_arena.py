"""Contestants brought together: the same questions, answers compared, processes that end."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bertrt.errors import AnswersDisagreeError, InputError, MeasurementError
from bertrt.folder import EngineFolder
from bertrt_bench import agreement
from bertrt_bench.arena import Arena
from bertrt_bench.cases import Case

CASES = [Case(task=task, batch=2, sequence=6) for task in ("features", "fill-mask", "next-sentence")]


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders go, so that one that is left is found."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def arena(fakes, demo_engine: Callable[..., Path]) -> Callable[..., Arena]:
    """A function that makes the arena of fakes, the engine's first."""

    def make(
        *names: str, precision: str = "fp32", cases: list[Case] | None = None, **options: object
    ) -> Arena:
        engine, *rivals = [fakes.kind(name) for name in names]
        folder = EngineFolder.open(demo_engine(precision))
        return Arena(folder, cases or CASES, engine=engine, rivals=rivals, threads=1, timeout=60.0, **options)

    return make


def asked(fakes, name: str) -> list[str]:
    return [event.what for event in fakes.events() if event.name == name and event.what.startswith("ids:")]


def test_all_get_the_same_questions_and_end(arena, fakes, scratch: Path, alive) -> None:
    with arena("a", "b") as entered:
        assert [process.kind.name for process in entered.contestants] == ["a", "b"]
        assert all(process.usable for process in entered.contestants)
        for case in CASES:
            (check,) = entered.check(case)
            assert (check.rival, check.agreement.error) == ("b", 0.0)
        times = entered.turn(entered.contestants[1], CASES[0], warmup=0, runs=3, seconds=0.0)
        assert len(times) == 3
        assert entered.peak() is None
    assert asked(fakes, "a") == asked(fakes, "b")
    assert len(asked(fakes, "a")) == len(CASES)
    assert not any(map(alive, fakes.pids()))
    assert list(scratch.iterdir()) == []


def test_another_seed_asks_other_questions(arena, fakes) -> None:
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        with arena(name, seed=seed):
            pass
    assert asked(fakes, "a") == asked(fakes, "b") != asked(fakes, "c")


@pytest.mark.parametrize(("engine", "tolerance"), [("fp32", "fp32"), ("int8", "int8")])
def test_the_coarser_precision_sets_the_tolerance(arena, engine: str, tolerance: str) -> None:
    # A rival that names no precision computes in float32.
    with arena("a", "b", precision=engine) as entered:
        (check,) = entered.check(CASES[0])
    assert check.agreement.tolerance == agreement.TOLERANCES[tolerance]


def test_who_is_compared_is_who_answered(arena) -> None:
    with (
        arena("a", "b", "wrong") as entered,
        pytest.raises(AnswersDisagreeError, match="engine and wrong disagree"),
    ):
        entered.check(CASES[0])


def test_large_answers_are_compared_in_part(arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_LARGEST_ARRAY", 256 * 5)
    with arena("a", "b") as entered:
        answers = []
        check_answer = agreement.check_answer
        monkeypatch.setattr(
            agreement,
            "check_answer",
            lambda name, case, answer, shapes: (
                answers.append(answer) or check_answer(name, case, answer, shapes)
            ),
        )
        entered.check(CASES[0])
    # Five of twelve tokens.
    assert [answer["hidden_states"].shape for answer in answers] == [(5, 256)] * 2


def test_one_that_cannot_start_ends_all(arena, fakes, scratch: Path, alive) -> None:
    with pytest.raises(MeasurementError, match="there is no contestant 'bench_fakes:open_nobody'"):
        arena("a", "nobody").__enter__()
    assert len(fakes.pids()) == 1
    assert not any(map(alive, fakes.pids()))
    assert list(scratch.iterdir()) == []


def test_a_reference_that_nobody_needs(arena, fakes) -> None:
    with pytest.raises(InputError, match="of use only to a rival that needs it"):
        arena("a", "b", reference="demo").__enter__()
    assert fakes.events() == []
