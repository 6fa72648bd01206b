"""The built-in commands on a real engine, held against transformers and against the engine itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bertrt.cli import features
from bertrt.engine import Engine

# The project's promise for float32; what float32 sums in another order really change is near 1e-6.
SCORE_TOLERANCE = 1e-4
# A text alone and the same among others: another padding, so other orders of float32 sums.
ALONE = 1e-4
TEXT = "He opened the [MASK] and went into the house."
PAIR = ("The rain had stopped.", "He closed his umbrella.")


@pytest.fixture(scope="module")
def pipeline(demo_checkpoint: Path) -> Any:
    model = transformers.BertForMaskedLM.from_pretrained(demo_checkpoint, dtype=torch.float32).eval()
    tokenizer = transformers.BertTokenizerFast.from_pretrained(demo_checkpoint)
    return transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")


def json_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def same_predictions(found: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(found, list):
        return len(found) == len(expected) and all(
            same_predictions(one, other, tolerance) for one, other in zip(found, expected, strict=True)
        )
    rest = {"score": None}
    return {**found, **rest} == {**expected, **rest} and bool(
        abs(found["score"] - expected["score"]) < tolerance
    )


@pytest.mark.parametrize("text", [TEXT, "The [MASK] worked as a [MASK]."])
@pytest.mark.parametrize("top_k", [1, 5])
def test_fill_mask_answers_as_the_pipeline(
    text: str, top_k: int, ask: Callable[..., str], pipeline: Any
) -> None:
    found = json.loads(ask("fill-mask", text, "--top-k", str(top_k), "--json"))
    assert same_predictions(found, pipeline(text, top_k=top_k), SCORE_TOLERANCE)


def test_fill_mask_reads_any_source_and_keeps_the_order(
    ask: Callable[..., str], loaded: Engine, tmp_path: Path
) -> None:
    # More than one chunk, of lengths that the runtime sorts.
    texts = [f"{'very ' * (index * 7 % 13)}{index} [MASK]" for index in range(270)]
    expected = loaded.fill_mask(texts, top_k=1)
    data = "".join(text + "\n" for text in texts).encode()
    (tmp_path / "texts.txt").write_bytes(data)
    outputs = [
        ask("fill-mask", "--file", str(tmp_path / "texts.txt"), "--top-k", "1", "--json"),
        ask("fill-mask", "--top-k", "1", "--json", standard_input=data),
    ]
    for output in outputs:
        assert same_predictions(json_lines(output), expected, ALONE)
    some = ask("fill-mask", *texts[:3], "--top-k", "1", "--json")
    assert same_predictions(json_lines(some), expected[:3], ALONE)


def test_fill_mask_among_targets(ask: Callable[..., str], loaded: Engine) -> None:
    found = ask("fill-mask", TEXT, "--targets", "door", "--targets", "house", "--json")
    assert same_predictions(json.loads(found), loaded.fill_mask(TEXT, targets=["door", "house"]), ALONE)


def test_fill_mask_in_windows(ask: Callable[..., str], loaded: Engine) -> None:
    text = "and " * 600 + TEXT
    found = ask("fill-mask", text, "--overflow", "window", "--stride", "100", "--json")
    assert same_predictions(json.loads(found), loaded.fill_mask(text, overflow="window", stride=100), ALONE)


def test_fill_mask_for_people(ask: Callable[..., str], loaded: Engine) -> None:
    lines = ask("fill-mask", TEXT, "A [MASK] and a [MASK].", "--top-k", "2").splitlines()
    first, second = loaded.fill_mask(TEXT, top_k=2)
    assert lines[0] == TEXT
    assert lines[1].split() == ["score", "token", "sequence"]
    assert lines[2].split() == [f"{first['score']:.4f}", first["token_str"], *first["sequence"].split()]
    assert lines[3].split() == [f"{second['score']:.4f}", second["token_str"], *second["sequence"].split()]
    # In columns.
    assert {line.find("door") for line in (lines[2],)} == {lines[1].find("token")}
    assert lines[2].find("He opened") == lines[3].find("He opened") == lines[1].find("sequence")
    assert [line for line in lines if "mask " in line] == ["  mask 1", "  mask 2"]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"no mask", r"line 300 of standard input has no mask; write \[MASK\]"),
        (b"", "line 300 of standard input is blank; remove it or pass --skip-blank"),
        (b"\x01\x02", "line 300 of standard input has no token"),
        (b"\xff [MASK]", "line 300 of standard input is not UTF-8: byte 0xff at offset "),
        (b"[MASK] " * 78, "line 300 of standard input has 78 masks, the call allows 77; .* --max-masks"),
        (
            b"[MASK]" + b" and" * 510,
            "line 300 of standard input has 513 tokens, the model has 512 positions; "
            "shorten it or pass --overflow truncate or window",
        ),
        (b"[MASK]" + b"x" * (1 << 20), "line 300 of standard input is longer than 1,048,576 bytes"),
    ],
    ids=["no mask", "blank", "nothing left", "not UTF-8", "many masks", "too long", "endless"],
)
def test_what_stands_before_a_bad_line_is_answered(
    line: bytes, error: str, ask: Callable[..., str], loaded: Engine
) -> None:
    texts = [f"{index} [MASK]" for index in range(299)]
    data = "\n".join(texts).encode() + b"\n" + line + b"\nafter it [MASK]\n"
    found = ask("fill-mask", "--top-k", "1", "--json", standard_input=data, code=2, error=error)
    assert same_predictions(json_lines(found), loaded.fill_mask(texts, top_k=1), ALONE)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["no mask"], "text 1 has no mask"),
        ([""], "text 1 is blank"),
        ([TEXT, "no mask"], "text 2 has no mask"),
        ([TEXT, "--targets", "xyzzy"], "targets not in the vocabulary: 'xyzzy'"),
        # What the user wrote stays as it is, whatever it looks like.
        ([TEXT, TEXT, "--targets", "text 0"], "targets not in the vocabulary: 'text 0'"),
        ([TEXT, "--targets", "top_k"], "targets not in the vocabulary: 'top_k'"),
        ([TEXT, "--targets", "a\udcff"], r"target 'a\\udcff' has a lone surrogate at position 1"),
        ([TEXT, "--top-k", "1000000"], "--top-k must be a whole number from 1 to 8192"),
        ([TEXT, "--overflow", "window", "--stride", "511"], "--stride must be "),
        ([TEXT, "--backend", "abacus"], "there is no backend 'abacus'"),
        ([TEXT, "--file", "x"], "texts were given and --file too"),
        (["--file", "/nowhere"], "cannot read '/nowhere'"),
        (["[MASK]" + " and" * 511, "--max-masks", "1"], "text 1 has 514 tokens"),
        (["and " * 511 + "[MASK]", "--overflow", "truncate"], "truncating text 1 .* --overflow window"),
    ],
)
def test_fill_mask_refuses(arguments: list[str], error: str, ask: Callable[..., str]) -> None:
    out = ask("fill-mask", *arguments, "--json", code=2, error=error)
    # The first of two texts is answered all the same.
    assert len(out.splitlines()) == (arguments[0] == TEXT and arguments[1] == "no mask")


def test_the_first_text_at_fault_is_named(ask: Callable[..., str]) -> None:
    # A text without a token is noticed before one without a mask.
    data = f"{TEXT}\nno mask\n{TEXT}\n\x01\n".encode()
    out = ask(
        "fill-mask", "--json", standard_input=data, code=2, error="line 2 of standard input has no mask"
    )
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "arguments", "most"),
    [
        ("fill-mask", ["--top-k", "1"], 256),
        ("fill-mask", ["--top-k", "8192"], 8),
        ("features", ["--pooling", "none"], 8),
        ("features", ["--pooling", "cls"], 256),
    ],
)
def test_large_answers_are_asked_for_a_few_at_a_time(
    command: str, arguments: list[str], most: int, ask: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def answer(_: Engine, texts: list[str], **__: Any) -> Any:
        asked.append(len(texts))
        return [[] for _ in texts] if command == "fill-mask" else np.zeros((len(texts), 3), np.float32)

    monkeypatch.setattr(Engine, command.replace("-", "_"), answer)
    ask(command, *arguments, "--json", standard_input=b"[MASK]\n" * 300)
    assert sum(asked) == 300
    assert max(asked) == most


def test_a_matrix_is_written_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = np.arange(3 << 19, dtype=np.float32).reshape(-1, 256)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123 - as the command line opens it
        monkeypatch.setattr(sys, "stdout", nowhere)
        tracemalloc.start()
        try:
            features._write_json(matrix)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    # The check for NaN takes a byte an element; as text, every element would take ten.
    assert peak < 2 * matrix.size


def test_next_sentence(ask: Callable[..., str], loaded: Engine, tmp_path: Path) -> None:
    probability = loaded.next_sentence(*PAIR)
    found = json.loads(ask("next-sentence", *PAIR, "--json"))
    assert found == {"probability": pytest.approx(probability, abs=ALONE), "is_next": probability >= 0.5}
    assert ask("next-sentence", *PAIR) == f"{probability:.4f}  {PAIR[0]} -> {PAIR[1]}\n"

    pairs = [(f"First {'text ' * (index % 5)}", f"second {index}") for index in range(270)]
    (tmp_path / "pairs.tsv").write_text("".join(f"{a}\t{b}\r\n" for a, b in pairs))
    found = ask("next-sentence", "--file", str(tmp_path / "pairs.tsv"), "--json")
    expected = loaded.next_sentence(*zip(*pairs, strict=True))
    assert [line["probability"] for line in json_lines(found)] == pytest.approx(expected, abs=ALONE)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"no tab", "line 3 of standard input has 0 tabs, expected one"),
        (b"a\tb\tc", "line 3 of standard input has 2 tabs, expected one"),
        (b"a\t", "the second text of line 3 of standard input has no token"),
        (b"\tb", "the first text of line 3 of standard input has no token"),
        (b"a\t" + b"b " * 509, "line 3 of standard input has 513 tokens.* --overflow truncate"),
    ],
)
def test_next_sentence_names_a_bad_pair(line: bytes, error: str, ask: Callable[..., str]) -> None:
    data = b"a\tb\nc\td\n" + line + b"\ne\tf\n"
    out = ask("next-sentence", "--json", standard_input=data, code=2, error=error)
    assert len(out.splitlines()) == 2


@pytest.mark.parametrize(
    ("texts", "error"),
    [
        (["a"], "expected two texts, A and B, got 1"),
        (["a", "b", "c"], "expected two texts, A and B, got 3"),
        (["a", " "], "text 2 is blank"),
        (["a\tb", "c"], "text 1 has a tab in it"),
        (["a", "\x01"], "the second text of pair 1 has no token"),
    ],
)
def test_next_sentence_takes_two_texts(texts: list[str], error: str, ask: Callable[..., str]) -> None:
    assert ask("next-sentence", *texts, code=2, error=error) == ""


@pytest.mark.parametrize("pooling", ["none", "cls", "mean", "pooler"])
def test_features(pooling: Any, ask: Callable[..., str], loaded: Engine) -> None:
    texts = ["Replace me by any text you'd like.", "Short.", "Replace me by any text you'd like."]
    found = json_lines(ask("features", *texts, "--pooling", pooling))
    expected = loaded.features(texts, pooling=pooling)
    assert len(found) == len(texts)
    for one, other in zip(found, expected, strict=True):
        # The same call with the same texts, and nine digits hold a float32: equal to the bit.
        np.testing.assert_array_equal(np.array(one, np.float32), other)


def test_features_as_an_array(ask: Callable[..., str], loaded: Engine, tmp_path: Path) -> None:
    texts = [f"{'word ' * (index % 9)}{index}" for index in range(300)]
    out = tmp_path / "vectors.npy"
    data = "\n".join(texts).encode()
    told = ask("features", "--pooling", "cls", "--output", str(out), "--json", standard_input=data)
    assert json.loads(told) == {
        "output": str(out),
        "shape": [300, 256],
        "dtype": "float32",
        "pooling": "cls",
    }
    np.testing.assert_allclose(np.load(out), loaded.features(texts, pooling="cls"), atol=ALONE, rtol=0)
    assert "[300, 256]" in ask("features", "--output", str(out), standard_input=data)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("name", "pooling", "data", "error"),
    [
        ("x.npy", "mean", b"one\n\ntwo", "line 2 of standard input is blank"),
        ("x.npy", "mean", b"", "there is no text in standard input"),
        ("x.npy", "none", b"one", "--output needs one vector a text"),
        ("x.txt", "mean", b"one", "--output writes NumPy files"),
        ("no/x.npy", "mean", b"one", "cannot write "),
    ],
)
def test_features_leave_nothing_half_written(
    name: str, pooling: str, data: bytes, error: str, ask: Callable[..., str], tmp_path: Path
) -> None:
    arguments = ["--output", str(tmp_path / name), "--pooling", pooling]
    assert ask("features", *arguments, standard_input=data, code=2, error=error) == ""
    assert list(tmp_path.iterdir()) == []


def test_features_that_are_not_finite_are_not_json(
    ask: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "features", lambda *_, **__: np.array([[1, np.nan]], np.float32))
    assert ask("features", "one", code=2, error="a feature is NaN or infinite") == ""


def test_the_program_loads_nothing_heavy(engine_folder: Path) -> None:
    code = (
        "import sys; from bertrt.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'onnx', 'bertrt_export', 'bertrt_bench'} & set(sys.modules);"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    command = [sys.executable, "-c", code, "fill-mask", str(engine_folder), TEXT, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)[0]["sequence"] == TEXT.replace("[MASK]", "door")


def test_a_conversation(engine_folder: Path) -> None:
    """Each line is answered before the next is sent, and a reader that leaves ends it quietly."""
    command = [sys.executable, "-m", "bertrt", "fill-mask", str(engine_folder), "--json", "--top-k", "1"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        for text in (TEXT, "The man worked as a [MASK]."):
            process.stdin.write(text + "\n")
            process.stdin.flush()
            [answer] = json.loads(process.stdout.readline())
            assert answer["sequence"].split()[:2] == text.split()[:2]
        process.stdout.close()
        process.stdin.write(TEXT + "\n")
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + 13
