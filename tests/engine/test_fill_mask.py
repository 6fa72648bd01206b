"""Fill-mask against the real transformers pipeline on the same checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bertrt.architecture import BertArchitecture
from bertrt.backends.base import BatchOutput
from bertrt.engine import Engine
from bertrt.errors import (
    EmptyTextError,
    InputError,
    MaskNotFoundError,
    SequenceTooLongError,
    TextEncodingError,
    TooManyMasksError,
)
from bertrt.manifest import Heads

# The runtime packs and pads otherwise than the pipeline, so float32 sums run in another order. A logit of this
# model (|logit| < 30) then moves by some 1e-5, a probability by that times itself. 1e-4 is the project's promise.
SCORE_TOLERANCE = 1e-4

ONE_MASK = [
    "Hello I'm a [MASK] model.",
    "The man worked as a [MASK].",
    "The woman worked as a [MASK].",
    "[MASK]",
    "[MASK] is the first word, and it was a very long way from there to the end of this sentence, they said.",
    "The last word is [MASK]",
    "A [PAD] in the text, a [SEP] too, and [MASK] .",
    "don't [MASK] it , she said ; it's unbearable !",
    "naïve café 漢字 \U0001f600 [MASK] ﬁ\u0301",
]
SEVERAL_MASKS = [
    "The [MASK] sat on the [MASK].",
    "[MASK][MASK] [MASK]",
    "He said [MASK] , [PAD] and [SEP] then [MASK] !",
]


@pytest.fixture(scope="module")
def pipeline(demo_checkpoint: Any, reference_tokenizer: Any) -> Any:
    model = transformers.BertForMaskedLM.from_pretrained(demo_checkpoint, dtype=torch.float32).eval()
    return transformers.pipeline("fill-mask", model=model, tokenizer=reference_tokenizer, device="cpu")


def check_predictions(found: Any, expected: Any) -> None:
    """Equal in shape, tokens, texts and order; scores within the tolerance."""
    assert isinstance(found, list)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, list):
            check_predictions(one, other)
        else:
            assert list(one) == ["score", "token", "token_str", "sequence"]
            assert [type(value) for value in one.values()] == [float, int, str, str]
            assert {**one, "score": None} == {**other, "score": None}
            assert one["score"] == pytest.approx(other["score"], abs=SCORE_TOLERANCE)


@pytest.mark.parametrize("text", ONE_MASK + SEVERAL_MASKS)
def test_one_text_is_answered_as_by_the_pipeline(any_engine: Engine, pipeline: Any, text: str) -> None:
    check_predictions(any_engine.fill_mask(text), pipeline(text))


@pytest.mark.parametrize("top_k", [1, 2, 20])
def test_lists_are_answered_as_by_the_pipeline(any_engine: Engine, pipeline: Any, top_k: int) -> None:
    texts = [*ONE_MASK, *SEVERAL_MASKS, ONE_MASK[0]]
    check_predictions(any_engine.fill_mask(texts, top_k=top_k), pipeline(texts, top_k=top_k))


def test_the_whole_vocabulary_can_be_asked_for(any_engine: Engine, pipeline: Any) -> None:
    text, size = "The man worked as a [MASK].", any_engine.architecture.vocab_size
    found = any_engine.fill_mask(text, top_k=size)
    assert sorted(row["token"] for row in found) == list(range(size))
    assert sum(row["score"] for row in found) == pytest.approx(1.0, abs=1e-5)
    by_token = {row["token"]: row for row in pipeline(text, top_k=size)}
    for row in found:  # ties may come in any order in the pipeline, so rows are compared by their token
        assert row["sequence"] == by_token[row["token"]]["sequence"]
        assert row["token_str"] == by_token[row["token"]]["token_str"]
        assert row["score"] == pytest.approx(by_token[row["token"]]["score"], abs=SCORE_TOLERANCE)


@pytest.mark.parametrize("text", ["The man worked as a [MASK].", "The [MASK] worked as a [MASK]."])
@pytest.mark.parametrize(
    "targets", ["lawyer", ["doctor", "nurse", "servant"], ["man", "##s", "[MASK]", "man"]]
)
@pytest.mark.parametrize("top_k", [2, 5])
def test_targets_are_answered_as_by_the_pipeline(
    any_engine: Engine, pipeline: Any, text: str, targets: Any, top_k: int
) -> None:
    names = [targets] if isinstance(targets, str) else targets
    assert all(any_engine.tokenizer.token_to_id(name) is not None for name in names)
    check_predictions(
        any_engine.fill_mask(text, targets=targets, top_k=top_k), pipeline(text, targets=targets, top_k=top_k)
    )


def test_a_list_of_one_stays_a_list(engine: Engine, pipeline: Any) -> None:
    found = engine.fill_mask(["The man worked as a [MASK]."])
    assert len(found) == 1
    check_predictions(found[0], pipeline("The man worked as a [MASK]."))


def test_no_texts_give_no_answers(engine: Engine) -> None:
    assert engine.fill_mask([]) == []
    assert engine.fill_mask(iter(())) == []


def test_a_target_outside_the_vocabulary_is_named(engine: Engine) -> None:
    with pytest.raises(InputError, match=r"targets not in the vocabulary: 'xylophonist', 'zzq'; "):
        engine.fill_mask("a [MASK]", targets=["man", "xylophonist", "zzq"])


def test_a_target_that_cannot_be_encoded_is_named(engine: Engine) -> None:
    with pytest.raises(TextEncodingError, match=r"target 'm\\udcffn' has a lone surrogate at position 1"):
        engine.fill_mask("a [MASK]", targets=["man", "m\udcffn"])


def test_texts_in_an_array(engine: Engine) -> None:
    one = engine.fill_mask("a [MASK]")
    assert engine.fill_mask(np.array(["a [MASK]"])) == [one]
    scalar: Any = np.array("a [MASK]")
    with pytest.raises(InputError, match="must be a str or a sequence of str, got ndarray"):
        engine.fill_mask(scalar)


@pytest.mark.parametrize("targets", [[], b"man", {"man"}, [None], np.array("man")])
def test_targets_that_are_none(engine: Engine, targets: Any) -> None:
    with pytest.raises(InputError, match="targets"):
        engine.fill_mask("a [MASK]", targets=targets)


@pytest.mark.parametrize("top_k", [0, -1, True, 1.5, "5", None, 8193, np.bool_(True)])
def test_top_k_is_checked(engine: Engine, top_k: Any) -> None:
    with pytest.raises(InputError, match=r"top_k must be a whole number from 1 to 8192, got "):
        engine.fill_mask("a [MASK]", top_k=top_k)


def test_options_are_checked_without_texts(engine: Engine) -> None:
    for options in ({"top_k": 0}, {"overflow": "cut"}, {"max_masks": 0}, {"stride": -1}, {"targets": []}):
        with pytest.raises(InputError):
            engine.fill_mask([], **options)


def test_numpy_integers_are_whole_numbers(engine: Engine) -> None:
    assert engine.fill_mask("a [MASK]", top_k=np.int64(2)) == engine.fill_mask("a [MASK]", top_k=2)


def test_bad_texts_are_named_by_their_index(engine: Engine) -> None:
    good = "a [MASK]"
    with pytest.raises(MaskNotFoundError, match=r"text 2 has no mask; write \[MASK\]"):
        engine.fill_mask([good, good, "no mask"])
    with pytest.raises(EmptyTextError, match="text 1"):
        engine.fill_mask([good, " \t"])
    with pytest.raises(TooManyMasksError, match=r"text 1 has 100 masks, the call allows 77; "):
        engine.fill_mask([good, "[MASK] " * 100])
    with pytest.raises(SequenceTooLongError, match=r"text 1 has 513 tokens, the model has 512 positions"):
        engine.fill_mask([good, "[MASK] " + "a " * 510])
    with pytest.raises(MaskNotFoundError, match="text 1"):
        engine.fill_mask([good, "a " * 600 + "[MASK]"], overflow="truncate")


def test_the_limits_themselves_are_allowed(engine: Engine) -> None:
    assert len(engine.fill_mask("[MASK] " * 77, top_k=1)) == 77
    assert len(engine.fill_mask("[MASK] " * 100, top_k=1, max_masks=100)) == 100
    assert len(engine.fill_mask("[MASK] " + "a " * 509, top_k=1)) == 1


def test_truncation_keeps_the_first_tokens(any_engine: Engine, pipeline: Any) -> None:
    text = "The man worked as a [MASK] . " + "It was late in the day . " * 100
    expected = pipeline(text, tokenizer_kwargs={"truncation": True})
    check_predictions(any_engine.fill_mask(text, overflow="truncate"), expected)


def test_a_text_that_fits_is_the_same_under_every_policy(engine: Engine) -> None:
    for text in (ONE_MASK[0], SEVERAL_MASKS[0]):
        answers = [engine.fill_mask(text, overflow=policy) for policy in ("error", "truncate", "window")]
        assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("stride", [None, 0, 7, 29])
@pytest.mark.parametrize("places", [(0,), (69,), (34,), (3, 31, 52, 68)])
def test_windows(
    make_engine: Any, pipeline: Any, prose: list[str], stride: int | None, places: tuple[int, ...]
) -> None:
    """Each mask is answered from the window in which its shorter side is longest."""
    engine = make_engine(positions=32)
    size, overlap = 30, 15 if stride is None else stride
    # 70 tokens, each one word, so that tokens can be cut and joined as text.
    words = [
        word
        for word in prose[0].replace(",", " ").split()
        if len(engine.tokenizer.encode([word], max_length=32)[0][0].input_ids) == 3
    ][:70]
    assert len(words) == 70
    for place in places:
        words[place] = "[MASK]"

    found = engine.fill_mask(" ".join(words), overflow="window", stride=stride)

    starts = [0]
    while starts[-1] + size < len(words):
        starts.append(starts[-1] + size - overlap)
    for number, place in enumerate(places):
        windows = [words[start : start + size] for start in starts]
        inside = [i for i, start in enumerate(starts) if start <= place < start + len(windows[i])]
        sides = {i: min(place - starts[i], starts[i] + len(windows[i]) - 1 - place) for i in inside}
        best = max(inside, key=lambda i: (sides[i], len(windows[i]), -i))
        expected = pipeline(" ".join(windows[best]))
        masks_inside = [
            other for other in places if starts[best] <= other < starts[best] + len(windows[best])
        ]
        if len(masks_inside) > 1:
            expected = expected[masks_inside.index(place)]
        answer = found[number] if len(places) > 1 else found
        if len(places) > 1 and len(masks_inside) == 1:
            # The pipeline does not know of the masks outside the window and hides the special tokens.
            expected = [{**row, "sequence": f"[CLS] {row['sequence']} [SEP]"} for row in expected]
        check_predictions(answer, expected)


def test_only_the_windows_that_answer_are_run(make_engine: Any) -> None:
    engine = make_engine(positions=32)
    engine.fill_mask("a " * 500 + "[MASK]" + " a" * 500, overflow="window")
    assert sum(batch.num_sequences for batch, _ in engine.backend.requests) == 1


def test_a_mask_in_an_overlap_counts_once(make_engine: Any) -> None:
    engine = make_engine(positions=32)
    text = "a " * 20 + "[MASK] " * 10 + "a " * 60
    assert len(engine.fill_mask(text, overflow="window", stride=29, max_masks=10)) == 10
    with pytest.raises(TooManyMasksError, match="10 masks"):
        engine.fill_mask(text, overflow="window", stride=29, max_masks=9)


def test_an_answer_does_not_depend_on_the_other_texts(make_engine: Any, prose: list[str]) -> None:
    engine = make_engine(token_budget=2048)
    texts = [f"{line[:120]} [MASK] ." for line in prose[:20]] + ONE_MASK
    together = engine.fill_mask(texts)
    for text, answer in zip(texts, together, strict=True):
        check_predictions(answer, engine.fill_mask(text))


def test_only_masks_go_through_the_head_and_logits_are_not_asked_for(engine: Engine) -> None:
    engine.fill_mask(ONE_MASK + SEVERAL_MASKS)
    asked = [wanted for _, wanted in engine.backend.requests]
    assert sum(len(wanted.mlm_positions) for wanted in asked) == len(ONE_MASK) + 2 + 3 + 2
    assert not any(
        wanted.mlm_logits or wanted.hidden_states or wanted.pooled or wanted.nsp for wanted in asked
    )


def test_masked_positions_of_a_batch_are_bounded(engine: Engine) -> None:
    engine.fill_mask(["[MASK] " * 60] * 40, top_k=1)
    rows = [len(wanted.mlm_positions) for _, wanted in engine.backend.requests]
    assert sum(rows) == 2400
    assert max(rows) <= 1024


def test_ids_beyond_the_tokenizer_have_no_text(
    tokenizer: Any, architecture: BertArchitecture, make_engine: Any
) -> None:
    """A model's vocabulary may be padded to a round number."""

    class PaddedVocabulary:
        name, threads, pads = "stub", 1, True

        def run(self, *_: Any) -> BatchOutput:
            return BatchOutput(
                mlm_top_ids=np.array([[8195, 20]]),
                mlm_top_log_probs=np.log(np.array([[0.5, 0.25]], np.float32)),
            )

        def close(self) -> None:
            pass

    sizes = BertArchitecture(**{**architecture.to_json(), "vocab_size": 8200})
    heads = Heads(mlm=True, nsp=False, pooler=False)
    engine = Engine(backend=PaddedVocabulary(), tokenizer=tokenizer, architecture=sizes, heads=heads)
    first, second = engine.fill_mask("a [MASK] b", top_k=2)
    assert first == {"score": 0.5, "token": 8195, "token_str": "", "sequence": "a b"}
    assert second["token"] == 20
