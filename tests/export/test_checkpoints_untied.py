"""An untied decoder has one bias in transformers 4 and two in transformers 5; one of them is the model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bertrt_export.checkpoints import Checkpoint, open_checkpoint

BIAS, DECODER_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"


@pytest.fixture
def model(small_bert: Callable[..., transformers.BertForPreTraining]) -> transformers.BertForPreTraining:
    return small_bert(tie_word_embeddings=False)


@pytest.fixture
def bias(model: transformers.BertForPreTraining) -> torch.Tensor:
    return model.cls.predictions.bias.detach().clone()


@pytest.fixture
def save(
    model: transformers.BertForPreTraining, save_checkpoint: Callable[..., Path]
) -> Callable[[dict[str, torch.Tensor]], Path]:
    """A function that saves the model with these biases and no others."""

    def with_biases(biases: dict[str, torch.Tensor]) -> Path:
        folder = save_checkpoint(model)
        tensors = load_file(folder / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if name not in (BIAS, DECODER_BIAS)}
        assert "cls.predictions.decoder.weight" in kept
        save_file(kept | biases, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return with_biases


def check(checkpoint: Checkpoint, bias: torch.Tensor) -> None:
    assert not checkpoint.tied_decoder
    np.testing.assert_array_equal(checkpoint.tensor(BIAS), bias.numpy())
    assert DECODER_BIAS not in checkpoint.tensor_names


def test_both_alike_are_for_every_release(
    save: Callable[..., Path], bias: torch.Tensor, tmp_path: Path
) -> None:
    folder = save({BIAS: bias, DECODER_BIAS: bias.clone()})
    with open_checkpoint(folder) as checkpoint:
        check(checkpoint, bias)
        assert checkpoint.folder == folder


@pytest.mark.parametrize("stored", ["head alone", "decoder alone", "head untrained"])
def test_others_are_written_anew_for_every_release(
    stored: str, save: Callable[..., Path], bias: torch.Tensor, tmp_path: Path
) -> None:
    # transformers 4 saves the head's alone. transformers 5 saves both, and the head's stays as it began; it
    # is the decoder's that it computes with.
    biases = {
        "head alone": {BIAS: bias},
        "decoder alone": {DECODER_BIAS: bias},
        "head untrained": {BIAS: torch.zeros_like(bias), DECODER_BIAS: bias},
    }[stored]
    out = tmp_path / "out"
    with open_checkpoint(save(biases)) as checkpoint:
        check(checkpoint, bias)
        assert checkpoint.folder is None
        checkpoint.materialize(out)
    written = load_file(out / "model.safetensors")
    torch.testing.assert_close(written[BIAS], bias, rtol=0, atol=0)
    torch.testing.assert_close(written[DECODER_BIAS], bias, rtol=0, atol=0)
    loaded, found = transformers.BertForPreTraining.from_pretrained(out, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    torch.testing.assert_close(loaded.cls.predictions.decoder.bias.detach(), bias, rtol=0, atol=0)
    with open_checkpoint(out) as checkpoint:
        check(checkpoint, bias)
        assert checkpoint.folder == out
