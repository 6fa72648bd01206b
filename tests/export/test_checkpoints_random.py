"""Random checkpoints: the right shapes, the same for the same seed, and never whole in memory."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from bertrt.architecture import BertArchitecture
from bertrt.errors import CheckpointNotFoundError, InputError
from bertrt.manifest import Heads, Source
from bertrt.tokenization import TokenizerSettings, WordPieceTokenizer
from bertrt_export.checkpoints import RANDOM_MODELS, Checkpoint, open_checkpoint
from bertrt_export.checkpoints.random_weights import RandomWeights, synthetic_vocab

# From the configurations of the checkpoints of these names.
SIZES = {
    "bert-base-cased": (12, 768, 12, 3072, 28_996),
    "bert-base-uncased": (12, 768, 12, 3072, 30_522),
    "bert-large-cased": (24, 1024, 16, 4096, 28_996),
}


def small(seed: int = 0, *, layers: int = 2, hidden: int = 24) -> Checkpoint:
    architecture = BertArchitecture(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=3,
        intermediate_size=2 * hidden,
        vocab_size=400,
        max_position_embeddings=50,
        type_vocab_size=2,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
    )
    return Checkpoint(
        RandomWeights(architecture, seed),
        architecture=architecture,
        config={},
        source=Source(kind="random", name="small", seed=seed),
        tokenizer=WordPieceTokenizer.from_vocab(
            synthetic_vocab(400, lowercase=False), TokenizerSettings(lowercase=False, model_max_length=50)
        ),
        folder=None,
    )


@pytest.mark.parametrize("name", SIZES)
def test_models(name: str) -> None:
    with open_checkpoint(name, random=True, seed=3) as checkpoint:
        architecture = checkpoint.architecture
        assert (
            architecture.num_hidden_layers,
            architecture.hidden_size,
            architecture.num_attention_heads,
            architecture.intermediate_size,
            architecture.vocab_size,
        ) == SIZES[name]
        assert checkpoint.source == Source(kind="random", name=name, seed=3)
        assert checkpoint.folder is None
        assert checkpoint.heads == Heads(mlm=True, nsp=True, pooler=True)
        assert checkpoint.tied_decoder
        tokenizer = checkpoint.tokenizer
        assert tokenizer.vocab_size == architecture.vocab_size
        assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id) == (0, 100, 101)
        assert (tokenizer.sep_id, tokenizer.mask_id) == (102, 103)
        assert tokenizer.settings.lowercase == name.endswith("uncased")
        with torch.device("meta"):
            model = transformers.BertForPreTraining(transformers.BertConfig(**checkpoint.config))
        shapes = {key.removeprefix("bert."): tuple(value.shape) for key, value in model.named_parameters()}
        assert list(checkpoint.tensor_names) == sorted(shapes)
        stored = checkpoint.tensor("encoder.layer.11.output.dense.weight")
        assert stored.shape == shapes["encoder.layer.11.output.dense.weight"]


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"'roberta-base'; choose among bert-base-cased, "):
        open_checkpoint("roberta-base", random=True)
    assert set(RANDOM_MODELS) == set(SIZES)


def test_revision_and_seed_that_mean_nothing() -> None:
    with pytest.raises(InputError, match="no revision, got 'main'"):
        open_checkpoint("bert-base-cased", random=True, revision="main")
    for seed in (-1, 1 << 63):
        with pytest.raises(InputError, match="seed must be from 0"):
            open_checkpoint("bert-base-cased", random=True, seed=seed)


def test_values() -> None:
    checkpoint = small()
    for name in checkpoint.tensor_names:
        values = checkpoint.tensor(name)
        assert values.dtype == np.float32
        if name.endswith("bias"):
            assert not values.any()
        elif "LayerNorm" in name:
            assert (values == 1).all()
        else:
            # The mean and the deviation of n samples spread by 1/sqrt(n) and 1/sqrt(2 n) of the deviation; five
            # times that for each of some thirty tensors.
            n = values.size
            assert abs(float(values.mean())) < 5 * 0.02 / n**0.5
            assert abs(float(values.std()) / 0.02 - 1) < 5 / (2 * n) ** 0.5


def test_numpy_is_imported_whole_before_anything_is_drawn() -> None:
    # A Ctrl-C while NumPy imports its generators on first use would be swallowed.
    code = "import bertrt_export.checkpoints.random_weights, sys; assert 'numpy.random' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_tensor_depends_on_seed_and_name_only() -> None:
    first, again, other, deeper = small(1), small(1), small(2), small(1, layers=5)
    names = [name for name in first.tensor_names if not name.endswith("bias") and "LayerNorm" not in name]
    for name in reversed(names):
        np.testing.assert_array_equal(first.tensor(name), again.tensor(name))
        np.testing.assert_array_equal(first.tensor(name), deeper.tensor(name))
        assert (first.tensor(name) != other.tensor(name)).any()
    query, key = (first.tensor(f"encoder.layer.0.attention.self.{part}.weight") for part in ("query", "key"))
    assert (query != key).any()


def test_one_tensor_at_a_time_is_in_memory() -> None:
    architecture = RANDOM_MODELS["bert-base-cased"]
    largest = 4 * architecture.vocab_size * architecture.hidden_size
    tracemalloc.start()
    try:
        with open_checkpoint("bert-base-cased", random=True) as checkpoint:
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            checkpoint.tensor("embeddings.word_embeddings.weight")
            for layer in range(4):
                checkpoint.tensor(f"encoder.layer.{layer}.intermediate.dense.weight")
            after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The largest tensor, one byte an element for the test that it is finite, and small change.
    assert peak - before < largest * 1.25 + (1 << 20)
    assert after - before < 1 << 20


def test_materialize_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    # 26 MB of weights, of which the largest tensor has 295 kB.
    checkpoint = small(layers=15, hidden=192)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        checkpoint.materialize(tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 15 << 20
    assert peak - before < 2 << 20


def test_materialized_random_checkpoint_is_loaded_by_transformers(tmp_path: Path) -> None:
    checkpoint = small(5)
    checkpoint.materialize(tmp_path / "out")
    model, report = transformers.BertForPreTraining.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values())
    state = {name.removeprefix("bert."): value.numpy() for name, value in model.state_dict().items()}
    for name in checkpoint.tensor_names:
        np.testing.assert_array_equal(state[name], checkpoint.tensor(name))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("Hello there!")["input_ids"]) == "[CLS] Hello there! [SEP]"


@pytest.mark.parametrize(("size", "lowercase"), [(28_996, False), (30_522, True), (400, True)])
def test_synthetic_vocabulary_spells_ascii(size: int, lowercase: bool, tmp_path: Path) -> None:
    vocab = synthetic_vocab(size, lowercase=lowercase)
    assert len(vocab) == len(set(vocab)) == size
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(vocab) + "\n", encoding="utf-8")
    reference = transformers.BertTokenizerFast(vocab_file=str(path), do_lower_case=lowercase)
    every = "".join(map(chr, range(128)))
    for text in (every, every[::-1], "The quick (brown) Fox's 12.5% e-mail <x@y.org> _~|^ [x] a1b2C3"):
        tokens = reference.tokenize(text)
        assert tokens
        assert "[UNK]" not in tokens
