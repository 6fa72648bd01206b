"""The check of answers on random weights: rounding passes in every precision, a wrong answer in none."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from bertrt.backends.base import Wanted
from bertrt.backends.registry import create_backend
from bertrt.folder import EngineFolder
from bertrt_bench.agreement import TOLERANCES, compare
from bertrt_bench.cases import Case, Question, SpecialIds, make_question
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.exporter import export_engine

# The weights are as wide as sums of this many products need to have the size that bert-base-cased's have with 0.02.
HIDDEN = 96
WIDTH = 0.02 * math.sqrt(768 / HIDDEN)
BATCH, SEQUENCE = 8, 32
TASKS = ("features", "mlm-all", "next-sentence")
SPECIAL = SpecialIds(cls=2, sep=3, pad=0, mask=4, unk=1)


@pytest.fixture(scope="module")
def model() -> transformers.BertForPreTraining:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=300,
        hidden_size=HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=4 * HIDDEN,
        max_position_embeddings=64,
        initializer_range=WIDTH,
    )
    return transformers.BertForPreTraining(config).eval()


def ask(task: str, seed: int = 0) -> Question:
    case = Case(task=task, batch=BATCH, sequence=SEQUENCE)
    return make_question(case, special=SPECIAL, vocab_size=300, seed=seed)


def answer(
    model: transformers.BertForPreTraining, question: Question, *, segments: bool = True
) -> dict[str, np.ndarray]:
    ids, types = (
        torch.from_numpy(values.reshape(BATCH, SEQUENCE)).long()
        for values in (question.tokens.input_ids, question.tokens.token_type_ids)
    )
    with torch.inference_mode():
        output = model(
            ids, token_type_ids=types if segments else torch.zeros_like(types), output_hidden_states=True
        )
    if question.case.task == "features":
        return {"hidden_states": output.hidden_states[-1].reshape(-1, HIDDEN).numpy()}
    if question.case.task == "mlm-all":
        return {"logits": output.prediction_logits.flatten(0, 1).numpy()}
    return {"logits": output.seq_relationship_logits.numpy()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fault", ["another question", "without segments"])
@pytest.mark.parametrize("task", TASKS)
def test_a_wrong_answer_is_refused_in_every_precision(model, task: str, fault: str, seed: int) -> None:
    question = ask(task, seed)
    right = answer(model, question)
    if fault == "another question":
        wrong = answer(model, ask(task, seed + 100))
    else:
        wrong = answer(model, question, segments=False)
    for precision, tolerance in TOLERANCES.items():
        assert compare(question.case, precision, wrong, right).error > tolerance


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_rounding_passes(model, save_checkpoint: Callable[..., Path], tmp_path: Path, precision: str) -> None:
    pytest.importorskip("bertrt._native", reason="the native kernels are not built")
    with open_checkpoint(save_checkpoint(model)) as checkpoint:
        export_engine(checkpoint, tmp_path / "engine", precision=precision)
    backend = create_backend("native", EngineFolder.open(tmp_path / "engine"), 1)
    for task in TASKS:
        question = ask(task)
        tokens = question.tokens
        if task == "features":
            ours = {"hidden_states": backend.run(tokens, Wanted(hidden_states=True)).hidden_states}
        elif task == "next-sentence":
            ours = {"logits": backend.run(tokens, Wanted(nsp=True)).nsp_logits}
        else:
            everywhere = Wanted(mlm_positions=np.arange(tokens.num_tokens), mlm_logits=True)
            ours = {"logits": backend.run(tokens, everywhere).mlm_logits}
        found = compare(question.case, precision, ours, answer(model, question))
        # Rounding is there, but in float32, and far from the limit.
        assert found.error < found.tolerance / 2
