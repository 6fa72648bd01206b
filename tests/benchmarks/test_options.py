"""Arguments that make no benchmark are refused before anything starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bertrt.architecture import BertArchitecture
from bertrt.errors import InputError, MeasurementError, MissingHeadError
from bertrt.machine import usable_cpus
from bertrt.manifest import Heads, Manifest, Source
from bertrt_bench.cases import Case
from bertrt_bench.contestants import RIVALS, ContestantKind
from bertrt_bench.options import BenchOptions, check_fits, parse_numbers

MANIFEST = Manifest(
    source=Source(kind="random", name="bert-base-cased", seed=0),
    architecture=BertArchitecture(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        vocab_size=28996,
        max_position_embeddings=512,
        type_vocab_size=2,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
    ),
    precision="int8",
    dialect="ort",
    heads=Heads(mlm=True, nsp=True, pooler=True),
    backends={},
    files={},
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ()}, "tasks must hold at least one value"),
        ({"tasks": ("features", "features")}, "each once"),
        ({"tasks": ("score",)}, "no task 'score'; choose from features, fill-mask"),
        ({"batches": ()}, "batches must hold at least one value"),
        ({"batches": (0,)}, "batch must be a whole number of at least 1, got 0"),
        ({"batches": (1, 1)}, "each once"),
        ({"batches": (1.5,)}, "batch must be a whole number"),
        ({"batches": (True,)}, "batch must be a whole number"),
        ({"sequences": (-3,)}, "sequence must be a whole number"),
        ({"batches": (), "lengths_from": "book", "sequences": (8,)}, "batches must hold at least one value"),
        ({"sequences": ()}, "sequences must hold at least one value"),
        ({"paragraphs": 0}, "paragraphs must be a whole number of at least 1"),
        ({"warmup": -1}, "warmup must be a whole number of at least 0"),
        ({"rounds": 0}, "rounds must be a whole number of at least 1"),
        ({"repeats": 0}, "repeats must be a whole number of at least 1"),
        ({"seed": -1}, "seed must be"),
        ({"seconds": 0.0}, "seconds must be a positive number"),
        ({"seconds": float("nan")}, "seconds must be a positive number"),
        ({"timeout": float("inf")}, "timeout must be a positive number"),
        ({"threads": 0}, "threads must be a whole number of at least 1"),
        ({"threads": 100_000}, "this process may use .* CPUs; more threads than CPUs measure the scheduler"),
        ({"against": ("torch", "torch")}, "each rival takes part once, got torch, torch"),
    ],
)
def test_options_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BenchOptions(engine="demo", **changes)


def test_threads_are_by_default_the_cpus() -> None:
    assert BenchOptions(engine="demo").thread_count == usable_cpus()
    assert BenchOptions(engine="demo", threads=1).thread_count == 1


def test_cases_are_all_the_combinations() -> None:
    options = BenchOptions(engine="demo", tasks=("features", "fill-mask"), batches=(1, 2), sequences=(8,))
    assert [str(case) for case in options.cases()] == [
        "features at 1x8",
        "features at 2x8",
        "fill-mask at 1x8",
        "fill-mask at 2x8",
    ]


def test_a_mix_is_one_more_case_of_each_task() -> None:
    options = BenchOptions(
        engine="demo", tasks=("features", "next-sentence"), batches=(2,), sequences=(8,), lengths_from="book"
    )
    cases = options.cases([9, 3, 40])
    assert [str(case) for case in cases] == [
        "features at 2x8",
        "features at 3 lengths of 3 to 40",
        "next-sentence at 2x8",
        # Three tokens are no pair.
        "next-sentence at 2 lengths of 9 to 40",
    ]
    assert options.case_count == len(cases)
    with pytest.raises(InputError, match="no paragraph has the 5 tokens that next-sentence needs"):
        options.cases([4, 3])


def test_a_mix_alone() -> None:
    options = BenchOptions(engine="demo", batches=(), sequences=(), lengths_from="book")
    assert options.case_count == 1
    assert options.cases([7, 8]) == [Case.mix("features", [7, 8])]


@pytest.mark.parametrize(
    ("repeats", "rounds", "expected"), [(10, 5, [2] * 5), (7, 3, [3, 2, 2]), (2, 5, [1, 1]), (1, 1, [1])]
)
def test_repeats_are_spread_over_the_rounds(repeats: int, rounds: int, expected: list[int]) -> None:
    options = BenchOptions(engine="demo", repeats=repeats, rounds=rounds)
    assert [options.runs_of_round(number) for number in range(options.round_count)] == [
        (runs, 0.0) for runs in expected
    ]


def test_seconds_are_spread_over_the_rounds() -> None:
    options = BenchOptions(engine="demo", seconds=3.0, rounds=4)
    assert [options.runs_of_round(number) for number in range(options.round_count)] == [(1, 0.75)] * 4


def test_rivals_that_there_are_not() -> None:
    with pytest.raises(InputError, match="no rival 'tensorflow'; choose from onnxruntime, openvino, torch"):
        BenchOptions(engine="demo", against=("tensorflow",)).kinds()


def test_a_rival_that_is_not_installed_names_the_command() -> None:
    kind = ContestantKind(
        name="abacus",
        description="",
        factory="abacus:open",
        modules=("json", "abacus_runtime"),
        install='pip install "bertrt[abacus]"',
    )
    with pytest.raises(
        MeasurementError,
        match=r"cannot measure 'abacus': abacus_runtime not installed; "
        r'install with: pip install "bertrt\[abacus\]"',
    ):
        BenchOptions(engine="demo", against=("abacus",)).kinds({**RIVALS, "abacus": kind})


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            Case(task="features", batch=1, sequence=513),
            "513 tokens does not fit: the model has 512 positions",
        ),
        (Case(task="features", batch=1, sequence=2), "2 tokens is too short for features"),
        (Case(task="next-sentence", batch=1, sequence=4), "needs at least 5"),
        (Case(task="features", batch=1024, sequence=512), "has 524288 tokens, the limit is 262144"),
        (Case(task="mlm-all", batch=64, sequence=512), r"makes 3\.8 GB of logits .* limit is 1\.1 GB"),
        (Case(task="fill-mask-text", batch=64, sequence=512), r"makes 3\.8 GB of logits"),
        (Case.mix("mlm-all", [512] * 64), r"makes 3\.8 GB of logits"),
        (Case.mix("features", [8, 513]), "513 tokens does not fit"),
    ],
)
def test_cases_that_do_not_fit(case: Case, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_fits([case], MANIFEST)


def test_cases_that_just_fit() -> None:
    check_fits(
        [
            Case(task="features", batch=512, sequence=512),
            Case(task="mlm-all", batch=1, sequence=3),
            # Block by block.
            Case.mix("fill-mask", [512] * 64),
        ],
        MANIFEST,
    )


@pytest.mark.parametrize(
    ("task", "heads", "name"),
    [
        ("fill-mask", Heads(mlm=False, nsp=True, pooler=True), "masked-LM"),
        ("mlm-all", Heads(mlm=False, nsp=True, pooler=True), "masked-LM"),
        ("fill-mask-text", Heads(mlm=False, nsp=True, pooler=True), "masked-LM"),
        ("next-sentence", Heads(mlm=True, nsp=False, pooler=True), "next-sentence"),
    ],
)
def test_tasks_whose_head_is_missing(task: str, heads: Heads, name: str) -> None:
    manifest = replace(MANIFEST, heads=heads)
    check_fits([Case(task="features", batch=1, sequence=8)], manifest)
    with pytest.raises(MissingHeadError, match=f"task {task} needs the {name} head"):
        check_fits([Case(task=task, batch=1, sequence=8)], manifest)


@pytest.mark.parametrize("text", ["", "1,", "a", "1;8", "1.5"])
def test_lists_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="--batch must be whole numbers with commas between them"):
        parse_numbers("batch", text)


def test_lists() -> None:
    assert parse_numbers("batch", "1,8, 64") == (1, 8, 64)
