"""The demo model's training examples: spans, masks and batches."""

import math

import numpy as np
import pytest
from tools.pretrain_demo.corpus import SPECIAL_TOKENS, Corpus
from tools.pretrain_demo.examples import ExampleSource


def numbered_source(corpus: Corpus) -> ExampleSource:
    # The special tokens come last and in another order than in a new vocabulary: no id is taken for granted.
    return ExampleSource(corpus, [*map(str, corpus.tokens), *reversed(SPECIAL_TOKENS)])


@pytest.mark.parametrize("room", [16, 17, 61, 125, 509])
def test_spans_follow_each_other_or_are_of_other_documents(numbered: Corpus, room: int) -> None:
    source = numbered_source(numbered)
    rng = np.random.default_rng(0)
    bounds = numbered.document_bounds
    starts = set(numbered.sentences.tolist())
    follows = 0
    draws = 1000
    for _ in range(draws):
        first, second, is_next = source.spans(rng, room)
        assert len(first) >= 1
        assert len(second) >= 1
        assert len(first) + len(second) <= room
        for span in (first, second):
            assert np.array_equal(span, np.arange(span[0], span[0] + len(span)))
        assert int(second[0]) in starts
        assert int(first[-1]) + 1 in starts
        documents = np.searchsorted(bounds, [first[0], first[-1], second[0], second[-1]], side="right")
        assert documents[0] == documents[1]
        assert documents[2] == documents[3]
        assert (documents[1] == documents[2]) == is_next
        assert (first[-1] + 1 == second[0]) or not is_next
        follows += is_next
    # Five standard deviations of a fair coin.
    assert abs(follows - draws / 2) < 5 * math.sqrt(draws / 4)


def test_documents_are_drawn_by_their_length(numbered: Corpus) -> None:
    source = numbered_source(numbered)
    rng = np.random.default_rng(0)
    bounds = numbered.document_bounds
    draws = 4000
    firsts = [source.spans(rng, 16)[0][0] for _ in range(draws)]
    share = np.histogram(firsts, bounds)[0] / draws
    expected = np.diff(bounds) / bounds[-1]
    assert np.all(np.abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / draws))


def test_masking_is_that_of_the_model_card(numbered: Corpus) -> None:
    # With few ordinary tokens, a random token that may be the same one would show among those that stay.
    vocabulary = ["a", "[MASK]", "b", "[SEP]", "c", "[PAD]", "d", "[UNK]", "e", "[CLS]", "f", "g"]
    # No token of the text is [PAD], [CLS], [SEP] or [MASK]; some are [UNK], as in any text.
    tokens = np.array([0, 2, 4, 6, 8, 10, 7], np.int32)[numbered.tokens % 7]
    corpus = Corpus(tokens=tokens, sentences=numbered.sentences, documents=numbered.documents)
    source = ExampleSource(corpus, vocabulary)
    rng = np.random.default_rng(0)
    masked = kept = total = 0
    for _ in range(1500):
        example = source.example(rng, 128)
        original = example.input_ids.copy()
        original[example.positions] = example.labels
        second = int(np.argmax(example.token_type_ids))
        assert original[0] == vocabulary.index("[CLS]")
        assert np.flatnonzero(original == vocabulary.index("[SEP]")).tolist() == [
            second - 1,
            len(original) - 1,
        ]
        assert np.all(example.token_type_ids == (np.arange(len(original)) >= second))
        assert len(example.positions) == max(1, round(0.15 * (len(original) - 3)))
        assert np.all(np.diff(example.positions) > 0)
        assert not np.isin(example.positions, [0, second - 1, len(original) - 1]).any()
        shown = example.input_ids[example.positions]
        is_mask = shown == vocabulary.index("[MASK]")
        is_same = shown == example.labels
        replaced = shown[~is_mask & ~is_same]
        assert not np.isin(replaced, [1, 3, 5, 7, 9]).any()
        masked, kept, total = masked + is_mask.sum(), kept + is_same.sum(), total + len(shown)
    for count, share in ((masked, 0.8), (kept, 0.1), (total - masked - kept, 0.1)):
        assert abs(count / total - share) < 5 * math.sqrt(share * (1 - share) / total)


@pytest.mark.parametrize("length", [64, 128, 512])
def test_examples_are_as_long_as_the_text_allows_and_no_longer(numbered: Corpus, length: int) -> None:
    source = numbered_source(numbered)
    rng = np.random.default_rng(0)
    lengths = [len(source.example(rng, length).input_ids) for _ in range(200)]
    assert max(lengths) == length
    assert min(lengths) >= 5


def test_a_batch_pads_and_points_at_its_masked_tokens(numbered: Corpus) -> None:
    source = numbered_source(numbered)
    batch = source.batch(np.random.default_rng(3), sequences=9, length=64)
    rng = np.random.default_rng(3)
    examples = [source.example(rng, 64) for _ in range(9)]
    assert batch.input_ids.shape == (9, max(len(example.input_ids) for example in examples))
    assert batch.tokens == sum(len(example.input_ids) for example in examples)
    assert batch.next_labels.tolist() == [0 if example.follows else 1 for example in examples]
    restored = batch.input_ids.flatten().clone()
    restored[batch.positions] = batch.labels
    pad = len(numbered.tokens) + 4
    for row, mask, types, example in zip(
        restored.view_as(batch.input_ids), batch.attention_mask, batch.token_type_ids, examples, strict=True
    ):
        count = len(example.input_ids)
        ids = example.input_ids.copy()
        ids[example.positions] = example.labels
        assert row.tolist() == [*ids.tolist(), *[pad] * (len(row) - count)]
        assert mask.tolist() == [1] * count + [0] * (len(row) - count)
        assert types[:count].tolist() == example.token_type_ids.tolist()
