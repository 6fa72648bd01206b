"""Next sentence against transformers' BertForNextSentencePrediction on the same checkpoint."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bertrt.backends.base import BatchOutput
from bertrt.engine import Engine
from bertrt.errors import EmptyTextError, InputError, SequenceTooLongError
from bertrt.manifest import Heads

# As in test_fill_mask: sums in another order move a logit by some 1e-5, a probability by a quarter of that.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def reference(demo_checkpoint: Any, reference_tokenizer: Any) -> Any:
    model = transformers.BertForNextSentencePrediction.from_pretrained(demo_checkpoint, dtype=torch.float32)
    model.eval()

    def probability(a: str, b: str) -> float:
        inputs = reference_tokenizer(a, b, return_tensors="pt", truncation=True, max_length=512)
        with torch.inference_mode():
            return float(model(**inputs).logits.softmax(dim=-1)[0, 0])

    return probability


def pairs(prose: list[str]) -> tuple[list[str], list[str]]:
    short = [line[:400] for line in prose]
    following = pairwise(short[:13])
    elsewhere = [(short[i], short[-i - 1]) for i in range(6)]
    a, b = zip(*following, *elsewhere, strict=True)
    return list(a), list(b)


def test_probabilities_are_those_of_the_reference(
    any_engine: Engine, reference: Any, prose: list[str]
) -> None:
    a, b = pairs(prose)
    found = any_engine.next_sentence(a, b)
    assert [type(value) for value in found] == [float] * len(a)
    np.testing.assert_allclose(found, [reference(*pair) for pair in zip(a, b, strict=True)], atol=TOLERANCE)
    # Both answers occur, so that the columns cannot have been taken the wrong way round.
    assert min(found) < 0.5 < max(found)


def test_one_pair_gives_one_number(engine: Engine, reference: Any, prose: list[str]) -> None:
    found = engine.next_sentence(prose[0], prose[1])
    assert isinstance(found, float)
    assert found == pytest.approx(reference(prose[0], prose[1]), abs=TOLERANCE)


def test_a_pair_alone_and_among_others(make_engine: Any, prose: list[str]) -> None:
    engine = make_engine(token_budget=512)
    a, b = pairs(prose)
    alone = [engine.next_sentence(*pair) for pair in zip(a, b, strict=True)]
    np.testing.assert_allclose(engine.next_sentence(a, b), alone, atol=TOLERANCE)


def test_truncation_is_that_of_the_reference(any_engine: Engine, reference: Any, prose: list[str]) -> None:
    short, long = prose[0], " ".join(prose[:40])
    for a, b in ((short, long), (long, short), (long, long)):
        with pytest.raises(SequenceTooLongError, match="pair 0"):
            any_engine.next_sentence(a, b)
        found = any_engine.next_sentence(a, b, overflow="truncate")
        assert found == pytest.approx(reference(a, b), abs=TOLERANCE)


def test_only_the_next_sentence_head_is_asked_for(engine: Engine) -> None:
    engine.next_sentence("a", "b")
    [(_, wanted)] = engine.backend.requests
    assert wanted.nsp
    assert wanted.mlm_positions is None
    assert not wanted.hidden_states
    assert not wanted.pooled


def test_no_pairs(engine: Engine) -> None:
    assert engine.next_sentence([], []) == []


def test_what_is_no_pair(engine: Engine) -> None:
    with pytest.raises(InputError, match="a has 2 texts and b has 1"):
        engine.next_sentence(["a", "b"], ["c"])
    with pytest.raises(InputError, match="both be str or both"):
        engine.next_sentence("a", ["b"])
    with pytest.raises(InputError, match="b is bytes"):
        engine.next_sentence("a", b"b")
    with pytest.raises(EmptyTextError, match="second text of pair 1"):
        engine.next_sentence(["a", "b"], ["c", " "])
    with pytest.raises(InputError, match="overflow must be one of 'error', 'truncate', got 'window'"):
        engine.next_sentence("a", "b", overflow="window")


def test_extreme_logits_do_not_overflow(tokenizer: Any, architecture: Any) -> None:
    logits = np.array([[3e38, -3e38], [-1000, 1000], [5, 5], [0, 1]], np.float32)

    class Extreme:
        name, threads, pads = "stub", 1, True

        def run(self, *_: Any) -> BatchOutput:
            return BatchOutput(nsp_logits=logits)

        def close(self) -> None:
            pass

    heads = Heads(mlm=False, nsp=True, pooler=True)
    engine = Engine(backend=Extreme(), tokenizer=tokenizer, architecture=architecture, heads=heads)
    found = engine.next_sentence(["a"] * 4, ["b"] * 4)
    assert found == pytest.approx([1.0, 0.0, 0.5, 1 / (1 + np.e)], abs=1e-12)
