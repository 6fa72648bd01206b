"""The tensors of a BERT: their canonical names and shapes, and what checkpoints call them.

Canonical are the names of transformers' ``BertModel`` (no ``bert.`` prefix, ``weight`` and ``bias`` in
LayerNorm) and, for the heads, those of ``BertForPreTraining``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from bertrt.architecture import BertArchitecture
from bertrt.errors import MissingTensorError, UnexpectedTensorError
from bertrt.manifest import Heads
from bertrt_export.checkpoints.store import quote

WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"
DECODER_WEIGHT = "cls.predictions.decoder.weight"
MLM_BIAS = "cls.predictions.bias"
# transformers registers the bias of the masked-LM head a second time, as the bias of its decoder. Where the
# decoder is untied, transformers 5 makes them two: it computes with the decoder's, and with zeros without one.
DECODER_BIAS = "cls.predictions.decoder.bias"

EMBEDDING_NAMES = (
    WORD_EMBEDDINGS,
    "embeddings.position_embeddings.weight",
    "embeddings.token_type_embeddings.weight",
    "embeddings.LayerNorm.weight",
    "embeddings.LayerNorm.bias",
)
POOLER_NAMES = ("pooler.dense.weight", "pooler.dense.bias")
NSP_NAMES = ("cls.seq_relationship.weight", "cls.seq_relationship.bias")
# Without the decoder's weight, which a tied checkpoint does not have.
MLM_NAMES = (
    "cls.predictions.transform.dense.weight",
    "cls.predictions.transform.dense.bias",
    "cls.predictions.transform.LayerNorm.weight",
    "cls.predictions.transform.LayerNorm.bias",
    MLM_BIAS,
)
_OUTER_NAMES = frozenset((*EMBEDDING_NAMES, *POOLER_NAMES, *NSP_NAMES, *MLM_NAMES, DECODER_WEIGHT))
_LAYER_PARTS = tuple(
    f"{module}.{kind}"
    for module in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "attention.output.LayerNorm",
        "intermediate.dense",
        "output.dense",
        "output.LayerNorm",
    )
    for kind in ("weight", "bias")
)
_LAYER = re.compile(r"encoder\.layer\.(0|[1-9][0-9]{0,8})\.(.+)")

# Constants that older releases of transformers saved with the weights; they hold no knowledge.
_BUFFERS = frozenset({"embeddings.position_ids", "embeddings.token_type_ids"})
_OLD_SUFFIXES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_PREFIX = "bert."
_SHOWN = 5


def expected_shape(architecture: BertArchitecture, name: str) -> tuple[int, ...] | None:
    """The shape of a tensor by its canonical name, or ``None`` if no such BERT has it.

    Matrices are ``[out, in]``, embedding tables ``[rows, hidden]``.
    """
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    if layer := _LAYER.fullmatch(name):
        part = layer[2]
        known = int(layer[1]) < architecture.num_hidden_layers and part in _LAYER_PARTS
    else:
        part = name
        known = part in _OUTER_NAMES
    if not known:
        return None
    match part:
        case "embeddings.word_embeddings.weight" | "cls.predictions.decoder.weight":
            return (architecture.vocab_size, hidden)
        case "embeddings.position_embeddings.weight":
            return (architecture.max_position_embeddings, hidden)
        case "embeddings.token_type_embeddings.weight":
            return (architecture.type_vocab_size, hidden)
        case "intermediate.dense.weight":
            return (inner, hidden)
        case "intermediate.dense.bias":
            return (inner,)
        case "output.dense.weight":
            return (hidden, inner)
        case "cls.predictions.bias":
            return (architecture.vocab_size,)
        case "cls.seq_relationship.weight":
            return (2, hidden)
        case "cls.seq_relationship.bias":
            return (2,)
    return (hidden,) if part.endswith(".bias") or "LayerNorm" in part else (hidden, hidden)


def required_shape(architecture: BertArchitecture, name: str) -> tuple[int, ...]:
    """`expected_shape` of a tensor that the architecture has.

    Raises:
        MissingTensorError: it has none of that name.
    """
    shape = expected_shape(architecture, name)
    if shape is None:
        raise MissingTensorError(f"a BERT with these dimensions has no tensor {name!r}; see its config.json")
    return shape


def encoder_names(architecture: BertArchitecture) -> Iterator[str]:
    """The canonical names that every BERT has: embeddings and layers, in order."""
    yield from EMBEDDING_NAMES
    for layer in range(architecture.num_hidden_layers):
        for part in _LAYER_PARTS:
            yield f"encoder.layer.{layer}.{part}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """How the tensors of a checkpoint are called.

    Attributes:
        stored: for each canonical name, ``cls.predictions.decoder.*`` included where stored, the stored one.
        heads: those whose tensors are all there.
        plain: transformers' own loader finds the same tensors in the files as we do.
    """

    stored: Mapping[str, str]
    heads: Heads
    plain: bool


def resolve_names(architecture: BertArchitecture, stored: Iterable[str], *, tied: bool) -> Naming:
    """Find out what each stored tensor is.

    Args:
        architecture: the model's dimensions.
        stored: the names in the files.
        tied: the decoder of the masked-LM head is the word embedding table, and needs no tensor of its own.

    Raises:
        UnexpectedTensorError: a tensor that this BERT does not have, or one tensor under two names.
        MissingTensorError: a tensor of the encoder, or a part of a head, is not there.
    """
    found: dict[str, str] = {}
    unexpected = []
    names = sorted(stored)
    prefixed = any(name.startswith(_PREFIX) for name in names)
    for name in names:
        canonical = _canonical(name, prefixed=prefixed)
        if canonical in _BUFFERS:
            continue
        if canonical is None or (
            canonical != DECODER_BIAS and expected_shape(architecture, canonical) is None
        ):
            unexpected.append(name)
        elif canonical in found:
            raise UnexpectedTensorError(
                f"the checkpoint holds {quote(canonical)} twice, as {quote(found[canonical])} and as {quote(name)}; "
                "remove one"
            )
        else:
            found[canonical] = name
    if unexpected:
        raise UnexpectedTensorError(
            f"the checkpoint holds tensors that a BERT with {architecture.num_hidden_layers} layers does not "
            f"have ({len(unexpected)}): {_some(unexpected)}; BertRT reads BertForPreTraining, "
            "BertForMaskedLM, BertForNextSentencePrediction and BertModel"
        )
    _require(found, encoder_names(architecture), "its configuration needs them")
    heads = _heads(found, tied=tied)
    # transformers (4.57) knows heads only beside prefixed tensors, and leaves a masked-LM head uninitialised
    # whose bias is stored as the decoder's alone; transformers 5 needs an untied one under both names.
    biases = (MLM_BIAS in found, DECODER_BIAS in found)
    found_by_all = biases[0] >= biases[1] if tied else biases[0] == biases[1]
    plain = (prefixed or not (heads.mlm or heads.nsp)) and found_by_all
    if heads.mlm and MLM_BIAS not in found:
        found[MLM_BIAS] = found.pop(DECODER_BIAS)
    return Naming(stored=found, heads=heads, plain=plain)


def _canonical(name: str, *, prefixed: bool) -> str | None:
    if prefixed and not name.startswith("cls."):
        if not name.startswith(_PREFIX):
            return None
        name = name[len(_PREFIX) :]
        if name.startswith("cls."):
            return None
    for old, new in _OLD_SUFFIXES.items():
        if name.endswith(old):
            return name[: -len(old)] + new
    return name


def _heads(found: Mapping[str, str], *, tied: bool) -> Heads:
    """Say which heads are whole; one of which only a part is there is an error."""
    mlm = any(name in found for name in (*MLM_NAMES, DECODER_WEIGHT, DECODER_BIAS))
    if mlm:
        needed = [name for name in MLM_NAMES if name != MLM_BIAS or DECODER_BIAS not in found]
        if not tied:
            needed.append(DECODER_WEIGHT)
        _require(found, needed, "the rest of the masked-LM head is there")
    nsp = any(name in found for name in NSP_NAMES)
    if nsp:
        _require(
            found, (*NSP_NAMES, *POOLER_NAMES), "the next-sentence head needs them, and is there in part"
        )
    pooler = any(name in found for name in POOLER_NAMES)
    if pooler:
        _require(found, POOLER_NAMES, "the rest of the pooler is there")
    return Heads(mlm=mlm, nsp=nsp, pooler=pooler)


def _require(found: Mapping[str, str], names: Iterable[str], reason: str) -> None:
    # One more than is shown, and no further: a configuration may claim millions of layers.
    missing = list(islice((name for name in names if name not in found), _SHOWN + 1))
    if missing:
        raise MissingTensorError(
            f"the checkpoint lacks tensors, though {reason}: {_some(missing)}; "
            "compare config.json with the weights, or get the checkpoint anew"
        )


def _some(names: list[str]) -> str:
    return ", ".join(quote(name) for name in names[:_SHOWN]) + (" and more" if len(names) > _SHOWN else "")
