"""The reference: PyTorch in float32, through transformers."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bertrt.backends.base import Float32, Int64, TokenBatch
from bertrt.errors import ReferenceUnavailableError
from bertrt.manifest import Heads
from bertrt_export.checkpoints import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceOutput:
    """What the reference says about a batch; a head that the checkpoint lacks is ``None``.

    Attributes:
        hidden_states: ``[tokens, hidden] float32``, packed as the batch is.
        layers: the embeddings and every layer's output, each as ``hidden_states``; empty unless asked for.
        mlm_logits: ``[positions, vocab] float32``.
        pooled: ``[sequences, hidden] float32``.
        nsp_logits: ``[sequences, 2] float32``.
    """

    hidden_states: Float32
    layers: tuple[Float32, ...] = ()
    mlm_logits: Float32 | None = None
    pooled: Float32 | None = None
    nsp_logits: Float32 | None = None


class Reference(Protocol):
    """Answers what an engine is compared with."""

    def run(self, batch: TokenBatch, positions: Int64, *, layers: bool) -> ReferenceOutput:
        """Compute every head; masked LM at ``positions`` (``[n] int64``, into the packed tokens)."""
        ...


class TorchReference:
    """A ``BertForPreTraining`` of transformers in float32.

    Attention is transformers' plain ("eager") formula: no fused kernel that could share an error with ours.
    """

    def __init__(self, model: Any, heads: Heads) -> None:
        self._model = model
        self._heads = heads

    def run(self, batch: TokenBatch, positions: Int64, *, layers: bool) -> ReferenceOutput:
        """See `Reference`.

        Raises:
            ReferenceUnavailableError: the reference itself gives NaN or infinity.
        """
        import torch

        lengths = batch.lengths
        present = np.arange(int(lengths.max()))[None, :] < lengths[:, None]
        # Row-major order of the mask is the order of the packed tokens.
        ids, types = np.zeros(present.shape, np.int64), np.zeros(present.shape, np.int64)
        ids[present], types[present] = batch.input_ids, batch.token_type_ids
        mask = torch.from_numpy(present)
        with torch.inference_mode():
            output = self._model.bert(
                input_ids=torch.from_numpy(ids),
                token_type_ids=torch.from_numpy(types),
                attention_mask=mask.long(),
                output_hidden_states=layers,
            )
            hidden = output.last_hidden_state[mask]
            result = ReferenceOutput(
                hidden_states=hidden.numpy(),
                layers=tuple(state[mask].numpy() for state in output.hidden_states) if layers else (),
                mlm_logits=self._model.cls.predictions(hidden[torch.from_numpy(positions)]).numpy()
                if self._heads.mlm
                else None,
                pooled=output.pooler_output.numpy() if self._heads.pooler else None,
                nsp_logits=self._model.cls.seq_relationship(output.pooler_output).numpy()
                if self._heads.nsp
                else None,
            )
        for array in (result.hidden_states, result.mlm_logits, result.pooled, result.nsp_logits):
            if array is not None and not np.isfinite(array).all():
                raise ReferenceUnavailableError(
                    "PyTorch itself gives NaN or infinity for this checkpoint; there is nothing to compare "
                    "with: look for overflow in its weights"
                )
        return result


def require() -> dict[str, str]:
    """Check that the reference can run here; return the versions of what it needs.

    Raises:
        ReferenceUnavailableError: PyTorch or transformers is not installed, or cannot be imported.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ReferenceUnavailableError(
            f'the drift check needs PyTorch and transformers ({error}); pip install "bertrt[torch]"'
        ) from error
    return {"torch": str(torch.__version__), "transformers": str(transformers.__version__)}


@contextlib.contextmanager
def open_reference(checkpoint: Checkpoint, heads: Heads, *, threads: int) -> Iterator[TorchReference]:
    """Load a checkpoint with transformers, and use that many threads meanwhile.

    transformers reads a folder's files itself, so that an error of our own reader is seen. Weights that exist
    in no file (``random``) are written to a temporary folder first.

    Raises:
        ReferenceUnavailableError: PyTorch or transformers is missing, or cannot load the checkpoint whole.
    """
    require()
    import torch

    with contextlib.ExitStack() as stack:
        folder = checkpoint.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bertrt-reference-")))
            checkpoint.materialize(folder)
        before = torch.get_num_threads()
        stack.callback(torch.set_num_threads, before)
        torch.set_num_threads(threads)
        yield TorchReference(_load(folder, heads), heads)


def _load(folder: Path, heads: Heads) -> Any:
    import torch
    from transformers import BertForPreTraining

    with _quiet():
        try:
            model, info = BertForPreTraining.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                output_loading_info=True,
            )
        # Whatever goes wrong in there, the answer is the same: no reference. The cause is chained.
        except Exception as error:
            raise ReferenceUnavailableError(
                f"transformers cannot load the checkpoint {folder.name!r} ({_first_line(error)}); "
                "check that it is the checkpoint that was exported"
            ) from error
    needed = ["bert.embeddings", "bert.encoder"]
    needed += ["bert.pooler"] * (heads.pooler or heads.nsp)
    needed += ["cls.predictions"] * heads.mlm + ["cls.seq_relationship"] * heads.nsp
    missing = sorted(name for name in info["missing_keys"] if name.startswith(tuple(needed)))
    if missing:
        raise ReferenceUnavailableError(
            f"transformers does not find {missing[0]!r} ({len(missing)} in all) in the checkpoint "
            f"{folder.name!r} and would make it up; this transformers release cannot be the reference"
        )
    return model.eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what transformers reports while it loads; a missing head is no news here."""
    import logging as levels

    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(levels.ERROR)
    _show_bars(logging, False)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        _show_bars(logging, bars)


def _show_bars(logging: Any, shown: bool) -> None:
    # `Any`, as these functions have no types of their own.
    if shown:
        logging.enable_progress_bar()
    else:
        logging.disable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
