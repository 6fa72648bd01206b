"""BERT in plain PyTorch, for machines without transformers: the rivals compute with it, and it is a reference.

Its modules have the canonical names of `bertrt_export.checkpoints.names`, so that a checkpoint's tensors are its state.
Only worker processes import it: PyTorch is heavy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.nn import functional

from bertrt.architecture import Activation, BertArchitecture
from bertrt.manifest import Heads
from bertrt_export.checkpoints import Checkpoint
from bertrt_export.checkpoints.names import DECODER_WEIGHT, WORD_EMBEDDINGS

Attention = Literal["eager", "sdpa"]

_ACTIVATIONS: Final[Mapping[Activation, Any]] = {
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


class TorchBert(nn.Module):  # type: ignore[misc]  # PyTorch's types are skipped
    """An encoder with its heads, in eval mode and without gradients.

    Args:
        architecture: the dimensions.
        heads: those that there are.
        attention: ``eager``, the plain formula with all scores in memory, or ``sdpa``,
            ``scaled_dot_product_attention``, which takes a fused kernel where there is one.
    """

    def __init__(self, architecture: BertArchitecture, heads: Heads, attention: Attention) -> None:
        super().__init__()
        hidden, wide = architecture.hidden_size, architecture.intermediate_size
        self.architecture = architecture
        self.attention: Attention = attention

        def dense(inputs: int, outputs: int, *, bias: bool = True) -> Any:
            return nn.Linear(inputs, outputs, bias=bias)

        def norm() -> Any:
            return nn.LayerNorm(hidden, eps=architecture.layer_norm_eps)

        def layer() -> Any:
            products = {name: dense(hidden, hidden) for name in ("query", "key", "value")}
            return _tree(
                attention=_tree(
                    self=_tree(**products), output=_tree(dense=dense(hidden, hidden), LayerNorm=norm())
                ),
                intermediate=_tree(dense=dense(hidden, wide)),
                output=_tree(dense=dense(wide, hidden), LayerNorm=norm()),
            )

        self.embeddings = _tree(
            word_embeddings=nn.Embedding(architecture.vocab_size, hidden),
            position_embeddings=nn.Embedding(architecture.max_position_embeddings, hidden),
            token_type_embeddings=nn.Embedding(architecture.type_vocab_size, hidden),
            LayerNorm=norm(),
        )
        layers = [layer() for _ in range(architecture.num_hidden_layers)]
        self.encoder = _tree(layer=nn.ModuleList(layers))
        if heads.pooler:
            self.pooler = _tree(dense=dense(hidden, hidden))
        self.cls = _tree()
        if heads.mlm:
            transform = _tree(dense=dense(hidden, hidden), LayerNorm=norm())
            decoder = dense(hidden, architecture.vocab_size, bias=False)
            self.cls["predictions"] = _tree(transform=transform, decoder=decoder)
            bias = nn.Parameter(torch.empty(architecture.vocab_size))
            self.cls["predictions"].register_parameter("bias", bias)
        if heads.nsp:
            self.cls["seq_relationship"] = dense(hidden, 2)
        self.eval().requires_grad_(False)

    def forward(self, ids: Any, segments: Any, present: Any = None) -> Any:
        """The last hidden state.

        Args:
            ids: ``[batch, sequence] int64``.
            segments: ``[batch, sequence] int64``.
            present: ``[batch, sequence] bool``, what is no padding; ``None`` where nothing is padding.

        Returns:
            ``[batch, sequence, hidden]`` in the weights' type.
        """
        return self.layers(ids, segments, present)[-1]

    def layers(self, ids: Any, segments: Any, present: Any = None) -> list[Any]:
        """The embeddings and every layer's output, each ``[batch, sequence, hidden]``; as `forward`."""
        tables = self.embeddings
        positions = torch.arange(ids.shape[1], device=ids.device)
        summed = tables["word_embeddings"](ids) + tables["token_type_embeddings"](segments)
        states = [tables["LayerNorm"](summed + tables["position_embeddings"](positions))]
        mask = None if present is None else self._mask(present, states[0].dtype)
        activation = _ACTIVATIONS[self.architecture.hidden_act]
        for layer in self.encoder["layer"]:
            attended = self._attend(states[-1], layer["attention"], mask)
            wide = activation(layer["intermediate"]["dense"](attended))
            output = layer["output"]
            states.append(output["LayerNorm"](output["dense"](wide) + attended))
        return states

    def pool(self, first: Any) -> Any:
        """The pooler's output of the first tokens' hidden states ``[batch, hidden]``."""
        return torch.tanh(self.pooler["dense"](first))

    def next_sentence(self, first: Any) -> Any:
        """``[batch, 2]``: the next-sentence logits of the first tokens' hidden states."""
        return self.cls["seq_relationship"](self.pool(first))

    def masked_lm(self, hidden: Any) -> Any:
        """``[rows, vocab]``: the masked-LM logits of hidden states ``[rows, hidden]``."""
        predictions = self.cls["predictions"]
        transform, activation = predictions["transform"], _ACTIVATIONS[self.architecture.hidden_act]
        rows = transform["LayerNorm"](activation(transform["dense"](hidden)))
        return predictions["decoder"](rows) + predictions.bias

    def _mask(self, present: Any, dtype: Any) -> Any:
        rows = present[:, None, None, :]
        if self.attention == "sdpa":
            return rows
        return torch.zeros_like(rows, dtype=dtype).masked_fill(~rows, torch.finfo(dtype).min)

    def _attend(self, states: Any, attention: Any, mask: Any) -> Any:
        batch, sequence, hidden = states.shape
        products, output = attention["self"], attention["output"]
        query, key, value = (
            products[name](states)
            .view(batch, sequence, self.architecture.num_attention_heads, -1)
            .transpose(1, 2)
            for name in ("query", "key", "value")
        )
        if self.attention == "sdpa":
            context = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            scores = query @ key.transpose(-1, -2) / math.sqrt(self.architecture.head_size)
            scores = scores if mask is None else scores + mask
            context = scores.softmax(dim=-1) @ value
        context = context.transpose(1, 2).reshape(batch, sequence, hidden)
        return output["LayerNorm"](output["dense"](context) + states)


def load_model(checkpoint: Checkpoint, *, attention: Attention, dtype: Any, device: str) -> TorchBert:
    """A checkpoint as a `TorchBert`.

    Args:
        checkpoint: an open one.
        attention: see `TorchBert`.
        dtype: of weights and arithmetic, such as ``torch.float16``.
        device: ``cpu`` or ``cuda``.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    with torch.device("meta"):
        model = TorchBert(checkpoint.architecture, checkpoint.heads, attention)
    state = {
        name: torch.from_numpy(checkpoint.tensor(name)).to(device=device, dtype=dtype)
        for name in checkpoint.tensor_names
    }
    if checkpoint.tied_decoder:
        state[DECODER_WEIGHT] = state[WORD_EMBEDDINGS]
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)  # type: ignore[no-any-return]  # as above


def _tree(**modules: Any) -> Any:
    return nn.ModuleDict(modules)
