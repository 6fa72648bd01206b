"""A checkpoint that has been opened: what it is, and its tensors one at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from bertrt.architecture import BertArchitecture
from bertrt.backends.base import Float32
from bertrt.errors import (
    CheckpointError,
    ExportError,
    MissingTensorError,
    NonFiniteWeightsError,
    TensorShapeError,
    TokenizerError,
    UnexpectedTensorError,
)
from bertrt.manifest import Heads, Source
from bertrt.tokenization import WordPieceTokenizer
from bertrt_export.checkpoints.config import clean_config, ties_decoder
from bertrt_export.checkpoints.names import (
    DECODER_BIAS,
    DECODER_WEIGHT,
    MLM_BIAS,
    WORD_EMBEDDINGS,
    required_shape,
    resolve_names,
)
from bertrt_export.checkpoints.safetensors_file import write_safetensors
from bertrt_export.checkpoints.store import FLOAT_TYPES, TensorStore


class Checkpoint:
    """A BERT's weights and what describes them; `open_checkpoint` makes one. A context manager.

    Tensors go by their canonical names: those of transformers' ``BertModel``, and for the heads those of
    ``BertForPreTraining``, whatever the files call them. Names, shapes and types are checked when a
    checkpoint is made, values when they are read.

    A configuration that ties the decoder (as it does unless it says otherwise) makes the word embedding table
    the decoder, even where the files hold another one: so transformers 4 reads them. An untied decoder has a
    bias of its own in transformers 5, beside a ``cls.predictions.bias`` that nothing reads; where a checkpoint
    holds both and they differ, the decoder's is taken. (transformers 4 computes with the other one, which
    transformers 5, having saved such a file, left untrained.)

    Attributes:
        architecture: the dimensions.
        heads: which heads there are.
        tied_decoder: there is a masked-LM head, and its decoder is the word embedding table.
        source: where the weights came from.
        tokenizer: the checkpoint's tokenizer.
        config: the Hugging Face configuration to write beside the model; plain JSON.
        tensor_names: canonical names of the tensors, sorted, without the decoder's weight if it is tied.
        folder: the local folder from which transformers loads the same model; ``None`` if there is none, or
            if some release of transformers refuses it or reads it in another way: `materialize` makes one.

    Args:
        store: the tensors under their stored names; closed with the checkpoint.
        architecture: see above.
        config: what ``config.json`` says.
        source: see above.
        tokenizer: see above.
        folder: where the files lie, if they do.

    Raises:
        MissingTensorError: a tensor of the encoder, or a part of a head, is not there.
        UnexpectedTensorError: a tensor that this BERT does not have, or two biases of a tied decoder.
        TensorShapeError: a tensor whose shape is not the configuration's, or that is not of a float type.
        TokenizerError: the tokenizer has tokens for which the model has no embedding.
    """

    def __init__(
        self,
        store: TensorStore,
        *,
        architecture: BertArchitecture,
        config: Mapping[str, Any],
        source: Source,
        tokenizer: WordPieceTokenizer,
        folder: Path | None,
    ) -> None:
        tied = ties_decoder(config)
        naming = resolve_names(architecture, store.infos, tied=tied)
        for name, stored in naming.stored.items():
            _check_tensor(architecture, name, stored, store)
        _check_tokenizer(architecture, tokenizer)
        names = dict(naming.stored)
        plain = naming.plain
        if DECODER_BIAS in names:
            decoder_bias = names.pop(DECODER_BIAS)
            if not _same_biases(store, names[MLM_BIAS], decoder_bias, tied=tied):
                names[MLM_BIAS], plain = decoder_bias, False
        if DECODER_WEIGHT in names:
            same = np.array_equal(store.read(names[DECODER_WEIGHT]), store.read(names[WORD_EMBEDDINGS]))
            plain = plain and (same or not tied)
            tied = tied or same
            if tied:
                del names[DECODER_WEIGHT]
        self.architecture = architecture
        self.heads: Heads = naming.heads
        self.tied_decoder = tied and naming.heads.mlm
        self.source = source
        self.tokenizer = tokenizer
        self.config: dict[str, Any] = clean_config(
            config, architecture, heads=naming.heads, tied_decoder=tied, pad_id=tokenizer.pad_id
        )
        self.tensor_names: tuple[str, ...] = tuple(sorted(names))
        self.folder = folder if plain else None
        self._stored_names = names
        self._store: TensorStore | None = store

    def tensor(self, name: str) -> Float32:
        """Read a tensor, widened to float32; matrices are ``[out, in]``, embedding tables ``[rows, hidden]``.

        Args:
            name: canonical. A tied decoder's weight can be had by its name too.

        Raises:
            MissingTensorError: the checkpoint has no such tensor.
            NonFiniteWeightsError: a weight is NaN or infinite.
            CheckpointError: the checkpoint is closed, or its file can no longer be read.
        """
        if self._store is None:
            raise CheckpointError(f"cannot read {name!r}: the checkpoint is closed; open it again")
        tied = self.tied_decoder and name == DECODER_WEIGHT
        stored = self._stored_names.get(WORD_EMBEDDINGS if tied else name)
        if stored is None:
            raise MissingTensorError(
                f"the checkpoint {self.source.name!r} has no tensor {name!r}; "
                "'tensor_names' lists what it has"
            )
        values = self._store.read(stored)
        finite = np.isfinite(values)
        if not finite.all():
            raise NonFiniteWeightsError(
                f"{stored!r} of the checkpoint {self.source.name!r} has "
                f"{values.size - np.count_nonzero(finite)} of {values.size} weights NaN or infinite, all "
                "must be finite; train or convert the model again"
            )
        return values

    def materialize(self, out: Path) -> None:
        """Write a folder that transformers' ``from_pretrained`` loads, with float32 weights.

        Holds one tensor in memory at a time.

        Args:
            out: a folder that does not exist, or is empty.

        Raises:
            ExportError: ``out`` is not an empty folder or cannot be written; nothing is left in it.
            NonFiniteWeightsError, CheckpointError: see `tensor`; nothing is left either.
        """
        try:
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise ExportError(f"{str(out)!r} exists and is not an empty folder; choose another place")
            created = not out.exists()
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExportError(
                f"cannot write to {str(out)!r}: {error.strerror}; choose another place"
            ) from error
        try:
            self._write(out)
        except BaseException as error:
            with contextlib.suppress(OSError):
                for path in out.iterdir():
                    path.unlink()
                if created:
                    out.rmdir()
            if isinstance(error, OSError):
                raise ExportError(
                    f"cannot write the checkpoint to {str(out)!r}: {error.strerror}; nothing was left behind"
                ) from error
            raise

    def _write(self, out: Path) -> None:
        # transformers knows heads only beside tensors with the prefix, and BertModel alone without one.
        prefix = "bert." if self.heads.mlm or self.heads.nsp else ""
        written = {name if name.startswith("cls.") else prefix + name: name for name in self.tensor_names}
        if self.heads.mlm and not self.tied_decoder:
            # transformers 4 reads the bias under the one name, transformers 5 under the other.
            written[DECODER_BIAS] = MLM_BIAS
        write_safetensors(
            out / "model.safetensors",
            {name: required_shape(self.architecture, canonical) for name, canonical in written.items()},
            lambda name: self.tensor(written[name]),
        )
        for name, text in {
            "config.json": json.dumps(self.config, indent=2),
            "tokenizer.json": self.tokenizer.to_json(),
            "tokenizer_config.json": json.dumps(self.tokenizer.settings.to_config(), indent=2),
        }.items():
            (out / name).write_text(text + "\n", encoding="utf-8")

    def close(self) -> None:
        """Release the files; calling it again does nothing."""
        store, self._store = self._store, None
        if store is not None:
            store.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _check_tensor(architecture: BertArchitecture, name: str, stored: str, store: TensorStore) -> None:
    # The decoder's bias is the head's own under another name.
    expected = required_shape(architecture, MLM_BIAS if name == DECODER_BIAS else name)
    info = store.infos[stored]
    if info.shape != expected:
        raise TensorShapeError(
            f"{stored!r} has shape {info.shape}, the dimensions in config.json make it {expected}; "
            "take weights and configuration from the same checkpoint"
        )
    if info.dtype not in FLOAT_TYPES:
        raise TensorShapeError(
            f"{stored!r} is stored as {info.dtype}, BertRT reads {', '.join(FLOAT_TYPES)}; "
            "take a checkpoint that is not quantised"
        )


def _same_biases(store: TensorStore, bias: str, decoder_bias: str, *, tied: bool) -> bool:
    # Two NaN are the same here; that they are no weights is said when they are read.
    same = np.array_equal(store.read(bias), store.read(decoder_bias), equal_nan=True)
    if tied and not same:
        raise UnexpectedTensorError(
            "the checkpoint holds two different biases of the masked-LM head, "
            f"{bias!r} and {decoder_bias!r}; BERT has one: remove the one that was not trained"
        )
    return same


def _check_tokenizer(architecture: BertArchitecture, tokenizer: WordPieceTokenizer) -> None:
    # A smaller vocabulary is well: tables are padded to a round number of rows.
    special = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
    tokens = max(tokenizer.vocab_size, *(token_id + 1 for token_id in special))
    if tokens > architecture.vocab_size:
        raise TokenizerError(
            f"the tokenizer has {tokens} tokens, the model has embeddings for {architecture.vocab_size}; "
            "take tokenizer and weights from the same checkpoint"
        )
