"""What is read from a checkpoint is what transformers wrote, in every layout that transformers or its users write."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bertrt.errors import CheckpointError, ExportError, MissingTensorError
from bertrt.manifest import Heads
from bertrt_export.checkpoints import Checkpoint, open_checkpoint
from bertrt_export.demo import demo_folder, evaluation_text

CLASSES = {
    "BertForPreTraining": Heads(mlm=True, nsp=True, pooler=True),
    "BertForMaskedLM": Heads(mlm=True, nsp=False, pooler=False),
    "BertForNextSentencePrediction": Heads(mlm=False, nsp=True, pooler=True),
    "BertModel": Heads(mlm=False, nsp=False, pooler=True),
}
VOCAB = [
    "[PAD]",
    "[MASK]",
    "[UNK]",
    "[SEP]",
    "[CLS]",
    *string.ascii_letters,
    *(f"##{c}" for c in string.ascii_letters),
]
Tensors = dict[str, torch.Tensor]


def build(name: str = "BertForPreTraining", *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A tiny model, all of whose tensors are random, LayerNorm and biases too."""
    config = transformers.BertConfig(
        # The vocabulary is padded, as many are.
        vocab_size=112,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=16,
        hidden_act="gelu_new",
        layer_norm_eps=1e-5,
        **options,
    )
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.to(dtype).eval()


def save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change the tensors of a single safetensors file."""
    path = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    save_file(change(tensors), path, metadata={"format": "pt"})


def truth(model: Any) -> dict[str, np.ndarray]:
    """The model's own tensors by canonical name, in float32; a tied decoder is no tensor of its own."""
    tensors = {
        name.removeprefix("bert."): value.float().numpy()
        for name, value in model.state_dict().items()
        if name != "cls.predictions.decoder.bias"
    }
    if model.config.tie_word_embeddings:
        tensors.pop("cls.predictions.decoder.weight", None)
    return tensors


def check(checkpoint: Checkpoint, model: Any) -> None:
    expected = truth(model)
    assert list(checkpoint.tensor_names) == sorted(expected)
    for name in checkpoint.tensor_names:
        found = checkpoint.tensor(name)
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        # The widening of float16 and bfloat16 to float32 is exact.
        np.testing.assert_array_equal(found, expected[name], strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_every_class_and_type(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(name, dtype=dtype)
    folder = save(model, tmp_path / "tiny")
    with open_checkpoint(folder) as checkpoint:
        check(checkpoint, model)
        assert checkpoint.heads == CLASSES[name]
        assert checkpoint.tied_decoder == checkpoint.heads.mlm
        assert checkpoint.folder == folder
        assert checkpoint.config["architectures"] == [name]
        assert checkpoint.architecture.hidden_act == "gelu_new"
        assert checkpoint.architecture.layer_norm_eps == 1e-5
        assert (checkpoint.tokenizer.mask_id, checkpoint.tokenizer.cls_id) == (1, 4)


def test_source_names_the_folder_and_the_hash_of_the_weights(tmp_path: Path) -> None:
    folder = save(build(), tmp_path / "tiny")
    with open_checkpoint(str(folder)) as checkpoint:
        source = checkpoint.source
    assert (source.kind, source.name, source.revision, source.seed) == ("folder", "tiny", None, None)
    assert source.weights_sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_several_safetensors_files(tmp_path: Path) -> None:
    model = build()
    folder = save(model, tmp_path / "tiny", max_shard_size="8KB")
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2
    with open_checkpoint(folder) as checkpoint:
        check(checkpoint, model)
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        assert checkpoint.source.weights_sha256 == digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard", ["10GB", "8KB"])
def test_pytorch_files(shard: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(dtype=dtype)
    folder = save(model, tmp_path / "tiny", safe_serialization=False, max_shard_size=shard)
    assert (folder / "pytorch_model.bin").is_file() == (shard == "10GB")
    with open_checkpoint(folder) as checkpoint:
        check(checkpoint, model)


def test_pytorch_file_of_the_format_before_1_6(tmp_path: Path) -> None:
    model = build()
    folder = save(model, tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with open_checkpoint(folder) as checkpoint:
        check(checkpoint, model)


def test_safetensors_are_preferred_to_pytorch_files(tmp_path: Path) -> None:
    model = build()
    folder = save(model, tmp_path / "tiny")
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    with open_checkpoint(folder) as checkpoint:
        check(checkpoint, model)


def old_names(tensors: Tensors) -> Tensors:
    return {
        re.sub(
            "LayerNorm.bias$", "LayerNorm.beta", re.sub("LayerNorm.weight$", "LayerNorm.gamma", name)
        ): value
        for name, value in tensors.items()
    }


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("bert."): value for name, value in tensors.items()}


def with_buffers(tensors: Tensors) -> Tensors:
    buffers = {
        "bert.embeddings.position_ids": torch.arange(16).expand(1, -1).clone(),
        "bert.embeddings.token_type_ids": torch.zeros(1, 16, dtype=torch.int64),
    }
    return tensors | buffers


def with_copies(tensors: Tensors) -> Tensors:
    return tensors | {
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone(),
    }


def with_bias_at_the_decoder(tensors: Tensors) -> Tensors:
    tensors["cls.predictions.decoder.bias"] = tensors.pop("cls.predictions.bias")
    return tensors


LAYOUTS = {
    # Each with whether transformers 4.57 loads the same model from the files; the tests below prove both.
    old_names: True,
    with_buffers: True,
    with_copies: True,
    without_prefix: False,
    with_bias_at_the_decoder: False,
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layouts(layout: Callable[[Tensors], Tensors], tmp_path: Path) -> None:
    model = build()
    folder = save(model, tmp_path / "tiny")
    rewrite(folder, layout)
    with open_checkpoint(folder) as checkpoint:
        check(checkpoint, model)
        assert checkpoint.tied_decoder
        assert checkpoint.folder == (folder if LAYOUTS[layout] else None)


@pytest.mark.parametrize(
    "layout", [layout for layout, plain in LAYOUTS.items() if plain], ids=lambda f: f.__name__
)
def test_transformers_reads_the_plain_layouts_alike(
    layout: Callable[[Tensors], Tensors], tmp_path: Path
) -> None:
    folder = save(build(), tmp_path / "tiny")
    rewrite(folder, layout)
    loaded = transformers.BertForPreTraining.from_pretrained(folder)
    with open_checkpoint(folder) as checkpoint:
        check(checkpoint, loaded)


def test_model_without_pooler(tmp_path: Path) -> None:
    folder = save(build("BertModel"), tmp_path / "tiny")
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if not n.startswith("pooler.")})
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.heads == Heads(mlm=False, nsp=False, pooler=False)


def test_masked_lm_with_an_unused_pooler(tmp_path: Path) -> None:
    folder = save(build(), tmp_path / "tiny")
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if "seq_relationship" not in n})
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.heads == Heads(mlm=True, nsp=False, pooler=True)
        assert checkpoint.config["architectures"] == ["BertForMaskedLM"]


