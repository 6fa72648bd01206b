"""The token ids that contestants are given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bertrt.errors import InputError
from bertrt_bench.cases import Case, Question, SpecialIds, make_question

# Neither first nor in a row, as in no well-known vocabulary.
SPECIAL = SpecialIds(cls=7, sep=2, pad=11, mask=5, unk=0)
VOCAB = 40


def draw(task: str, batch: int = 3, sequence: int = 12, seed: int = 0) -> Question:
    case = Case(task=task, batch=batch, sequence=sequence)
    return make_question(case, special=SPECIAL, vocab_size=VOCAB, seed=seed)


@pytest.mark.parametrize("task", ["features", "fill-mask", "mlm-all", "next-sentence"])
@pytest.mark.parametrize(("batch", "sequence"), [(1, 5), (3, 12), (8, 33)])
def test_special_tokens_are_in_their_places_only(task: str, batch: int, sequence: int) -> None:
    question = draw(task, batch, sequence)
    ids = question.tokens.input_ids.reshape(batch, sequence)
    assert question.tokens.lengths.tolist() == [sequence] * batch
    assert (ids[:, 0] == SPECIAL.cls).all()
    assert (ids[:, -1] == SPECIAL.sep).all()
    inner = ids[:, 1:-1]
    assert ids.min() >= 0
    assert ids.max() < VOCAB
    assert not np.isin(inner, [SPECIAL.cls, SPECIAL.pad, SPECIAL.unk]).any()
    masks = (inner == SPECIAL.mask).sum(axis=1)
    assert masks.tolist() == [1 if task in ("fill-mask", "mlm-all") else 0] * batch
    assert (inner == SPECIAL.sep).sum(axis=1).tolist() == [1 if task == "next-sentence" else 0] * batch


@pytest.mark.parametrize("task", ["features", "fill-mask", "mlm-all", "next-sentence"])
def test_a_mix_has_special_tokens_in_every_length(task: str) -> None:
    lengths = [5, 31, 8, 5, 12]
    question = make_question(Case.mix(task, lengths), special=SPECIAL, vocab_size=VOCAB)
    tokens = question.tokens
    assert tokens.lengths.tolist() == lengths
    for start, end in zip(tokens.offsets, tokens.offsets[1:], strict=False):
        ids, segments = tokens.input_ids[start:end], tokens.token_type_ids[start:end]
        assert (ids[0], ids[-1]) == (SPECIAL.cls, SPECIAL.sep)
        masks = np.flatnonzero(ids == SPECIAL.mask) + start
        assert masks.tolist() == [mask for mask in question.masks if start <= mask < end]
        assert len(masks) == (1 if task in ("fill-mask", "mlm-all") else 0)
        seps = np.flatnonzero(ids == SPECIAL.sep)
        assert len(seps) == (2 if task == "next-sentence" else 1)
        first = seps[0] + 1
        if task == "next-sentence":
            assert segments.tolist() == [0] * first + [1] * (len(ids) - first)
        check_segments(segments)


def check_segments(segments: np.ndarray) -> None:
    """One and then the other, each at least a token long."""
    second = int(segments.sum())
    assert 0 < second < len(segments)
    assert segments.tolist() == [0] * (len(segments) - second) + [1] * second


@pytest.mark.parametrize("task", ["features", "fill-mask", "mlm-all", "next-sentence"])
def test_segments_part_anywhere(task: str) -> None:
    segments = draw(task, 200, 10).tokens.token_type_ids.reshape(200, 10)
    for row in segments:
        check_segments(row)
    # A pair has a token of text and [SEP] in each segment.
    least, most = (2, 7) if task == "next-sentence" else (1, 8)
    assert set(segments.sum(axis=1).tolist()) == set(range(least, most + 1))


def test_a_case_says_its_shape() -> None:
    case, mix = Case(task="features", batch=2, sequence=6), Case.mix("fill-mask", [9, 3, 40])
    assert (str(case), case.tokens, case.sizes.tolist()) == ("features at 2x6", 12, [6, 6])
    assert (str(mix), mix.tokens, mix.sizes.tolist()) == (
        "fill-mask at 3 lengths of 3 to 40",
        52,
        [9, 3, 40],
    )
    assert [Case.from_json(json.loads(json.dumps(one.to_json()))) for one in (case, mix)] == [case, mix]


def test_masks_are_where_it_says() -> None:
    question = draw("fill-mask", 16, 9)
    assert (question.tokens.input_ids[question.masks] == SPECIAL.mask).all()
    assert (question.masks // 9).tolist() == list(range(16))


def test_second_half_of_a_pair_has_its_own_segment() -> None:
    question = draw("next-sentence", 2, 11)
    ids = question.tokens.input_ids.reshape(2, 11)
    segments = question.tokens.token_type_ids.reshape(2, 11)
    for row, segment in zip(ids, segments, strict=True):
        middle = int(np.flatnonzero(row == SPECIAL.sep)[0])
        assert segment.tolist() == [0] * (middle + 1) + [1] * (10 - middle)
        assert 1 < middle < 9


def test_a_model_with_one_segment_gets_one() -> None:
    case = Case(task="features", batch=2, sequence=8)
    question = make_question(case, special=SPECIAL, vocab_size=VOCAB, type_vocab_size=1)
    assert not question.tokens.token_type_ids.any()


def test_ids_are_drawn_from_all_the_rest() -> None:
    ids = draw("features", 64, 64).tokens.input_ids.reshape(64, 64)[:, 1:-1]
    assert set(ids.reshape(-1).tolist()) == set(range(VOCAB)) - {7, 2, 11, 5, 0}


def test_same_seed_same_ids() -> None:
    first, second, third = draw("features"), draw("features"), draw("features", seed=1)
    np.testing.assert_array_equal(first.tokens.input_ids, second.tokens.input_ids)
    assert (first.tokens.input_ids != third.tokens.input_ids).any()


def test_masked_lm_tasks_share_their_ids() -> None:
    np.testing.assert_array_equal(draw("fill-mask").tokens.input_ids, draw("mlm-all").tokens.input_ids)


def test_a_question_survives_its_files(tmp_path: Path) -> None:
    question = draw("fill-mask")
    question.save(tmp_path)
    again = Question.load(tmp_path, question.case)
    for name in ("input_ids", "token_type_ids", "offsets"):
        np.testing.assert_array_equal(getattr(again.tokens, name), getattr(question.tokens, name))
    np.testing.assert_array_equal(again.masks, question.masks)


@pytest.mark.parametrize(("task", "sequence"), [("features", 2), ("fill-mask", 2), ("next-sentence", 4)])
def test_a_sequence_without_room_for_text_is_refused(task: str, sequence: int) -> None:
    with pytest.raises(InputError, match=f"sequence of {sequence} tokens is too short for {task}"):
        draw(task, sequence=sequence)


def test_a_vocabulary_of_special_tokens_is_refused() -> None:
    special = SpecialIds(cls=0, sep=1, pad=2, mask=3, unk=4)
    with pytest.raises(InputError, match="none but special ones"):
        make_question(Case(task="features", batch=1, sequence=8), special=special, vocab_size=5)
