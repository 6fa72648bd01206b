"""Whole benchmarks: fakes in turns, and the demo engine beside PyTorch."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bertrt.errors import AnswersDisagreeError, InputError, MeasurementError
from bertrt.folder import EngineFolder
from bertrt.manifest import Source
from bertrt_bench.agreement import TOLERANCES
from bertrt_bench.cases import TASKS
from bertrt_bench.environment import recorded_environment
from bertrt_bench.measure import count_steps, measure
from bertrt_bench.options import BenchOptions
from bertrt_bench.reference import reference_folder
from bertrt_bench.work import encoder_operations

SMALL = {
    "batches": (2,),
    "sequences": (6,),
    "threads": 1,
    "warmup": 1,
    "repeats": 4,
    "rounds": 2,
    "timeout": 120.0,
}


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders go, so that one that is left is found."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_contestants_take_turns(fakes, demo_engine, scratch: Path, alive) -> None:
    options = BenchOptions(
        engine=str(demo_engine()), **{**SMALL, "sequences": (6, 9)}, against=("b", "c"), tasks=("features",)
    )
    steps = []
    report = measure(
        options,
        engine=fakes.kind("a"),
        registry={name: fakes.kind(name) for name in "bc"},
        on_step=lambda: steps.append(None),
    )
    assert len(steps) == count_steps(options) == 2 * (1 + 2 * 3)
    # Strictly one after the other: the clock is the same for all processes, and each run ends before the next begins.
    logged = sorted(
        (event for event in fakes.events() if event.what.startswith(("run", "end"))),
        key=lambda event: event.at,
    )
    events, ends = logged[::2], logged[1::2]
    assert {event.what for event in ends} == {"end"}
    assert [event.pid for event in events] == [event.pid for event in ends]
    assert all(event.what.startswith("run") for event in events)
    runs = itertools.groupby(events, key=lambda event: (event.name, event.what))
    order = [(name, len(list(group))) for (name, _), group in runs]
    # All answer both cases once; then in each of two rounds, for both cases, each runs once to warm up and
    # twice timed; the second round has another order.
    rounds = [("a", 3), ("b", 3), ("c", 3)] * 2, [("c", 3), ("b", 3), ("a", 3)] * 2
    assert order == [("a", 1), ("b", 1), ("c", 1)] * 2 + rounds[0] + rounds[1]
    shapes = [what.rpartition(":")[2] for what, _ in itertools.groupby(event.what for event in events[6:])]
    assert shapes == ["6", "9", "6", "9"]
    assert len(fakes.pids()) == 3
    for result in report.results:
        assert set(result.timings) == {"a", "b", "c"}
        assert {timings.runs for timings in result.timings.values()} == {4}
        assert {len(timings.round_p50_ms) for timings in result.timings.values()} == {2}
        assert set(result.comparisons) == {"b", "c"}
        assert {comparison.agreement.error for comparison in result.comparisons.values()} == {0.0}
    assert not any(map(alive, fakes.pids()))
    assert list(scratch.iterdir()) == []


def test_the_share_of_the_peak(fakes, demo_engine, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("no one\nthe man and the old woman\n", encoding="utf-8")
    options = BenchOptions(
        engine=str(demo_engine()),
        **{**SMALL, "threads": 2},
        lengths_from=str(book),
        tasks=("features", "next-sentence"),
        against=("b",),
    )
    report = measure(options, engine=fakes.kind("peaked"), registry={"b": fakes.kind("b")})
    # Before and after the turns, and of the engine alone.
    events = [event for event in fakes.events() if event.what.startswith(("run", "peak"))]
    turns = [number for number, event in enumerate(events) if event.what == "peak"]
    checks = 2 * len(report.results)
    assert turns == [checks, len(events) - 1]
    assert report.peak == 1e9
    architecture = EngineFolder.open(demo_engine()).manifest.architecture
    for result in report.results:
        if result.case.task == "features":
            rate = encoder_operations(result.case, architecture) / (result.timings["peaked"].p50_ms / 1e3)
            assert result.share_of_peak == pytest.approx(rate / (2 * 1e9))
        else:
            assert result.share_of_peak is None
    text = report.to_text()
    assert "of peak" in text
    assert "peak: 0.00 T operations/s on one core" in text
    assert json.loads(report.to_json_text())["peak_operations_per_second"] == 1e9


def test_text_is_held_against_the_features_of_the_same_text(fakes, demo_engine) -> None:
    options = BenchOptions(
        engine=str(demo_engine()), **{**SMALL, "sequences": (6, 9)}, tasks=("fill-mask-text", "features")
    )
    report = measure(options, engine=fakes.kind("a"))
    text, features = report.results[:2], report.results[2:]
    for one, other in zip(text, features, strict=True):
        ratio = one.timings["a"].p50_ms / other.timings["a"].p50_ms
        assert one.over_features.median == pytest.approx(ratio)
        assert other.over_features is None
    # The fakes say which ids they were given.
    sums = {event.what.partition(":")[2] for event in fakes.events() if event.what.startswith("ids")}
    assert len(sums) == 2
    assert "fill-mask-text at 2x9: " in report.to_text()
    alone = measure(
        BenchOptions(engine=str(demo_engine()), **SMALL, tasks=("fill-mask-text",)), engine=fakes.kind("a")
    )
    assert alone.results[0].over_features is None


def test_no_warmup_means_none(fakes, demo_engine) -> None:
    options = BenchOptions(engine=str(demo_engine()), **{**SMALL, "warmup": 0}, tasks=("features",))
    measure(options, engine=fakes.kind("a"))
    assert sum(event.what.startswith("run") for event in fakes.events()) == 1 + 4


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("wrong", AnswersDisagreeError, "engine and wrong disagree on .* nothing was timed"),
        (
            "not_finite",
            AnswersDisagreeError,
            "not_finite answered features at 2x6 with NaN or infinite values",
        ),
        ("misshapen", MeasurementError, r"'hidden_states' of shape \[11, 256\]; expected \[12, 256\]"),
        ("raises", MeasurementError, "raises: its process, timing features at 2x6, failed: out of paper"),
    ],
)
def test_a_rival_that_fails(
    fakes, demo_engine, scratch: Path, alive, name: str, error: type[Exception], message: str
) -> None:
    options = BenchOptions(engine=str(demo_engine()), **SMALL, against=(name,), tasks=("features",))
    with pytest.raises(error, match=message):
        measure(options, engine=fakes.kind("a"), registry={name: fakes.kind(name)})
    runs = [event for event in fakes.events() if event.name == name and event.what.startswith("run")]
    assert len(runs) <= 1
    assert len(fakes.pids()) == 2
    assert not any(map(alive, fakes.pids()))
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("task", ["fill-mask", "next-sentence", "mlm-all"])
def test_wrong_answers_fail_in_every_task(fakes, demo_engine, task: str) -> None:
    options = BenchOptions(engine=str(demo_engine("int8")), **SMALL, against=("wrong",), tasks=(task,))
    with pytest.raises(AnswersDisagreeError, match=f"engine and wrong disagree on {task} at 2x6"):
        measure(options, engine=fakes.kind("a"), registry={"wrong": fakes.kind("wrong")})


def test_an_interruption_leaves_nothing(fakes, demo_engine, scratch: Path, alive) -> None:
    def interrupt() -> None:
        if len(fakes.events()) > 6:
            raise KeyboardInterrupt

    options = BenchOptions(engine=str(demo_engine()), **SMALL, against=("b",), tasks=("features",))
    with pytest.raises(KeyboardInterrupt):
        measure(options, engine=fakes.kind("a"), registry={"b": fakes.kind("b")}, on_step=interrupt)
    assert len(fakes.pids()) == 2
    assert not any(map(alive, fakes.pids()))
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_engine_and_torch_agree_on_the_demo(
    demo_engine, scratch: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    for name in recorded_environment():
        monkeypatch.delenv(name)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    options = BenchOptions(
        engine=str(demo_engine(precision)),
        tasks=TASKS,
        batches=(3,),
        sequences=(24,),
        threads=1,
        backend="onnxruntime",
        against=("torch",),
        warmup=0,
        repeats=1,
    )
    report = measure(options)
    assert [result.case.task for result in report.results] == list(TASKS)
    for result in report.results:
        agreement = result.comparisons["torch"].agreement
        # float32 rounds to 6e-8; sums over 256 and 1,024 numbers in four layers stay below a hundred times
        # that.
        assert agreement.error <= (1e-5 if precision == "fp32" else TOLERANCES["int8"])
        assert agreement.tolerance == TOLERANCES[precision]
    engine, torch = report.contestants
    assert engine.details["backend"] == "onnxruntime"
    assert set(engine.versions) == {"onnxruntime"}
    assert set(torch.versions) == {"torch", "transformers"}
    assert list(scratch.iterdir()) == []
    check_report(json.loads(report.to_json_text()))
    text = report.to_text()
    for word in (
        "demo, " + precision,
        "features",
        "mlm-all",
        "p99",
        "tokens/s",
        "answers agree with torch",
        "environment: MALLOC_ARENA_MAX=8",
    ):
        assert word in text


def check_report(value: dict[str, object]) -> None:
    """Every field of the format, with its type."""
    assert set(value) == {
        *("format", "format_version", "bertrt", "started", "duration_seconds"),
        *("machine", "engine", "settings", "contestants", "cases", "peak_operations_per_second"),
    }
    assert (value["format"], value["format_version"]) == ("bertrt-bench", 2)
    machine, settings = value["machine"], value["settings"]
    assert {"cpu", "usable_cpus", "instruction_sets", "memory_bytes", "os", "python", "load_average"} <= set(
        machine
    )
    assert settings == {
        "threads": 1,
        "warmup": 0,
        "rounds": 1,
        "repeats": 1,
        "seconds": None,
        "seed": 0,
        "top_k": 5,
        "lengths": None,
        "environment": {"MALLOC_ARENA_MAX": "8"},
    }
    assert value["peak_operations_per_second"] is None
    assert {"name", "kind", "precision", "dialect", "latency_only", "weights_sha256"} <= set(value["engine"])
    assert [contestant["name"] for contestant in value["contestants"]] == ["engine", "torch"]
    for contestant in value["contestants"]:
        assert contestant["threads"] == 1
        assert {"idle_cpu_seconds", "idle_seconds"} <= set(contestant)
        assert contestant["restless_turns"] >= 0
    for case in value["cases"]:
        assert set(case) == {
            *("task", "batch", "sequence", "mix", "tokens", "timings", "comparisons"),
            *("share_of_peak", "over_features"),
        }
        assert (case["mix"], case["tokens"], case["share_of_peak"]) == (False, 72, None)
        assert (case["over_features"] is None) == (case["task"] != "fill-mask-text")
        assert set(case["timings"]) == {"engine", "torch"}
        for timings in case["timings"].values():
            assert set(timings) == {
                *("runs", "p50_ms", "p90_ms", "p99_ms", "mean_ms", "std_ms", "min_ms", "max_ms"),
                *("round_p50_ms", "sequences_per_second", "tokens_per_second"),
            }
        assert set(case["comparisons"]) == {"torch"}
        assert set(case["comparisons"]["torch"]["speedup"]) == {"median", "low", "high"}
        assert set(case["comparisons"]["torch"]["agreement"]) == {"error", "tolerance", "measure"}


def test_a_reference_without_a_rival_that_needs_it(fakes, demo_engine) -> None:
    options = BenchOptions(engine=str(demo_engine()), **SMALL, reference="demo", tasks=("features",))
    with pytest.raises(InputError, match="name one with --against"):
        measure(options, engine=fakes.kind("a"))
    assert fakes.events() == []


def test_the_reference_of_an_engine(
    demo_engine: Callable[..., Path], small_bert, save_checkpoint, tmp_path: Path, monkeypatch
) -> None:
    demo = EngineFolder.open(demo_engine()).manifest.source
    # An engine of that name, where the command runs.
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/engine.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert (reference_folder(demo, None, tmp_path) / "config.json").is_file()
    other = save_checkpoint(small_bert())
    with pytest.raises(
        InputError, match=r"has weights of SHA-256 .* name the checkpoint that it was made from"
    ):
        reference_folder(demo, str(other), tmp_path)
    local = Source(kind="folder", name="mine", weights_sha256=demo.weights_sha256)
    with pytest.raises(InputError, match="local folder named 'mine'.* pass --reference FOLDER"):
        reference_folder(local, None, tmp_path)
    assert reference_folder(local, "demo", tmp_path) == reference_folder(demo, None, tmp_path)
    with pytest.raises(InputError, match="random weights, which are drawn again"):
        reference_folder(Source(kind="random", name="bert-base-cased", seed=1), "demo", tmp_path)