def test_untied_decoder(tmp_path: Path) -> None:
    model = build(tie_word_embeddings=False)
    folder = save(model, tmp_path / "tiny")
    with open_checkpoint(folder) as checkpoint:
        assert not checkpoint.tied_decoder
        assert checkpoint.config["tie_word_embeddings"] is False
        check(checkpoint, model)
        decoder = model.cls.predictions.decoder.weight.detach().numpy()
        np.testing.assert_array_equal(checkpoint.tensor("cls.predictions.decoder.weight"), decoder)


def test_decoder_equal_to_the_embeddings_is_tied_whatever_the_configuration_says(tmp_path: Path) -> None:
    model = build(tie_word_embeddings=False)
    with torch.no_grad():
        model.cls.predictions.decoder.weight.copy_(model.bert.embeddings.word_embeddings.weight)
    with open_checkpoint(save(model, tmp_path / "tiny")) as checkpoint:
        assert checkpoint.tied_decoder
        assert "cls.predictions.decoder.weight" not in checkpoint.tensor_names


def test_configuration_that_ties_outweighs_another_decoder(tmp_path: Path) -> None:
    folder = save(build(), tmp_path / "tiny")
    rewrite(folder, lambda tensors: tensors | {"cls.predictions.decoder.weight": torch.randn(112, 12)})
    loaded = transformers.BertForPreTraining.from_pretrained(folder)
    with open_checkpoint(folder) as checkpoint:
        check(checkpoint, loaded)
        assert checkpoint.tied_decoder
        # transformers 5 reads these files in another way than 4, so they are no reference.
        assert checkpoint.folder is None


def test_tied_decoder_can_be_had_by_its_name(tmp_path: Path) -> None:
    with open_checkpoint(save(build(), tmp_path / "tiny")) as checkpoint:
        assert "cls.predictions.decoder.weight" not in checkpoint.tensor_names
        np.testing.assert_array_equal(
            checkpoint.tensor("cls.predictions.decoder.weight"),
            checkpoint.tensor("embeddings.word_embeddings.weight"),
        )


