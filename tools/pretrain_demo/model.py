"""The demo model: made new, read from a folder to train it further, and written to a folder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BertConfig, BertForPreTraining, BertTokenizerFast

from bertrt.errors import CheckpointNotFoundError, CorruptCheckpointError, InputError, UnsupportedModelError

from .corpus import SPECIAL_TOKENS

POSITIONS = 512
HEAD_SIZE = 64
WEIGHTS_FILE = "model.safetensors"
VOCABULARY_FILE = "vocab.txt"
# Amplitude and longest wave (in positions, over 2 pi) of the position table's start.
_POSITION_AMPLITUDE = 0.04
_POSITION_WAVE = 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The dimensions of a new model; heads are 64 wide, the feed-forward layer four times the hidden size."""

    layers: int = 4
    hidden: int = 256
    vocabulary: int = 8192

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise InputError(f"{self.layers} layers were asked for; expected at least 1")
        if self.hidden < HEAD_SIZE or self.hidden % HEAD_SIZE:
            raise InputError(f"a hidden size of {self.hidden} is not a positive multiple of {HEAD_SIZE}")
        if self.vocabulary <= len(SPECIAL_TOKENS) + 1:
            raise InputError(f"a vocabulary of {self.vocabulary} WordPieces is too small to learn anything")


def new_model(shape: ModelShape, *, seed: int) -> BertForPreTraining:
    """A model with seeded random weights, on which attention soon finds neighbours.

    The position table starts as a sinusoid (Vaswani et al. 2017, section 3.5) and is learned from there.
    Without dropout: the model sees each text a few times only, and underfits.
    """
    torch.manual_seed(seed)
    model = BertForPreTraining(
        BertConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.hidden // HEAD_SIZE,
            intermediate_size=4 * shape.hidden,
            max_position_embeddings=POSITIONS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    with torch.no_grad():
        places = torch.arange(POSITIONS, dtype=torch.float32)[:, None]
        channels = torch.arange(0, shape.hidden, 2, dtype=torch.float32)
        angles = places * torch.exp(channels * (-math.log(_POSITION_WAVE) / shape.hidden))
        table = model.bert.embeddings.position_embeddings.weight
        table[:, 0::2] = torch.sin(angles) * _POSITION_AMPLITUDE
        table[:, 1::2] = torch.cos(angles) * _POSITION_AMPLITUDE
    return model


def load_model(folder: Path) -> tuple[BertForPreTraining, list[str]]:
    """Read a model in float32, and its vocabulary, from a folder that `save_model` wrote.

    Raises:
        CheckpointNotFoundError: there is no such folder, or a file of it is missing.
        CorruptCheckpointError: a file cannot be parsed.
        UnsupportedModelError: the model is not one that this program trains.
    """
    for name in ("config.json", WEIGHTS_FILE, VOCABULARY_FILE):
        if not (folder / name).is_file():
            raise CheckpointNotFoundError(
                f"{str(folder)!r} has no {name}; --resume takes a folder that this program wrote"
            )
    try:
        vocabulary = (folder / VOCABULARY_FILE).read_text(encoding="utf-8").rstrip("\n").split("\n")
        model, report = BertForPreTraining.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # safetensors and transformers raise their own kinds, and ValueError, OSError
        raise CorruptCheckpointError(f"cannot read the model in {str(folder)!r}: {error}") from error
    config = model.config
    if (
        report["missing_keys"]
        or config.max_position_embeddings != POSITIONS
        or config.vocab_size != len(vocabulary)
        or not set(SPECIAL_TOKENS) <= set(vocabulary)
    ):
        raise UnsupportedModelError(
            f"the model in {str(folder)!r} is not a BertForPreTraining with both heads, {POSITIONS} "
            f"positions and a vocabulary that has {', '.join(SPECIAL_TOKENS)}; "
            "--resume takes a folder that this program wrote"
        )
    return model.float(), vocabulary


def round_weights(model: BertForPreTraining) -> None:
    """Round the weights to float16, as they are written, so that what is measured is what is published."""
    model.half().float()


def save_model(model: BertForPreTraining, vocabulary: Sequence[str], folder: Path) -> None:
    """Write weights (float16), configuration and tokenizer into an empty folder, for ``from_pretrained``."""
    vocabulary_file = folder / VOCABULARY_FILE
    vocabulary_file.write_text("".join(f"{token}\n" for token in vocabulary), encoding="utf-8", newline="\n")
    tokenizer = BertTokenizerFast(
        vocab_file=str(vocabulary_file),
        do_lower_case=False,
        strip_accents=False,
        tokenize_chinese_chars=True,
        model_max_length=POSITIONS,
    )
    tokenizer.save_pretrained(folder)
    model.half().save_pretrained(folder)
    # safetensors makes its files private; this one shall follow the user's umask like the others.
    shutil.copymode(folder / "config.json", folder / WEIGHTS_FILE)
