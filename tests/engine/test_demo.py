"""The built-in engine from the command line, as a user meets it: a new process and an empty cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

# The project's promise for float32; what float32 sums in another order really change is near 1e-6.
SCORE_TOLERANCE = 1e-4
TEXTS = [
    "He opened the [MASK] and went into the house.",
    "The [MASK] worked as a [MASK].",
    "Naïve café owners, it's said, don't [MASK] much; 'really'?",
]


@pytest.fixture(scope="module")
def expected(demo_checkpoint: Path) -> list[Any]:
    """The pipeline's answers to the texts."""
    model = transformers.BertForMaskedLM.from_pretrained(demo_checkpoint, dtype=torch.float32).eval()
    tokenizer = transformers.BertTokenizerFast.from_pretrained(demo_checkpoint)
    pipeline = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")
    return [pipeline(text) for text in TEXTS]


def start(cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bertrt", "fill-mask", "demo", *TEXTS, "--json"],
        env={**os.environ, "BERTRT_CACHE": str(cache)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def check(process: subprocess.Popen[str], expected: list[Any]) -> None:
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    answers = [json.loads(line) for line in out.splitlines()]
    # The texts have one mask, two, and one.
    found, reference = ([one, *two, three] for one, two, three in (answers, expected))
    assert len(found) == len(reference) == 4
    for predictions, others in zip(found, reference, strict=True):
        for name in ("token", "token_str", "sequence"):
            assert [each[name] for each in predictions] == [each[name] for each in others]
        scores = [each["score"] for each in others]
        assert [each["score"] for each in predictions] == pytest.approx(scores, abs=SCORE_TOLERANCE, rel=0)


def test_demo_answers_as_the_pipeline(tmp_path: Path, expected: list[Any]) -> None:
    with start(tmp_path) as process:
        check(process, expected)


def test_two_processes_make_one_engine(tmp_path: Path, expected: list[Any]) -> None:
    cache = tmp_path / "not yet there"
    with start(cache) as one, start(cache) as other:
        check(one, expected)
        check(other, expected)
    # Besides the engine, only the lock is left.
    [engine] = [path for path in cache.iterdir() if not path.name.startswith(".")]
    assert (engine / "engine.json").is_file()
    assert [path for path in cache.iterdir() if path.is_dir()] == [engine]
