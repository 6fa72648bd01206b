"""The dimensions of a BERT, as far as they decide what is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from bertrt.errors import ManifestError, UnsupportedModelError

Activation = Literal["gelu", "gelu_new", "relu"]

# What checkpoints write in `hidden_act`, and the function that it means: `gelu` is the exact one (erf),
# `gelu_new` the tanh approximation, which transformers also knows as `gelu_pytorch_tanh`.
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "relu": "relu",
}

# An upper bound for every dimension: a corrupt or hostile file must not make us allocate without limit.
_LARGEST_DIMENSION = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class BertArchitecture:
    """Sizes and constants of one BERT (Devlin et al. 2019, https://arxiv.org/abs/1810.04805).

    Attributes:
        hidden_size: width of the residual stream, a multiple of ``num_attention_heads``.
        num_hidden_layers: encoder layers.
        num_attention_heads: heads of each layer.
        intermediate_size: width of the feed-forward layer.
        vocab_size: WordPieces.
        max_position_embeddings: the longest sequence in tokens, special tokens included.
        type_vocab_size: segments (2 for a model with next-sentence prediction).
        hidden_act: activation of the feed-forward layer and of the masked-LM head.
        layer_norm_eps: added to the variance in every LayerNorm.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    type_vocab_size: int
    hidden_act: Activation
    layer_norm_eps: float

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BertArchitecture:
        """Read a Hugging Face ``config.json``.

        One without ``model_type``, as early releases of transformers wrote it, is BERT's unless its
        ``architectures`` name another class.

        Raises:
            UnsupportedModelError: not BERT, or a BERT with a part that is not implemented; names the part.
        """
        model_type = config.get("model_type")
        if "model_type" not in config:
            classes = config.get("architectures") or []
            if not isinstance(classes, list) or not all(str(name).startswith("Bert") for name in classes):
                raise UnsupportedModelError(
                    f"config.json has no model_type, and says architectures={classes!r}; BertRT runs BERT "
                    "only: choose another, or add the model_type"
                )
        elif model_type != "bert":
            raise UnsupportedModelError(
                f"config.json says model_type={model_type!r}; BertRT runs 'bert' only: choose another"
            )
        positions = config.get("position_embedding_type", "absolute")
        if positions != "absolute":
            raise UnsupportedModelError(
                f"config.json says position_embedding_type={positions!r}; only 'absolute' is implemented"
            )
        if config.get("is_decoder") or config.get("add_cross_attention"):
            raise UnsupportedModelError(
                "config.json says is_decoder or add_cross_attention; only BERT encoders are implemented"
            )
        if "embedding_size" in config and config["embedding_size"] != config.get("hidden_size"):
            raise UnsupportedModelError(
                f"config.json says embedding_size={config['embedding_size']!r}, hidden_size="
                f"{config.get('hidden_size')!r}; factorised embeddings are not implemented"
            )
        activation = config.get("hidden_act", "gelu")
        if not isinstance(activation, str) or activation not in _ACTIVATIONS:
            raise UnsupportedModelError(
                f"config.json says hidden_act={activation!r}; implemented are {', '.join(_ACTIVATIONS)}"
            )
        # The defaults are those of transformers' BertConfig: a config may leave out what equals them.
        defaults = {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "vocab_size": 30522,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
        }
        sizes = {name: config.get(name, default) for name, default in defaults.items()}
        epsilon = config.get("layer_norm_eps", 1e-12)
        problem = _problem({**sizes, "layer_norm_eps": epsilon})
        if problem:
            raise UnsupportedModelError(f"config.json: {problem}")
        return cls(**sizes, hidden_act=_ACTIVATIONS[activation], layer_norm_eps=float(epsilon))

    @classmethod
    def from_json(cls, value: object) -> BertArchitecture:
        """Read what `to_json` wrote.

        Raises:
            ManifestError: a field is missing, unknown or out of range.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(value, Mapping) or set(value) != names:
            raise ManifestError(f"engine.json: 'architecture' must hold exactly {', '.join(sorted(names))}")
        # A list or an object has no place in a set: its type comes first.
        activation = value["hidden_act"]
        if not isinstance(activation, str) or activation not in set(_ACTIVATIONS.values()):
            raise ManifestError(f"engine.json: unknown hidden_act {activation!r}; export the engine again")
        problem = _problem(value)
        if problem:
            raise ManifestError(f"engine.json: architecture: {problem}")
        return cls(**value)

    def to_json(self) -> dict[str, int | float | str]:
        """The fields by name, for the manifest."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _problem(sizes: Mapping[str, Any]) -> str | None:
    """Say what is wrong with the numbers of an architecture, or None."""
    for name, value in sizes.items():
        if name in {"layer_norm_eps", "hidden_act"}:
            continue
        if type(value) is not int or not 1 <= value <= _LARGEST_DIMENSION:
            return f"{name} must be a whole number from 1 to {_LARGEST_DIMENSION}, got {value!r}"
    epsilon = sizes["layer_norm_eps"]
    if not isinstance(epsilon, int | float) or isinstance(epsilon, bool) or not 0 <= epsilon < 1:
        return f"layer_norm_eps must be a number from 0 to 1, got {epsilon!r}"
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        return (
            f"hidden_size {sizes['hidden_size']} is not a multiple of "
            f"num_attention_heads {sizes['num_attention_heads']}"
        )
    return None
