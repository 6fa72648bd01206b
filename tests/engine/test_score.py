"""Pseudo-log-likelihood against a plain loop over transformers' masked LM."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from bertrt.backends.base import BatchOutput
from bertrt.engine import Engine
from bertrt.errors import EmptyTextError, InputError, SequenceTooLongError
from bertrt.manifest import Heads

TEXTS = [
    "The man worked as a doctor.",
    "doctor a as worked man The.",
    "a",
    "He said [MASK] and [SEP] then [PAD] left \U0001f600",  # special tokens inside are context only
    "It was the best of times, it was the worst of times.",
]
# As in test_fill_mask, for each token's log-probability.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def reference(reference_model: Any, reference_tokenizer: Any) -> Any:
    def run(text: str, **options: Any) -> tuple[float, int]:
        inputs = reference_tokenizer(text, return_tensors="pt", **options)
        ids = inputs["input_ids"][0]
        special = {
            reference_tokenizer.convert_tokens_to_ids(t) for t in ("[CLS]", "[SEP]", "[PAD]", "[MASK]")
        }
        total, tokens = 0.0, 0
        for position, token in enumerate(ids.tolist()):
            if token not in special:
                masked = ids.clone()
                masked[position] = reference_tokenizer.mask_token_id
                with torch.inference_mode():
                    logits = reference_model(**{**inputs, "input_ids": masked[None]}).prediction_logits
                total += float(logits[0, position].double().log_softmax(dim=-1)[token])
                tokens += 1
        return total, tokens

    return run


def test_scores_are_those_of_the_reference(any_engine: Engine, reference: Any) -> None:
    for text, found in zip(TEXTS, any_engine.score(TEXTS), strict=True):
        total, tokens = reference(text)
        assert found.tokens == tokens
        assert found.log_likelihood == pytest.approx(total, abs=TOLERANCE * tokens)
        assert found.pseudo_perplexity == pytest.approx(math.exp(-total / tokens), rel=TOLERANCE)


def test_sense_is_more_probable_than_nonsense(engine: Engine) -> None:
    sense, nonsense = engine.score(TEXTS[:2])
    assert sense.log_likelihood > nonsense.log_likelihood
    assert sense.pseudo_perplexity < nonsense.pseudo_perplexity


def test_one_text_gives_one_score(engine: Engine) -> None:
    one, [same] = engine.score(TEXTS[0]), engine.score([TEXTS[0]])
    assert one == same
    assert isinstance(one.log_likelihood, float)
    assert isinstance(one.tokens, int)


def test_a_text_alone_and_among_others(make_engine: Any) -> None:
    engine = make_engine(token_budget=64)
    for text, found in zip(TEXTS, engine.score(TEXTS), strict=True):
        alone = engine.score(text)
        assert found.tokens == alone.tokens
        assert found.log_likelihood == pytest.approx(alone.log_likelihood, abs=TOLERANCE * alone.tokens)


def test_copies_are_made_batch_by_batch(make_engine: Any) -> None:
    """Each batch stays within the budget, has one mask a sequence, and asks for one candidate only."""
    engine = make_engine(token_budget=64)
    engine.score(["one two three four five six seven eight", *TEXTS])
    assert len(engine.backend.requests) > 5
    for batch, wanted in engine.backend.requests:
        assert batch.lengths.max() * batch.num_sequences <= 64
        assert wanted.mlm_candidates.shape == (batch.num_sequences, 1)
        assert not wanted.mlm_logits
        assert not wanted.mlm_top_k
        owners = np.searchsorted(batch.offsets, wanted.mlm_positions, side="right") - 1
        assert owners.tolist() == list(range(batch.num_sequences))
        assert (batch.input_ids[wanted.mlm_positions] == engine.tokenizer.mask_id).all()


def test_no_texts(engine: Engine) -> None:
    assert engine.score([]) == []


def test_what_cannot_be_scored(engine: Engine) -> None:
    with pytest.raises(InputError, match="text 1 has special tokens only"):
        engine.score(["a", "[MASK] [SEP]"])
    with pytest.raises(EmptyTextError, match="text 1"):
        engine.score(["a", "\n"])
    with pytest.raises(SequenceTooLongError, match="text 0"):
        engine.score("a " * 511)
    with pytest.raises(InputError, match="overflow must be one of 'error', 'truncate', got 'window'"):
        engine.score("a", overflow="window")


def test_truncation(make_engine: Any) -> None:
    engine = make_engine(positions=12)
    assert engine.score("a b c d e f g h i j k l m n", overflow="truncate") == engine.score(
        "a b c d e f g h i j"
    )


def test_an_impossible_token_makes_the_perplexity_infinite(tokenizer: Any, architecture: Any) -> None:
    class Impossible:
        name, threads, pads = "stub", 1, True

        def run(self, _: Any, wanted: Any) -> BatchOutput:
            return BatchOutput(
                mlm_candidate_log_probs=np.full(wanted.mlm_candidates.shape, -2000, np.float32)
            )

        def close(self) -> None:
            pass

    heads = Heads(mlm=True, nsp=False, pooler=False)
    engine = Engine(backend=Impossible(), tokenizer=tokenizer, architecture=architecture, heads=heads)
    found = engine.score("a b")
    assert (found.log_likelihood, found.tokens, found.pseudo_perplexity) == (-4000.0, 2, math.inf)
