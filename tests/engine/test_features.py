"""Features against transformers' BertModel, and their windows against plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bertrt.engine import Engine
from bertrt.errors import EmptyTextError, InputError, SequenceTooLongError

# A hidden state is the outcome of a LayerNorm, so of order 1 (below 16 in this model). Sums over up to 1,024
# products in another order move it by some tens of roundings of 2^-24 in each of the four layers: near 1e-5 as a
# rule, several times that for the largest of 100,000 values.
TOLERANCE = 1e-4

TEXTS = [
    "Hello, world.",
    "a",
    "The Time Traveller smiled . " * 20,
    "漢字 \U0001f600 naïve",
    "a [MASK] [SEP] [PAD] b",
]
POOLINGS = ["none", "cls", "mean", "pooler"]


@pytest.fixture(scope="module")
def reference(reference_model: Any, reference_tokenizer: Any) -> Any:
    """``(text) -> {pooling: array}`` from one text at a time."""

    def run(text: str, **options: Any) -> dict[str, Any]:
        inputs = reference_tokenizer(text, return_tensors="pt", **options)
        with torch.inference_mode():
            output = reference_model.bert(**inputs)
        states = output.last_hidden_state[0].numpy()
        return {
            "none": states,
            "cls": states[0],
            "mean": states.astype(np.float64).mean(axis=0),
            "pooler": output.pooler_output[0].numpy(),
        }

    return run


@pytest.mark.parametrize("pooling", POOLINGS)
def test_features_are_those_of_the_reference(any_engine: Engine, reference: Any, pooling: str) -> None:
    found = any_engine.features(TEXTS, pooling=pooling)
    assert isinstance(found, list if pooling == "none" else np.ndarray)
    assert len(found) == len(TEXTS)
    for text, array in zip(TEXTS, found, strict=True):
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, reference(text)[pooling], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_one_text_gives_one_array(engine: Engine, reference: Any, pooling: str) -> None:
    found = engine.features(TEXTS[0], pooling=pooling)
    expected = reference(TEXTS[0])[pooling]
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_the_default_is_every_token(engine: Engine) -> None:
    assert engine.features("a b c").shape == (5, 256)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_text_alone_and_among_others(make_engine: Any, prose: list[str], pooling: str) -> None:
    engine = make_engine(token_budget=1024)
    texts = prose[:16]
    for text, array in zip(texts, engine.features(texts, pooling=pooling), strict=True):
        np.testing.assert_allclose(array, engine.features(text, pooling=pooling), atol=TOLERANCE, rtol=0)


def test_no_texts(engine: Engine) -> None:
    assert engine.features([]) == []
    for pooling in ("cls", "mean", "pooler"):
        found = engine.features([], pooling=pooling)
        assert found.shape == (0, 256)
        assert found.dtype == np.float32


def test_truncation(any_engine: Engine, reference: Any, prose: list[str]) -> None:
    text = " ".join(prose[:30])
    with pytest.raises(SequenceTooLongError, match="text 0"):
        any_engine.features(text)
    expected = reference(text, truncation=True, max_length=512)["none"]
    found = any_engine.features(text, overflow="truncate")
    assert found.shape == (512, 256)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_text_that_fits_is_the_same_under_every_policy(engine: Engine, pooling: str) -> None:
    answers = [
        engine.features(TEXTS[2], pooling=pooling, overflow=o) for o in ("error", "truncate", "window")
    ]
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0], answers[2])


def windowed_reference(reference: Any, words: list[str], size: int, overlap: int) -> dict[str, Any]:
    """Plain loops over the windows of a text whose words are single tokens."""
    starts = [0]
    while starts[-1] + size < len(words):
        starts.append(starts[-1] + size - overlap)
    windows = [(start, reference(" ".join(words[start : start + size]))) for start in starts]
    rows = [windows[0][1]["none"][0]]
    for place in range(len(words)):
        states = [
            output["none"][1 + place - start]
            for start, output in windows
            if start <= place < start + len(output["none"]) - 2
        ]
        rows.append(np.mean(np.array(states, np.float64), axis=0))
    rows.append(windows[-1][1]["none"][-1])
    lengths = np.array([len(output["none"]) for _, output in windows], np.float64)
    return {
        "none": np.array(rows),
        "mean": np.array(rows).mean(axis=0),
        **{
            pooling: sum(
                n * output[pooling].astype(np.float64)
                for n, (_, output) in zip(lengths, windows, strict=True)
            )
            / lengths.sum()
            for pooling in ("cls", "pooler")
        },
    }


@pytest.mark.parametrize("count", [29, 30, 31, 75])
@pytest.mark.parametrize("stride", [None, 0, 10, 29])
def test_windows(make_engine: Any, reference: Any, prose: list[str], count: int, stride: int | None) -> None:
    engine = make_engine(positions=32)
    words = [
        word
        for word in " ".join(prose[:3]).split()
        if len(engine.tokenizer.encode([word], max_length=32)[0][0].input_ids) == 3
    ][:count]
    assert len(words) == count
    text = " ".join(words)
    # A quarter of the 30 tokens of a window is the default.
    expected = windowed_reference(reference, words, 30, 7 if stride is None else stride)
    for pooling in POOLINGS:
        # The texts on either side have the same windows; nothing may leak from one text into another.
        found = engine.features(["a b", text, text], pooling=pooling, overflow="window", stride=stride)
        for array in found[1:]:
            assert array.dtype == np.float32
            assert array.shape == expected[pooling].shape
            np.testing.assert_allclose(array, expected[pooling], atol=TOLERANCE, rtol=0)


def test_arrays_do_not_share_memory(engine: Engine) -> None:
    first, second = engine.features(["a b c", "d e f"])
    kept = second.copy()
    first[:] = 0
    np.testing.assert_array_equal(second, kept)
    assert first.base is None


def test_nothing_is_computed_that_was_not_asked_for(engine: Engine) -> None:
    for pooling in POOLINGS:
        engine.features("a b", pooling=pooling)
    asked = [wanted for _, wanted in engine.backend.requests]
    assert [wanted.hidden_states for wanted in asked] == [True, True, True, False]
    assert [wanted.pooled for wanted in asked] == [False, False, False, True]
    assert all(wanted.mlm_positions is None and not wanted.nsp for wanted in asked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, r"pooling must be one of 'none', 'cls', 'mean', 'pooler', got 'max'"),
        ({"pooling": None}, "pooling must be one of"),
        ({"overflow": "cut"}, "overflow must be one of 'error', 'truncate', 'window', got 'cut'"),
        ({"stride": -1}, "stride must be a whole number from 0 to 509, got -1"),
        ({"stride": 510}, "stride must be a whole number from 0 to 509, got 510"),
        ({"stride": 1.5}, "stride must be a whole number"),
    ],
)
def test_options_are_checked(engine: Engine, options: Any, message: str) -> None:
    for texts in ("a b", []):
        with pytest.raises(InputError, match=message):
            engine.features(texts, **options)


def test_an_empty_text_is_named(engine: Engine) -> None:
    with pytest.raises(EmptyTextError, match="text 2"):
        engine.features(["a", "b", ""])
