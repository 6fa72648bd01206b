"""The demo model's training: its start, its schedules, and that it learns."""

import math

import numpy as np
import pytest
import torch
from tools.pretrain_demo.examples import ExampleSource
from tools.pretrain_demo.model import ModelShape, new_model
from tools.pretrain_demo.training import (
    CONTINUED,
    DURING,
    FROM_SCRATCH,
    Measurement,
    Recipe,
    Stage,
    evaluate,
    forward,
    train,
)

from bertrt.errors import InputError, NonFiniteWeightsError


def test_the_position_table_starts_as_a_sinusoid(shape: ModelShape) -> None:
    table = new_model(shape, seed=0).bert.embeddings.position_embeddings.weight.detach().numpy()
    for place, channel in ((0, 0), (0, 1), (7, 10), (511, 63)):
        angle = place / 1000 ** ((channel - channel % 2) / 64)
        expected = 0.04 * (math.cos(angle) if channel % 2 else math.sin(angle))
        # Angles up to 511 in float32 are off by up to half of 2**-15.
        assert table[place, channel] == pytest.approx(expected, abs=0.04 * 2**-15 + 1e-7)


def test_masked_rows_alone_give_the_logits_of_all_rows(
    shape: ModelShape, sources: tuple[ExampleSource, ExampleSource]
) -> None:
    model = new_model(shape, seed=0).eval()
    batch = sources[0].batch(np.random.default_rng(0), sequences=4, length=64)
    with torch.no_grad():
        tokens, pairs = forward(model, batch)
        reference = model(
            batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids
        )
    expected = reference.prediction_logits.flatten(0, 1)[batch.positions]
    # bfloat16 has 8 bits of significand, and the logits' sums go through some ten roundings.
    for found, wanted in ((tokens, expected), (pairs, reference.seq_relationship_logits)):
        torch.testing.assert_close(found, wanted, rtol=0, atol=10 * 2**-8 * wanted.abs().max().item())


def test_the_schedules() -> None:
    recipe = Recipe(phase=FROM_SCRATCH, steps=10_000)
    assert [recipe.phase.stage(0, progress, 32) for progress in (0, 0.54, 0.55, 0.91, 0.92, 0.99)] == [
        Stage(64, 32),
        Stage(64, 32),
        Stage(128, 24),
        Stage(128, 24),
        Stage(512, 5),
        Stage(512, 5),
    ]
    assert [CONTINUED.stage(step, 0.5, 32) for step in (0, 1, 2)] == [
        Stage(512, 6),
        Stage(128, 24),
        Stage(512, 6),
    ]
    assert recipe.rate(0, 0) == pytest.approx(7e-7)
    assert recipe.rate(499, 0.05) == pytest.approx(7e-4 * 0.5 * 0.95)
    assert recipe.rate(5000, 0.5) == pytest.approx(3.5e-4)
    assert recipe.rate(9999, 0.9999) == pytest.approx(7e-4 * 0.02)
    assert Recipe(phase=CONTINUED, minutes=2).progress(10**6, 30) == pytest.approx(0.25)
    assert Recipe(phase=CONTINUED).progress(5492, 0) == 1


def test_a_model_learns(shape: ModelShape, sources: tuple[ExampleSource, ExampleSource]) -> None:
    model = new_model(shape, seed=0)
    measurement = Measurement(stage=Stage(64, 64), batches=1)
    before = evaluate(model, sources[1], measurement)
    lines: list[str] = []
    recipe = Recipe(
        phase=FROM_SCRATCH, steps=40, learning_rate=1e-2, warmup_steps=5, report_every=20, evaluate_every=40
    )
    run = train(model, *sources, recipe, lines.append)
    after = evaluate(model, sources[1], measurement)
    assert before.masked_loss == pytest.approx(math.log(shape.vocabulary), abs=0.5)
    # "The" and the full stop are a sixth each, the 16 other words share the rest: whoever knows no more than
    # that loses this entropy. The model has to read the context to do better.
    assert after.masked_loss < 1 / 3 * math.log(6) + 2 / 3 * math.log(24)
    assert after.masked_accuracy > before.masked_accuracy + 0.2
    assert run.steps == 40
    assert [line.split(",")[0] for line in lines] == ["step 20 (50.0%)", "step 40 (100.0%)", "step 40"]
    assert str(evaluate(model, sources[1], DURING)) in lines[-1]


def test_the_same_seed_and_steps_give_the_same_weights(
    shape: ModelShape, sources: tuple[ExampleSource, ExampleSource]
) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        model = new_model(shape, seed=seed)
        train(model, *sources, Recipe(phase=FROM_SCRATCH, steps=5, batch=4, seed=seed), print)
        return dict(model.state_dict())

    first, second, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "bert.pooler.dense.weight"
    assert not torch.equal(first[name], other[name])


def test_training_that_diverges_is_an_error(
    shape: ModelShape, sources: tuple[ExampleSource, ExampleSource]
) -> None:
    recipe = Recipe(phase=FROM_SCRATCH, steps=20, batch=4, learning_rate=1e30, warmup_steps=1)
    with pytest.raises(NonFiniteWeightsError, match="lower the learning rate"):
        train(new_model(shape, seed=0), *sources, recipe, print)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"minutes": math.nan}, "minutes is nan"),
        ({"steps": 1, "minutes": 1.0}, "not both"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"batch": -1}, "batch is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(phase=FROM_SCRATCH, **options)
