"""``bertrt bench`` as it is typed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bertrt.cli.command import EXIT_CHECK_FAILED, EXIT_OK
from bertrt.errors import BertRTError, InputError
from bertrt_bench import command
from bertrt_bench.command import COMMAND
from bertrt_bench.measure import measure

QUICK = ["--batch", "1", "--sequence", "8", "--threads", "1", "--repeats", "2", "--warmup", "0"]


def bench(*arguments: str) -> int:
    parser = argparse.ArgumentParser(exit_on_error=False)
    COMMAND.add_arguments(parser)
    return COMMAND.run(parser.parse_args(arguments))


def test_table_and_file(demo_engine: Callable[..., Path], tmp_path: Path, capsys) -> None:
    out = tmp_path / "bench.json"
    assert bench(str(demo_engine()), *QUICK, "--task", "features,fill-mask", "--json", str(out)) == EXIT_OK
    printed = capsys.readouterr()
    assert "p50 ms" in printed.out
    assert "fill-mask" in printed.out
    assert f"wrote {out}" in printed.err
    value = json.loads(out.read_text(encoding="utf-8"))
    assert [case["task"] for case in value["cases"]] == ["features", "fill-mask"]
    assert value["settings"]["repeats"] == 2
    assert value["cases"][0]["comparisons"] == {}
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


@pytest.mark.parametrize(("shapes", "cases"), [((), 1), (("--sequence", "8"), 3)])
def test_a_mix_of_lengths(
    demo_engine: Callable[..., Path], tmp_path: Path, capsys, shapes: tuple[str, ...], cases: int
) -> None:
    book, out = tmp_path / "book.txt", tmp_path / "bench.json"
    book.write_text("It was late.\nNobody came that evening, nor on the next.\nWhy?\n", encoding="utf-8")
    mix = ("--lengths-from", str(book), "--paragraphs", "2", "--threads", "1", "--repeats", "1")
    assert bench(str(demo_engine()), *mix, *shapes, "--json", str(out)) == EXIT_OK
    value = json.loads(out.read_text(encoding="utf-8"))
    assert len(value["cases"]) == cases
    case, lengths = value["cases"][-1], value["settings"]["lengths"]
    assert (lengths["name"], lengths["paragraphs"], lengths["cut"]) == ("book.txt", 2, 0)
    assert case["mix"] is True
    assert (case["batch"], case["sequence"], case["tokens"]) == (2, lengths["most"], lengths["tokens"])
    assert lengths["least"] + lengths["most"] == lengths["tokens"]
    assert (
        f"2 paragraphs of book.txt, {lengths['least']} to {lengths['most']} tokens" in capsys.readouterr().out
    )


def test_json_to_standard_output_is_all_there_is(demo_engine: Callable[..., Path], capsys) -> None:
    assert bench(str(demo_engine()), *QUICK, "--json", "-") == EXIT_OK
    assert json.loads(capsys.readouterr().out)["format"] == "bertrt-bench"


def test_a_failed_check_is_exit_code_1(
    fakes, demo_engine: Callable[..., Path], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_fakes(options, *, on_step):
        return measure(
            options, on_step=on_step, engine=fakes.kind("a"), registry={"torch": fakes.kind("wrong")}
        )

    monkeypatch.setattr(command, "measure", with_fakes)
    out = tmp_path / "bench.json"
    code = bench(str(demo_engine()), *QUICK, "--against", "torch", "--json", str(out))
    printed = capsys.readouterr()
    assert code == EXIT_CHECK_FAILED
    assert printed.out == ""
    assert printed.err.startswith("bertrt: check failed: engine and wrong disagree on features at 1x8")
    assert len(printed.err.splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "1,x"), "--batch must be whole numbers"),
        (("--batch", "0"), "batch must be a whole number of at least 1"),
        (("--sequence", "9999"), "the model has 512 positions"),
        (("--task", "score"), "no task 'score'"),
        (("--against", "tensorflow"), "no rival 'tensorflow'"),
        (("--against", "torch,"), "no rival ''"),
        (("--lengths-from", "/no/such/book"), "cannot read the text '/no/such/book'"),
        (("--lengths-from", "/no/such/book", "--batch", ""), "--batch must be whole numbers"),
        (("--seconds", "nan"), "seconds must be a positive number"),
        (("--reference", "demo"), "of use only to a rival that needs it"),
        (("--json", "/no/such/folder/bench.json"), "cannot write '/no/such/folder/bench.json'"),
        (("--backend", "abacus"), "there is no backend 'abacus'"),
    ],
)
def test_bad_arguments(demo_engine: Callable[..., Path], arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(BertRTError, match=message):
        bench(str(demo_engine()), *arguments)


def test_a_folder_is_no_file_for_json(demo_engine: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is a folder"):
        bench(str(demo_engine()), "--json", str(tmp_path))


def test_no_engine(tmp_path: Path) -> None:
    with pytest.raises(BertRTError, match="there is no engine folder"):
        bench(str(tmp_path / "absent"))


def test_repeats_or_seconds(demo_engine: Callable[..., Path]) -> None:
    with pytest.raises(argparse.ArgumentError, match="not allowed with"):
        bench(str(demo_engine()), "--repeats", "3", "--seconds", "1")


def test_the_command_describes_itself() -> None:
    parser = argparse.ArgumentParser()
    COMMAND.add_arguments(parser)
    text = parser.format_help()
    for option in (
        "--batch",
        "--sequence",
        "--against",
        "--reference",
        "--lengths-from",
        "--json FILE",
        "--threads",
    ):
        assert option in text
    assert COMMAND.name == "bench"
    for line in COMMAND.example.splitlines():
        assert line.startswith("bertrt bench ")
        parser.parse_args(line.split()[2:])
