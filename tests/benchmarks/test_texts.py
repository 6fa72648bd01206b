"""Texts of an exact number of tokens."""

from __future__ import annotations

import numpy as np
import pytest

from bertrt.errors import InputError
from bertrt.tokenization import TokenizerSettings, WordPieceTokenizer
from bertrt_bench.cases import Case
from bertrt_bench.texts import make_text_question, one_token_words
from bertrt_export.checkpoints.random_weights import synthetic_vocab

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tokenizer(words: list[str]) -> WordPieceTokenizer:
    return WordPieceTokenizer.from_vocab([*SPECIAL, *words], TokenizerSettings(lowercase=False))


@pytest.mark.parametrize(
    "case",
    [
        Case(task="fill-mask-text", batch=1, sequence=3),
        Case(task="fill-mask-text", batch=4, sequence=128),
        Case.mix("fill-mask-text", [9, 3, 40]),
    ],
)
def test_the_tokenizer_gives_the_ids_of_the_case(case: Case) -> None:
    made_up = WordPieceTokenizer.from_vocab(
        synthetic_vocab(2000, lowercase=False), TokenizerSettings(lowercase=False)
    )
    question = make_text_question(case, made_up)
    assert question.tokens.lengths.tolist() == case.sizes.tolist()
    for text, start, end in zip(
        question.texts, question.tokens.offsets, question.tokens.offsets[1:], strict=False
    ):
        ids = made_up.encode([text], max_length=512)[0][0].input_ids
        np.testing.assert_array_equal(ids, question.tokens.input_ids[start:end])
    assert (question.tokens.input_ids[question.masks] == made_up.mask_id).all()
    assert (np.searchsorted(question.tokens.offsets, question.masks, side="right") - 1).tolist() == list(
        range(case.batch)
    )
    assert make_text_question(case, made_up).texts == question.texts


def test_words_are_whole_and_plain() -> None:
    # "ab" is no token by itself: the tokenizer knows no longer piece than its letters.
    assert one_token_words(tokenizer(["a", "##b", "cd", "Ef", "1", "é", "!"])) == ["a", "cd"]


def test_a_vocabulary_without_words() -> None:
    with pytest.raises(InputError, match="no lower-case word of one token"):
        one_token_words(tokenizer(["A", "1", "##b"]))


def test_no_room_for_a_mask() -> None:
    with pytest.raises(InputError, match="2 tokens is too short for fill-mask-text"):
        make_text_question(Case(task="fill-mask-text", batch=1, sequence=2), tokenizer(["a"]))
