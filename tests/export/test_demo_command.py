"""``bertrt demo``: every step in its turn, and all of them as one JSON value."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bertrt_export.commands import demo

STEPS = ["export", "info", "fill-mask", "next-sentence", "next-sentence", "features", "drift", "bench"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that are run; the two long ones are only noted."""
    lines: list[list[str]] = []
    real = demo.main

    def main(line: list[str]) -> int:
        lines.append(list(line))
        if line[0] in {"drift", "bench"}:
            print("{}")
            return 0
        return real(line)

    monkeypatch.setattr(demo, "main", main)
    return lines


def run(*arguments: str) -> int:
    from bertrt.cli import main

    return main(["demo", *arguments])


def test_steps_are_shown_and_run(
    asked: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--out", str(tmp_path / "engine")) == 0
    assert [line[0] for line in asked] == STEPS
    shown = [line.split()[2] for line in capsys.readouterr().out.splitlines() if line.startswith("$ bertrt")]
    assert shown == STEPS
    assert (tmp_path / "engine" / "engine.json").is_file()


def test_json_is_one_value(
    asked: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--out", str(tmp_path / "engine"), "--json") == 0
    answers = json.loads(capsys.readouterr().out)
    assert [answer["command"][1] for answer in answers] == STEPS
    assert all(answer["exit_code"] == 0 for answer in answers)
    fill_mask = answers[STEPS.index("fill-mask")]["answer"]
    assert len(fill_mask) == 3
    assert fill_mask[0][0].keys() == {"score", "token", "token_str", "sequence"}


def test_only_what_a_processor_computes_is_offered(
    asked: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--out", str(tmp_path / "engine"), "--precision", "fp8") == 2
    assert re.search("'fp8' .choose from '?fp32'?, '?fp16'?, '?bf16'?, '?int8'?", capsys.readouterr().err)
    assert asked == []


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_all_that_is_offered_works(precision: str, asked: list[list[str]], tmp_path: Path) -> None:
    assert run("--out", str(tmp_path / "engine"), "--precision", precision, "--json") == 0
    assert [line[0] for line in asked] == STEPS


def test_a_failing_step_ends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "engine").write_text("in the way")
    assert run("--out", str(tmp_path / "engine")) == 2
    assert "info" not in capsys.readouterr().out
