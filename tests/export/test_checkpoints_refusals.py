"""What is no whole BERT is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bertrt.errors import (
    BertRTError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    InputError,
    MissingTensorError,
    NonFiniteWeightsError,
    TensorShapeError,
    TokenizerError,
    UnexpectedTensorError,
    UnsupportedModelError,
)
from bertrt_export.checkpoints import open_checkpoint

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(
    small_bert: Callable[..., transformers.BertForPreTraining], save_checkpoint: Callable[..., Path]
) -> Path:
    return save_checkpoint(small_bert())


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder: Path, kind: type[BertRTError]) -> str:
    with pytest.raises(kind) as caught, open_checkpoint(folder) as checkpoint:
        for name in checkpoint.tensor_names:
            checkpoint.tensor(name)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "roberta"}, "model_type='roberta'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"hidden_act": "silu"}, "hidden_act='silu'"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_size": 25}, "hidden_size 25 is not a multiple"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers must be a whole number"),
    ],
)
def test_configurations_that_are_not_our_bert(changes: dict[str, Any], named: str, folder: Path) -> None:
    configure(folder, **changes)
    assert named in refusal(folder, UnsupportedModelError)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "nul", '{"vocab_size": ' + "9" * 5000 + "}", "[" * 50_000],
    ids=lambda text: text[:9],
)
def test_configuration_that_is_not_json(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder, CorruptCheckpointError)


def test_configuration_that_is_not_utf8_or_too_large(folder: Path) -> None:
    (folder / "config.json").write_bytes(b'{"model_type": "b\xe9rt"}')
    assert "not JSON" in refusal(folder, CorruptCheckpointError)
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 34)
    assert "larger than" in refusal(folder, CorruptCheckpointError)


def unconfigure(folder: Path, name: str) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config[name]
    path.write_text(json.dumps(config))


def test_configuration_without_model_type(folder: Path) -> None:
    # Early releases of transformers wrote none.
    unconfigure(folder, "model_type")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config["model_type"] == "bert"
    for other in (["RobertaForMaskedLM"], "BertModel", [["BertModel"]]):
        configure(folder, architectures=other)
        assert "has no model_type, and says architectures=" in refusal(folder, UnsupportedModelError)
    unconfigure(folder, "architectures")
    open_checkpoint(folder).close()
    configure(folder, model_type=None)
    assert "model_type=None" in refusal(folder, UnsupportedModelError)


def test_number_in_the_configuration_that_has_no_float(folder: Path) -> None:
    configure(folder, initializer_range=10**400, hidden_dropout_prob=float("inf"))
    with open_checkpoint(folder) as checkpoint:
        assert not checkpoint.config.keys() & {"initializer_range", "hidden_dropout_prob"}


def test_tie_word_embeddings_of_another_type(folder: Path) -> None:
    configure(folder, tie_word_embeddings="no")
    assert "tie_word_embeddings must be true or false, got 'no'" in refusal(folder, CorruptCheckpointError)


def test_wrong_shape_says_found_and_expected(folder: Path) -> None:
    configure(folder, intermediate_size=48)
    message = refusal(folder, TensorShapeError)
    assert "'bert.encoder.layer.0.intermediate.dense" in message
    assert "(40,)" in message or "(40, 24)" in message
    assert "(48,)" in message or "(48, 24)" in message


def test_transposed_tensor(folder: Path) -> None:
    name = "bert.encoder.layer.1.output.dense.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    message = refusal(folder, TensorShapeError)
    assert f"{name!r} has shape (40, 24)" in message
    assert "(24, 40)" in message


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int64, torch.float64, torch.bool, torch.float8_e4m3fn], ids=str
)
def test_types_that_are_not_read(dtype: torch.dtype, folder: Path) -> None:
    name = "cls.seq_relationship.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(2, 24).to(dtype)}))
    message = refusal(folder, TensorShapeError)
    assert f"{name!r} is stored as {str(dtype).removeprefix('torch.').removesuffix('fn')}" in message


@pytest.mark.parametrize("name", ["embeddings.LayerNorm.bias", "encoder.layer.2.attention.self.key.weight"])
def test_missing_tensor_of_the_encoder(name: str, folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(f"bert.{name}"))
    assert f": {name!r};" in refusal(folder, MissingTensorError)


def test_configuration_with_more_layers_than_the_weights(folder: Path) -> None:
    # A number of layers whose names would not fit in memory.
    configure(folder, num_hidden_layers=16_000_000)
    message = refusal(folder, MissingTensorError)
    assert "encoder.layer.3.attention.self.query.weight" in message
    assert "and more" in message


def test_configuration_with_fewer_layers_than_the_weights(folder: Path) -> None:
    configure(folder, num_hidden_layers=2)
    message = refusal(folder, UnexpectedTensorError)
    assert "(16)" in message
    assert "bert.encoder.layer.2." in message
    assert "and more" in message


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cls.predictions.bias", "masked-LM"),
        ("cls.predictions.transform.LayerNorm.weight", "masked-LM"),
        ("cls.seq_relationship.bias", "next-sentence"),
        ("bert.pooler.dense.bias", "next-sentence"),
    ],
)
def test_head_of_which_a_part_is_missing(name: str, reason: str, folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(name))
    message = refusal(folder, MissingTensorError)
    assert name.removeprefix("bert.") in message
    assert reason in message


def test_pooler_of_which_a_part_is_missing(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in ("cls.seq_relationship.weight", "cls.seq_relationship.bias", "bert.pooler.dense.bias"):
            del tensors[name]

    rewrite(folder, change)
    assert "the rest of the pooler is there: 'pooler.dense.bias'" in refusal(folder, MissingTensorError)


def test_untied_decoder_that_is_missing(folder: Path) -> None:
    configure(folder, tie_word_embeddings=False)
    assert "cls.predictions.decoder.weight" in refusal(folder, MissingTensorError)


@pytest.mark.parametrize(
    "name",
    [
        "classifier.weight",
        "qa_outputs.bias",
        "embeddings.word_embeddings.weight",
        "bert.cls.predictions.bias",
        "bert.encoder.layer.01.output.dense.bias",
        "bert.encoder.layer.0.attention.self.distance_embedding.weight",
        "bert.encoder.layer.0.crossattention.self.query.weight",
        "module.bert.pooler.dense.bias",
    ],
)
def test_extra_tensor(name: str, folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(24)}))
    message = refusal(folder, UnexpectedTensorError)
    assert "(1)" in message
    assert name in message


def test_tensor_under_two_names(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"bert.embeddings.LayerNorm.gamma": torch.ones(24)}))
    message = refusal(folder, UnexpectedTensorError)
    assert "'bert.embeddings.LayerNorm.gamma'" in message
    assert "'bert.embeddings.LayerNorm.weight'" in message


def test_two_biases_that_differ(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"cls.predictions.decoder.bias": torch.ones(97)}))
    assert "two different biases" in refusal(folder, UnexpectedTensorError)


def test_two_biases_that_are_not_finite(folder: Path) -> None:
    both = dict.fromkeys(
        ("cls.predictions.bias", "cls.predictions.decoder.bias"), torch.full([97], torch.nan)
    )
    rewrite(folder, lambda tensors: tensors.update({name: bias.clone() for name, bias in both.items()}))
    assert "97 of 97 weights NaN" in refusal(folder, NonFiniteWeightsError)


def test_tensor_names_are_written_without_control_characters(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"\x1b[31m" + "x" * 10_000: torch.ones(1)}))
    message = refusal(folder, UnexpectedTensorError)
    assert r"'\x1b[31mxx" in message
    assert message.isprintable()
    assert len(message) < 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(value: float, dtype: torch.dtype, folder: Path) -> None:
    name = "bert.encoder.layer.1.attention.self.value.weight"

    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[name][3, 5:8] = value

    rewrite(folder, change)
    message = refusal(folder, NonFiniteWeightsError)
    assert f"{name!r} of the checkpoint {folder.name!r} has 3 of 576 weights NaN or infinite" in message


def test_materialize_of_weights_that_are_not_finite_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, lambda tensors: tensors["bert.pooler.dense.bias"].fill_(torch.nan))
    out = tmp_path / "out"
    with open_checkpoint(folder) as checkpoint:
        with pytest.raises(NonFiniteWeightsError):
            checkpoint.materialize(out)
        assert not out.exists()
        out.mkdir()
        with pytest.raises(NonFiniteWeightsError):
            checkpoint.materialize(out)
        assert list(out.iterdir()) == []


def test_tokenizer_with_more_tokens_than_embeddings(folder: Path) -> None:
    with (folder / "vocab.txt").open("a") as file:
        file.write("extra\n")
    assert "98 tokens, the model has embeddings for 97" in refusal(folder, TokenizerError)


def test_folder_without_tokenizer(folder: Path) -> None:
    (folder / "vocab.txt").unlink()
    refusal(folder, TokenizerError)


def test_folder_without_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder, CheckpointNotFoundError)


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "model.safetensors, " in refusal(folder, CheckpointNotFoundError)
    (folder / "engine.json").write_text("{}")
    assert "it is an engine folder" in refusal(folder, CheckpointNotFoundError)


@pytest.mark.parametrize(
    "name", ["./none", "../none", "/none", "~/none", "a/b/c", "", " ", "a b", "none/", "a\0b", "-x"]
)
def test_names_that_are_never_looked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint folder"):
        open_checkpoint(name)


def test_path_object_is_never_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint folder 'bert-base-cased'"):
        open_checkpoint(Path("bert-base-cased"))


def test_file_instead_of_a_folder(folder: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="is a file"):
        open_checkpoint(folder / "model.safetensors")


def test_name_that_no_file_system_takes() -> None:
    with pytest.raises(CheckpointNotFoundError, match="File name too long"):
        open_checkpoint("x" * 5000)


def test_revision_of_what_is_not_on_the_hub(folder: Path) -> None:
    for source in (str(folder), "demo"):
        with pytest.raises(InputError, match="no revision 'main'"):
            open_checkpoint(source, revision="main")