def test_a_tensor_belongs_to_the_caller(tmp_path: Path) -> None:
    with open_checkpoint(save(build(), tmp_path / "tiny")) as checkpoint:
        first = checkpoint.tensor("pooler.dense.weight")
        kept = first.copy()
        first += 1
        np.testing.assert_array_equal(checkpoint.tensor("pooler.dense.weight"), kept)


@pytest.mark.parametrize(
    ("name", "options", "layout"),
    [
        ("BertForPreTraining", {}, None),
        ("BertForPreTraining", {}, without_prefix),
        ("BertForPreTraining", {}, with_bias_at_the_decoder),
        ("BertForPreTraining", {"tie_word_embeddings": False}, None),
        ("BertForMaskedLM", {}, old_names),
        ("BertForNextSentencePrediction", {}, None),
        ("BertModel", {}, None),
    ],
)
def test_materialized_folder_is_the_same_model(
    name: str, options: dict[str, Any], layout: Callable[[Tensors], Tensors] | None, tmp_path: Path
) -> None:
    model = build(name, **options)
    folder = save(model, tmp_path / "tiny")
    if layout:
        rewrite(folder, layout)
    with open_checkpoint(folder) as checkpoint:
        checkpoint.materialize(tmp_path / "out")
    loaded, report = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    original = model.state_dict()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, original[key]), key
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("Ab [MASK] é") == ["A", "##b", "[MASK]", "[UNK]"]
    batch = tokenizer(["abc Def", "x [MASK]"], ["Gh", "i j k"], padding=True, return_tensors="pt")
    with torch.no_grad():
        # The same operations on the same values: equal but for the order of sums in kernels that look at alignment.
        torch.testing.assert_close(loaded(**batch)[0], model(**batch)[0], rtol=1e-5, atol=1e-5)


def test_materialize_fills_an_empty_folder_and_no_other(tmp_path: Path) -> None:
    with open_checkpoint(save(build(), tmp_path / "tiny")) as checkpoint:
        out = tmp_path / "out"
        out.mkdir()
        checkpoint.materialize(out)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        with pytest.raises(ExportError, match="not an empty folder"):
            checkpoint.materialize(out)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        with pytest.raises(ExportError, match="not an empty folder"):
            checkpoint.materialize(out / "config.json")
        with pytest.raises(ExportError, match="Not a directory"):
            checkpoint.materialize(out / "config.json" / "below")


def test_materialize_leaves_nothing_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_options: object) -> int:
        raise OSError(28, "No space left on device")

    with open_checkpoint(save(build(), tmp_path / "tiny")) as checkpoint:
        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(ExportError, match="No space left on device; nothing was left behind"):
            checkpoint.materialize(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_closed_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(build(), tmp_path / "tiny"))
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.tensor("pooler.dense.weight")


def test_tensor_that_is_not_there(tmp_path: Path) -> None:
    with (
        open_checkpoint(save(build("BertModel"), tmp_path / "tiny")) as checkpoint,
        pytest.raises(MissingTensorError, match=r"'tiny' has no tensor 'cls\.predictions\.bias'"),
    ):
        checkpoint.tensor("cls.predictions.bias")


def test_folder_of_links_as_in_the_hub_cache(tmp_path: Path) -> None:
    model = build()
    blobs = save(model, tmp_path / "blobs", max_shard_size="8KB")
    links = tmp_path / "snapshot"
    links.mkdir()
    for path in blobs.iterdir():
        (links / path.name).symlink_to(path)
    with open_checkpoint(links) as checkpoint:
        check(checkpoint, model)


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformers.BertForPreTraining.from_pretrained(demo_folder(), dtype=torch.float32)
    monkeypatch.chdir(tmp_path)
    with open_checkpoint("demo") as checkpoint:
        check(checkpoint, model)
        assert (checkpoint.source.kind, checkpoint.source.name) == ("demo", "demo")
        assert checkpoint.folder == demo_folder()
        assert checkpoint.heads == Heads(mlm=True, nsp=True, pooler=True)
    assert evaluation_text().read_text(encoding="utf-8").startswith("The Time Traveller")
    # A local folder of that name wins.
    shutil.copytree(save(build(), tmp_path / "tiny"), tmp_path / "demo")
    with open_checkpoint("demo") as checkpoint:
        assert checkpoint.source.kind == "folder"
        check(checkpoint, build())
