"""The Hugging Face configuration of a checkpoint: reading ``config.json``, and writing a clean one."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bertrt.architecture import BertArchitecture
from bertrt.errors import CheckpointNotFoundError, CorruptCheckpointError
from bertrt.manifest import Heads
from bertrt_export.checkpoints.weights import read_json

# Fields of transformers' BertConfig that matter only to those who train the model on.
_KEPT_NUMBERS = ("attention_probs_dropout_prob", "hidden_dropout_prob", "initializer_range")


def read_config(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's ``config.json``.

    Raises:
        CheckpointNotFoundError: there is none.
        CorruptCheckpointError: it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointNotFoundError(
            f"{str(folder)!r} has no config.json, so it is not a checkpoint; "
            "give the folder that save_pretrained wrote"
        )
    return read_json(path)


def ties_decoder(config: Mapping[str, Any]) -> bool:
    """Whether the configuration makes the word embedding table the decoder's weight; true unless it says no.

    Raises:
        CorruptCheckpointError: ``tie_word_embeddings`` is neither true nor false.
    """
    tied = config.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise CorruptCheckpointError(
            f"config.json: tie_word_embeddings must be true or false, got {tied!r}; correct the file"
        )
    return tied


def clean_config(
    config: Mapping[str, Any],
    architecture: BertArchitecture,
    *,
    heads: Heads,
    tied_decoder: bool,
    pad_id: int,
) -> dict[str, Any]:
    """Write down what is known about a checkpoint as transformers' ``BertConfig`` would.

    Every dimension is explicit, and nothing is taken over that BertRT does not know.

    Args:
        config: the configuration that was read, or an empty one.
        architecture: the dimensions.
        heads: which heads the checkpoint has.
        tied_decoder: the decoder's weight is the word embedding table.
        pad_id: the tokenizer's.
    """
    match (heads.mlm, heads.nsp):
        case (True, True):
            class_name = "BertForPreTraining"
        case (True, False):
            class_name = "BertForMaskedLM"
        case (False, True):
            class_name = "BertForNextSentencePrediction"
        case _:
            class_name = "BertModel"
    kept = {name: config[name] for name in _KEPT_NUMBERS if _is_number(config.get(name))}
    return {
        "architectures": [class_name],
        "model_type": "bert",
        **architecture.to_json(),
        # As the checkpoint calls it: transformers has two formulas of the tanh approximation, one a name.
        "hidden_act": config.get("hidden_act", architecture.hidden_act),
        **kept,
        "pad_token_id": pad_id,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": tied_decoder,
    }


def _is_number(value: object) -> bool:
    # No NaN, no infinity, and no whole number that has no float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
