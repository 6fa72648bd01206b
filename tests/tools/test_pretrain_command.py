"""The command that makes the demo model: what it writes, what it refuses, what it leaves behind."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tools.pretrain_demo import __main__ as command
from tools.pretrain_demo.corpus import hold_out, read_documents, tokenize
from tools.pretrain_demo.examples import ExampleSource
from tools.pretrain_demo.model import load_model
from tools.pretrain_demo.training import CONTINUED, Measurement, Stage, evaluate
from transformers import BertForPreTraining, BertTokenizerFast

_TINY = ("--layers", "1", "--hidden", "64", "--vocabulary", "87", "--threads", "1")
_MEASUREMENT = Measurement(stage=Stage(64, 64), batches=2)


@pytest.fixture(scope="module", autouse=True)
def short_measurement() -> Iterator[None]:
    """The full one takes longer than all the rest of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "FINAL", (_MEASUREMENT,))
        yield


@pytest.fixture(scope="module")
def trained(books: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "model"
    assert command.main([str(books), str(out), *_TINY, "--steps", "4"]) == 0
    return out


def test_the_folder_loads_in_transformers(trained: Path, vocabulary: list[str]) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "vocab.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in trained.parent.iterdir()] == ["model"]
    model, report = BertForPreTraining.from_pretrained(trained, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.vocab_size == len(vocabulary)
    assert json.loads((trained / "config.json").read_text())["dtype"] == "float16"
    tokenizer = BertTokenizerFast.from_pretrained(trained)
    assert tokenizer.convert_ids_to_tokens(range(len(vocabulary))) == vocabulary
    assert tokenizer.model_max_length == 512
    assert (
        tokenizer.decode(tokenizer("The fox.", "The cow.")["input_ids"])
        == "[CLS] The fox. [SEP] The cow. [SEP]"
    )
    assert len({path.stat().st_mode for path in trained.iterdir()}) == 1


def test_a_model_is_trained_further(
    trained: Path, books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "further"
    arguments = [
        str(books),
        str(out),
        "--resume",
        str(trained),
        "--steps",
        "2",
        "--batch",
        "8",
        "--threads",
        "1",
    ]
    assert command.main([*arguments, "--report-every", "1", "--warmup-steps", "1"]) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert summary["steps"] == 2
    assert "step 1 (50.0%), 4 x 512 tokens" in captured.err
    assert "step 2 (100.0%), 12 x 128 tokens" in captured.err
    for name in ("vocab.txt", "tokenizer.json"):
        assert (out / name).read_bytes() == (trained / name).read_bytes()
    before, after = (load_model(folder)[0].state_dict() for folder in (trained, out))
    name = "bert.pooler.dense.weight"
    assert not torch.equal(before[name], after[name])
    # It starts from the weights of the folder: two steps change them by two learning rates at most.
    largest = 2 * CONTINUED.learning_rate
    # float16 has 11 bits of significand.
    rounding = 2**-11 * before[name].abs().max().item()
    assert (before[name] - after[name]).abs().max().item() < 1.1 * largest + rounding
    # The figures are those of the weights as they were written.
    model, words = load_model(out)
    _, held_out = hold_out(tokenize(read_documents(books), words))
    figures = evaluate(model, ExampleSource(held_out, words), _MEASUREMENT)
    assert summary["held_out"][0]["masked_loss"] == pytest.approx(figures.masked_loss, rel=1e-6)


def test_an_interrupted_run_leaves_nothing(
    books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []

    def interrupt(line: str) -> None:
        lines.append(line)
        if line.startswith("step 2"):
            assert len(list(tmp_path.iterdir())) == 1
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "_report", interrupt)
    arguments = [str(books), str(tmp_path / "out"), *_TINY, "--minutes", "9", "--report-every", "1"]
    assert command.main(arguments) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert len(lines) == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["CORPUS", "HERE"], "exists"),
        (["MISSING", "OUT"], "cannot read the corpus"),
        (["HERE", "OUT"], "Is a directory"),
        (["CORPUS", "OUT"], "yields only"),
        (["CORPUS", "OUT", "--hidden", "100"], "multiple of 64"),
        (["CORPUS", "OUT", "--layers", "0"], "at least 1"),
        (["CORPUS", "OUT", "--vocabulary", "6"], "too small"),
        (["CORPUS", "OUT", "--threads", "0"], "threads is 0"),
        (["CORPUS", "OUT", "--resume", "MISSING"], "has no config.json"),
        (["CORPUS", "OUT", "--resume", "TRAINED", "--layers", "2"], "--layers cannot be chosen"),
        (["CORPUS", "CORPUS/OUT", *_TINY], "cannot write"),
    ],
)
def test_bad_arguments_get_one_clear_line(
    books: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    places = {
        "CORPUS": str(books),
        "HERE": str(tmp_path),
        "MISSING": str(tmp_path / "missing"),
        "OUT": str(tmp_path / "out"),
        "CORPUS/OUT": str(books / "out"),
        "TRAINED": str(trained),
    }
    assert command.main([places.get(argument, argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("pretrain_demo: error: ")
    assert message in last
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "vocabulary", "configuration"])
def test_a_damaged_folder_is_not_resumed(
    trained: Path, books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in trained.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if damage == "truncated":
        (folder / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes()[:-1000])
    elif damage == "vocabulary":
        (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n", encoding="utf-8")
    else:
        (folder / "config.json").write_text("{", encoding="utf-8")
    assert command.main([str(books), str(tmp_path / "out"), "--resume", str(folder)]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert "the model in" in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        command.main(["--help"])
    assert exit_code.value.code == 0
    assert "python -m tools.pretrain_demo books.txt demo --resume first" in capsys.readouterr().out
