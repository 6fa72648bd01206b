"""Random weights in the shape of real models, for measuring latency where there is no network."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Mapping
from itertools import product

import numpy as np

# Here and not through `np.random`: NumPy imports that module when it is first asked for it, and a Ctrl-C
# meanwhile gets lost.
from numpy.random import SFC64, Generator

from bertrt.architecture import BertArchitecture
from bertrt.backends.base import Float32
from bertrt.errors import CheckpointNotFoundError, InputError
from bertrt.tokenization import TokenizerSettings, WordPieceTokenizer
from bertrt_export.checkpoints.names import (
    MLM_NAMES,
    NSP_NAMES,
    POOLER_NAMES,
    encoder_names,
    required_shape,
)
from bertrt_export.checkpoints.store import TensorInfo

# What BERT initialises its matrices with (Devlin et al. 2019; `initializer_range` of transformers).
_DEVIATION = 0.02
_LARGEST_SEED = (1 << 63) - 1


def _architecture(vocab_size: int, *, large: bool = False) -> BertArchitecture:
    return BertArchitecture(
        hidden_size=1024 if large else 768,
        num_hidden_layers=24 if large else 12,
        num_attention_heads=16 if large else 12,
        intermediate_size=4096 if large else 3072,
        vocab_size=vocab_size,
        max_position_embeddings=512,
        type_vocab_size=2,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
    )


# Sizes of the checkpoints of these names (https://github.com/google-research/bert).
RANDOM_MODELS: Mapping[str, BertArchitecture] = {
    "bert-base-cased": _architecture(28_996),
    "bert-base-uncased": _architecture(30_522),
    "bert-large-cased": _architecture(28_996, large=True),
}


def random_model(name: str) -> tuple[BertArchitecture, WordPieceTokenizer]:
    """The dimensions of a known model, and a tokenizer with a synthetic vocabulary of its size.

    Raises:
        CheckpointNotFoundError: no known model has that name.
    """
    architecture = RANDOM_MODELS.get(name)
    if architecture is None:
        raise CheckpointNotFoundError(
            f"there are no random weights in the shape of {name!r}; choose among {', '.join(RANDOM_MODELS)}"
        )
    lowercase = name.endswith("-uncased")
    settings = TokenizerSettings(lowercase=lowercase, model_max_length=architecture.max_position_embeddings)
    vocab = synthetic_vocab(architecture.vocab_size, lowercase=lowercase)
    return architecture, WordPieceTokenizer.from_vocab(vocab, settings)


class RandomWeights:
    """All tensors of a BERT with every head and a tied decoder, made when they are read.

    Matrices and embedding tables are normal with mean 0 and deviation 0.02, biases 0, LayerNorm the identity.
    A tensor depends on the seed and on its name only, so reading one does not need the others.

    Raises:
        InputError: a seed that is negative or has more than 63 bits.
    """

    def __init__(self, architecture: BertArchitecture, seed: int) -> None:
        if not 0 <= seed <= _LARGEST_SEED:
            raise InputError(f"seed must be from 0 to {_LARGEST_SEED}, got {seed}; choose another")
        self._seed = seed
        self._infos = {}
        for name in (*encoder_names(architecture), *POOLER_NAMES, *MLM_NAMES, *NSP_NAMES):
            self._infos[name] = TensorInfo(shape=required_shape(architecture, name), dtype="float32")

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Shape and type of each tensor by its canonical name."""
        return self._infos

    def read(self, name: str) -> Float32:
        """Make a tensor."""
        shape = self._infos[name].shape
        if name.endswith("bias"):
            return np.zeros(shape, np.float32)
        if name.endswith("LayerNorm.weight"):
            return np.ones(shape, np.float32)
        # Not hash(), which differs from run to run.
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = Generator(SFC64(int.from_bytes(digest, "little")))
        values = generator.standard_normal(shape, dtype=np.float32)
        values *= np.float32(_DEVIATION)
        return values

    def close(self) -> None:
        """Nothing is open."""


def synthetic_vocab(size: int, *, lowercase: bool) -> list[str]:
    """A vocabulary that spells every ASCII text: special tokens, characters, and combinations of letters.

    The special tokens have the ids that they have in Google's vocabularies (0 and 100 to 103).
    """
    characters = [
        character
        for character in map(chr, range(ord("!"), ord("~") + 1))
        if not (lowercase and character.isupper())
    ]
    words = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += characters
    words += (f"##{character}" for character in characters)
    for length in (2, 3, 4):
        for letters in product(string.ascii_lowercase, repeat=length):
            if len(words) >= size:
                return words[:size]
            piece = "".join(letters)
            words += (piece, f"##{piece}")
    return words[:size]
