"""The reference of a drift measurement is PyTorch, as transformers loads and runs the checkpoint."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bertrt.backends.base import TokenBatch
from bertrt.errors import ReferenceUnavailableError
from bertrt.manifest import Heads
from bertrt.tokenization import WordPieceTokenizer
from bertrt_export.checkpoints import Checkpoint, open_checkpoint
from bertrt_export.drift.reference import TorchReference, open_reference

POSITIONS = 50
ALL = Heads(mlm=True, nsp=True, pooler=True)


@pytest.fixture(scope="module")
def checkpoint(
    small_bert: Callable[..., transformers.BertForPreTraining], save_checkpoint: Callable[..., Path]
) -> Checkpoint:
    return open_checkpoint(save_checkpoint(small_bert()))


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> WordPieceTokenizer:
    return checkpoint.tokenizer


@pytest.fixture
def reference(checkpoint: Checkpoint) -> TorchReference:
    with open_reference(checkpoint, ALL, threads=2) as reference:
        return reference


@pytest.fixture
def batch() -> TokenBatch:
    ids = np.array([2, 7, 8, 9, 3], np.int32)
    return TokenBatch(ids, np.zeros_like(ids), np.array([0, 5], np.int64))


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("BertForPreTraining", ALL),
        ("BertForMaskedLM", Heads(mlm=True, nsp=False, pooler=False)),
        ("BertForNextSentencePrediction", Heads(mlm=False, nsp=True, pooler=True)),
        ("BertModel", Heads(mlm=False, nsp=False, pooler=True)),
    ],
)
def test_the_reference_is_the_model_that_was_saved(
    name: str, heads: Heads, save_checkpoint: Callable[..., Path], tokenizer: WordPieceTokenizer
) -> None:
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=POSITIONS,
    )
    model = getattr(transformers, name)(config).eval()
    texts = ["she went home", "rain", "oaks and bees"]
    encoded = [windows[0] for windows in tokenizer.encode(texts, max_length=POSITIONS)]
    batch = TokenBatch(
        np.concatenate([item.input_ids for item in encoded]),
        np.concatenate([item.token_type_ids for item in encoded]),
        np.cumsum([0, *(len(item.input_ids) for item in encoded)]),
    )
    positions = np.array([int(batch.offsets[1]) + 1, 2], np.int64)
    with (
        open_checkpoint(save_checkpoint(model)) as checkpoint,
        open_reference(checkpoint, heads, threads=2) as reference,
    ):
        assert checkpoint.heads == heads
        found = reference.run(batch, positions, layers=True)
    # One sequence at a time, without padding.
    hidden, rows, nsp, pooled = [], [], [], []
    for item in encoded:
        inputs = {
            "input_ids": torch.from_numpy(item.input_ids[None]).long(),
            "token_type_ids": torch.from_numpy(item.token_type_ids[None]).long(),
        }
        with torch.inference_mode():
            output = model(**inputs, output_hidden_states=True)
            hidden.append(output.hidden_states[-1][0].numpy())
            if heads.mlm:
                rows.append(
                    (output.prediction_logits if name == "BertForPreTraining" else output.logits)[0].numpy()
                )
            if heads.nsp:
                head = output.seq_relationship_logits if name == "BertForPreTraining" else output.logits
                nsp.append(head[0].numpy())
            if heads.pooler:
                body = model if name == "BertModel" else model.bert
                pooled.append(body(**inputs).pooler_output[0].numpy())
    # The same float32 arithmetic but for the order of sums: some units of 2^-24 of values near 1.
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 5e-6}
    np.testing.assert_allclose(found.hidden_states, np.concatenate(hidden), **close)
    np.testing.assert_array_equal(found.layers[-1], found.hidden_states)
    assert len(found.layers) == 3
    for array, head, parts in (
        (found.mlm_logits, heads.mlm, rows),
        (found.nsp_logits, heads.nsp, nsp),
        (found.pooled, heads.pooler, pooled),
    ):
        assert (array is not None) is head
        if array is not None and parts is rows:
            np.testing.assert_allclose(array, np.concatenate(rows)[positions], **close)
        elif array is not None:
            np.testing.assert_allclose(array, np.stack(parts), **close)


def test_a_checkpoint_without_a_folder_is_written_for_transformers(
    checkpoint: Checkpoint, reference: TorchReference, batch: TokenBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    positions = np.array([1, 3], np.int64)
    expected = reference.run(batch, positions, layers=False)
    monkeypatch.setattr(checkpoint, "folder", None)
    with open_reference(checkpoint, ALL, threads=2) as other:
        found = other.run(batch, positions, layers=False)
    # The same weights; where they lie in memory may change the order of sums, by some units of 2^-24.
    np.testing.assert_allclose(found.mlm_logits, expected.mlm_logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.nsp_logits, expected.nsp_logits, rtol=1e-5, atol=1e-6)


def test_threads_and_verbosity_are_as_they_were(
    checkpoint: Checkpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads(), transformers.logging.get_verbosity()
    with open_reference(checkpoint, ALL, threads=1):
        assert torch.get_num_threads() == 1
    assert (torch.get_num_threads(), transformers.logging.get_verbosity()) == before
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_without_pytorch_the_error_says_what_to_install(
    module: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None in sys.modules makes an import fail as if the package were not there.
    monkeypatch.setitem(sys.modules, module, None)
    with (
        pytest.raises(ReferenceUnavailableError, match=r'pip install "bertrt\[torch\]"'),
        open_reference(checkpoint, ALL, threads=1),
    ):
        pass


def test_weights_that_transformers_would_make_up_are_refused(
    checkpoint: Checkpoint, save_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=50,
    )
    monkeypatch.setattr(checkpoint, "folder", save_checkpoint(transformers.BertModel(config)))
    with (
        pytest.raises(ReferenceUnavailableError, match=r"does not find 'cls\.predictions.*would make it up"),
        open_reference(checkpoint, ALL, threads=1),
    ):
        pass


def test_a_folder_that_transformers_cannot_load(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "folder", tmp_path)
    with (
        pytest.raises(ReferenceUnavailableError, match="cannot load the checkpoint"),
        open_reference(checkpoint, ALL, threads=1),
    ):
        pass


def test_a_reference_that_is_not_finite_is_no_reference(reference: TorchReference, batch: TokenBatch) -> None:
    with torch.no_grad():
        reference._model.bert.pooler.dense.bias[0] = math.nan
    with pytest.raises(ReferenceUnavailableError, match="PyTorch itself gives NaN"):
        reference.run(batch, np.array([1], np.int64), layers=False)
