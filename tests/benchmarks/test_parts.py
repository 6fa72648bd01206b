"""Questions cut into padded blocks, and answers put together again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bertrt.batching import pack
from bertrt.tokenization import TokenizerSettings, WordPieceTokenizer
from bertrt_bench.cases import TASKS, TOP_K, Case, Question, SpecialIds, make_question
from bertrt_bench.contestants import parts
from bertrt_bench.contestants.parts import (
    Assembled,
    Block,
    best_tokens,
    cut,
    fastest_budget,
    measure_budgets,
    padded_run,
    told_of,
)
from bertrt_bench.texts import make_text_question

SPECIAL = SpecialIds(cls=2, sep=3, pad=0, mask=4, unk=1)
LENGTHS = (7, 5, 19, 6, 5, 12, 30)
VOCAB = 40
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tokenizer() -> WordPieceTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(code) for code in range(ord("a"), ord("z")))]
    return WordPieceTokenizer.from_vocab(words, TokenizerSettings(lowercase=True))


def ask(case: Case, tokenizer: WordPieceTokenizer) -> Question:
    if case.task == "fill-mask-text":
        return make_text_question(case, tokenizer)
    return make_question(case, special=SPECIAL, vocab_size=VOCAB)


class Model:
    """Answers each token from its id and its segment, each sequence from its sum; padding is poison."""

    def __init__(self, task: str) -> None:
        self.task = task
        self.table = RANDOM.normal(size=(2, VOCAB, VOCAB)).astype(np.float32)
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, block: Block) -> np.ndarray:
        assert block.input_ids.dtype == block.attention_mask.dtype == block.token_type_ids.dtype == np.int64
        self.shapes.append(block.input_ids.shape)
        states = self.table[block.token_type_ids, block.input_ids]
        if self.task == "next-sentence":
            return (states * block.attention_mask[..., None]).sum(axis=1)[:, :2]
        return np.where(block.attention_mask[..., None] == 1, states, np.nan)

    def alone(self, question: Question) -> dict[str, np.ndarray]:
        """The answer, sequence by sequence."""
        tokens = question.tokens
        states = self.table[tokens.token_type_ids, tokens.input_ids]
        if self.task == "next-sentence":
            ranges = zip(tokens.offsets, tokens.offsets[1:], strict=False)
            return {"logits": np.stack([states[start:end].sum(axis=0)[:2] for start, end in ranges])}
        if self.task in ("features", "mlm-all"):
            return {"hidden_states" if self.task == "features" else "logits": states}
        return dict(best_tokens(states[question.masks]))


@pytest.mark.parametrize("budget", [1, 20, 64, 1000])
@pytest.mark.parametrize("task", TASKS)
def test_blocks_answer_as_each_sequence_alone(task: str, budget: int, tokenizer: WordPieceTokenizer) -> None:
    question = ask(Case.mix(task, LENGTHS), tokenizer)
    model = Model(task)
    answer = padded_run(question, model, token_budget=budget, rank=best_tokens, tokenizer=tokenizer)()
    expected = model.alone(question)
    assert set(answer) == set(expected)
    for name, values in expected.items():
        # Sums of up to 30 float32 numbers, in another order.
        np.testing.assert_allclose(answer[name], values, rtol=1e-6, atol=1e-5)
    # Longest first, and no block with more padded tokens than allowed, but for a sequence alone.
    assert [length for _, length in model.shapes] == sorted((n for _, n in model.shapes), reverse=True)
    assert all(rows * length <= budget or rows == 1 for rows, length in model.shapes)
    assert sum(rows for rows, _ in model.shapes) == len(LENGTHS)


@pytest.mark.parametrize("task", TASKS)
def test_one_length_is_one_block_whatever_the_budget(task: str, tokenizer: WordPieceTokenizer) -> None:
    question = ask(Case(task=task, batch=4, sequence=9), tokenizer)
    model = Model(task)
    answer = padded_run(question, model, token_budget=1, rank=best_tokens, tokenizer=tokenizer)()
    for name, values in model.alone(question).items():
        np.testing.assert_allclose(answer[name], values, rtol=1e-6, atol=1e-5)
    assert model.shapes == [(4, 9)]


def test_the_text_task_tokenizes_each_time(tokenizer: WordPieceTokenizer, monkeypatch) -> None:
    question = ask(Case(task="fill-mask-text", batch=2, sequence=6), tokenizer)
    calls = []
    encode = WordPieceTokenizer.encode
    monkeypatch.setattr(
        WordPieceTokenizer,
        "encode",
        lambda self, *args, **options: calls.append(1) or encode(self, *args, **options),
    )
    run = padded_run(question, Model("fill-mask"), token_budget=100, rank=best_tokens, tokenizer=tokenizer)
    assert calls == []
    run()
    run()
    assert calls == [1, 1]


def test_a_part_without_a_budget_is_the_whole() -> None:
    question = ask(Case.mix("features", LENGTHS), None)
    (part,) = cut(question, token_budget=None)
    assert part.tokens is question.tokens
    assert part.places.tolist() == list(range(sum(LENGTHS)))


def test_a_block_is_padded_on_the_right() -> None:
    question = ask(Case.mix("fill-mask", [3, 5]), None)
    (part,) = cut(question, token_budget=None)
    block = Block.of(part)
    assert block.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert block.input_ids[0].tolist()[3:] == [0, 0]
    assert (block.input_ids[block.mask_rows, block.mask_columns] == SPECIAL.mask).all()


def test_best_tokens_are_those_of_pytorch() -> None:
    logits = (RANDOM.normal(size=(6, 100)) * 20).astype(np.float32)
    log_probs = torch.from_numpy(logits).double().log_softmax(dim=-1)
    best = log_probs.topk(TOP_K, dim=-1)
    found = best_tokens(logits)
    np.testing.assert_array_equal(found["ids"], best.indices.numpy())
    np.testing.assert_allclose(found["log_probs"], best.values.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["all_log_probs"], log_probs.numpy(), rtol=1e-5, atol=1e-5)


def test_assembled_answers_are_a_mapping() -> None:
    answer = Assembled(
        [(np.array([1]), {"x": np.ones((1, 2))}, None), (np.array([0]), {"x": np.zeros((1, 2))}, None)], 2
    )
    assert list(answer) == ["x"]
    assert len(answer) == 1
    np.testing.assert_array_equal(answer["x"], [[0, 0], [1, 1]])
    with pytest.raises(KeyError):
        answer["y"]


def test_a_mix_survives_its_files(tmp_path: Path, tokenizer: WordPieceTokenizer) -> None:
    question = ask(Case.mix("fill-mask-text", LENGTHS), tokenizer)
    question.save(tmp_path)
    again = Question.load(tmp_path, Case.from_json(question.case.to_json()))
    assert again.case == question.case
    assert again.texts == question.texts
    np.testing.assert_array_equal(again.tokens.offsets, question.tokens.offsets)
    encoded = pack([windows[0] for windows in tokenizer.encode(again.texts, max_length=512)])
    np.testing.assert_array_equal(encoded.input_ids, again.tokens.input_ids)


def test_the_fastest_budget_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [*range(100, 400), *range(20, 60)]
    question = ask(Case.mix("features", lengths), None)
    now = [0.0]
    monkeypatch.setattr(parts.time, "perf_counter", lambda: now[0])

    def costs(block: Block) -> np.ndarray:
        # A price for each block, and one for each padded token that rises in blocks of over 1,024.
        padded = block.real.size
        now[0] += 0.1 + padded * (0.001 if padded <= 1_024 else 0.002)
        return block.input_ids

    budget = fastest_budget(question, costs)
    assert budget == 1_024
    rate = measure_budgets(question, costs)[budget]
    whole = [Block.of(part) for part in cut(question, token_budget=budget)]
    start = now[0]
    for block in whole:
        costs(block)
    # Some blocks tell of all.
    assert rate == pytest.approx(sum(lengths) / (now[0] - start), rel=0.05)
    assert told_of(question, budget) == {"features of the mix": "blocks of 1,024 tokens"}


def test_one_length_leaves_no_choice() -> None:
    question = ask(Case(task="features", batch=2, sequence=600), None)
    shapes = []

    def forward(block: Block) -> np.ndarray:
        shapes.append(block.real.shape)
        return block.real

    budget = fastest_budget(question, forward)
    assert shapes == []
    # A model may still be compared with another.
    assert list(measure_budgets(question, forward)) == [budget]
    assert set(shapes) == {(2, 600)}
    assert told_of(question, budget) == {}
