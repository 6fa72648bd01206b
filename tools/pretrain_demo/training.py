"""The training recipe: which examples at which step, the optimiser, and the measurements on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional
from transformers import BertForPreTraining

from bertrt.errors import InputError, NonFiniteWeightsError

from .examples import Batch, ExampleSource

_BETAS = (0.9, 0.98)
_EPSILON = 1e-6
_WEIGHT_DECAY = 0.01
_LARGEST_GRADIENT = 1.0
# The learning rate falls in a line to this share of its peak.
_LAST_RATE = 0.02
# The examples of a measurement are the same each time.
_EVALUATION_SEED = 1


@dataclass(frozen=True, slots=True)
class Stage:
    """What one step trains on: ``sequences`` examples of at most ``length`` tokens."""

    length: int
    sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One of the two runs that made the demo model.

    Attributes:
        steps: how long the run was.
        learning_rate: its peak.
        stage: from the step, the share of the run that is over and the batch size to the stage. About as
            many tokens a step in each.
        stream: sets the run's random examples apart from the other's.
    """

    steps: int
    learning_rate: float
    stage: Callable[[int, float, int], Stage]
    stream: int


def _growing(_step: int, progress: float, batch: int) -> Stage:
    if progress < 0.55:
        return Stage(64, batch)
    if progress < 0.92:
        return Stage(128, batch // 2 + 8)
    return Stage(512, max(4, batch // 6))


def _alternating(step: int, _progress: float, batch: int) -> Stage:
    return Stage(128, batch // 2 + 8) if step % 2 else Stage(512, max(4, batch // 5))


FROM_SCRATCH = Phase(steps=25_873, learning_rate=7e-4, stage=_growing, stream=0)
CONTINUED = Phase(steps=5_492, learning_rate=2.5e-4, stage=_alternating, stream=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        phase: the schedule.
        steps: the run's length; none for the phase's, unless ``minutes`` is given. The same steps and seed
            give the same weights on the same machine with the same number of threads.
        minutes: instead of ``steps``: the run's length by the clock, which no two runs share exactly.
        learning_rate: the peak; none for the phase's.
        batch: sequences of 64 tokens in a step; longer ones are fewer.
        warmup_steps: over which the learning rate rises to its peak.
        seed: of the examples.
        report_every: steps from one progress line to the next.
        evaluate_every: steps from one measurement on held-out text to the next.
    """

    phase: Phase
    steps: int | None = None
    minutes: float | None = None
    learning_rate: float | None = None
    batch: int = 32
    warmup_steps: int = 1000
    seed: int = 0
    report_every: int = 1000
    evaluate_every: int = 2000

    def __post_init__(self) -> None:
        if self.steps is not None and self.minutes is not None:
            raise InputError("a run takes a number of steps or of minutes, not both")
        for name in (
            "steps",
            "minutes",
            "learning_rate",
            "batch",
            "warmup_steps",
            "report_every",
            "evaluate_every",
        ):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} is {value}; expected a number above zero")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; expected zero or more")

    def progress(self, step: int, seconds: float) -> float:
        """The share of the run that is over, 1 or more at its end."""
        if self.minutes is not None:
            return seconds / (60 * self.minutes)
        return step / (self.phase.steps if self.steps is None else self.steps)

    def rate(self, step: int, progress: float) -> float:
        """The learning rate: it rises, then falls in a line."""
        peak = self.phase.learning_rate if self.learning_rate is None else self.learning_rate
        return peak * min(1.0, (step + 1) / self.warmup_steps) * max(_LAST_RATE, 1 - progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What to measure on held-out text: so many batches of one stage."""

    stage: Stage
    batches: int


DURING = Measurement(stage=Stage(128, 64), batches=8)
FINAL = (Measurement(stage=Stage(128, 64), batches=32), Measurement(stage=Stage(512, 16), batches=16))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How well a model does on held-out text.

    Attributes:
        length: of the sequences, at most, in tokens.
        masked_accuracy: share of the masked tokens that the model ranks first.
        masked_loss: mean negative log-likelihood of the masked tokens, in nats.
        next_accuracy: share of the pairs whose second span is rightly told to follow or not.
    """

    length: int
    masked_accuracy: float
    masked_loss: float
    next_accuracy: float

    def __str__(self) -> str:
        return (
            f"held-out, up to {self.length} tokens: masked accuracy {self.masked_accuracy:.4f}, "
            f"loss {self.masked_loss:.3f}, next-sentence accuracy {self.next_accuracy:.4f}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run did: its steps, the tokens it saw (without padding), its time and its last loss."""

    steps: int
    tokens: int
    seconds: float
    loss: float


def forward(model: BertForPreTraining, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the masked tokens ``[masked, vocabulary]`` and of the pairs ``[sequences, 2]``, float32.

    Only the masked rows go through the decoder, whose vocabulary is most of a small model's work.
    """
    with torch.autocast("cpu", torch.bfloat16):
        states = model.bert(
            batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids
        )
        masked = states.last_hidden_state.flatten(0, 1)[batch.positions]
        tokens = model.cls.predictions(masked)
        pairs = model.cls.seq_relationship(states.pooler_output)
    return tokens.float(), pairs.float()


def evaluate(model: BertForPreTraining, held_out: ExampleSource, measurement: Measurement) -> Figures:
    """Measure a model; the same examples every time."""
    rng = np.random.default_rng(_EVALUATION_SEED)
    stage = measurement.stage
    right = masked = right_pairs = pairs = 0
    loss = 0.0
    model.eval()
    with torch.no_grad():
        for _ in range(measurement.batches):
            batch = held_out.batch(rng, sequences=stage.sequences, length=stage.length)
            token_logits, pair_logits = forward(model, batch)
            loss += functional.cross_entropy(token_logits, batch.labels, reduction="sum").item()
            right += int((token_logits.argmax(-1) == batch.labels).sum())
            masked += len(batch.labels)
            right_pairs += int((pair_logits.argmax(-1) == batch.next_labels).sum())
            pairs += len(batch.next_labels)
    return Figures(
        length=stage.length,
        masked_accuracy=right / masked,
        masked_loss=loss / masked,
        next_accuracy=right_pairs / pairs,
    )


def train(
    model: BertForPreTraining,
    training: ExampleSource,
    held_out: ExampleSource,
    recipe: Recipe,
    report: Callable[[str], None],
) -> Run:
    """Train a model in place.

    Args:
        model: in float32.
        training: draws the examples to learn from.
        held_out: draws those of the measurements on the way.
        recipe: how.
        report: takes the progress lines.

    Raises:
        NonFiniteWeightsError: the loss is not a number any more.
    """
    rng = np.random.default_rng([recipe.seed, recipe.phase.stream])
    optimizer = _optimizer(model)
    step = tokens = 0
    loss = math.nan
    start = time.perf_counter()
    while (progress := recipe.progress(step, time.perf_counter() - start)) < 1:
        model.train()
        rate = recipe.rate(step, progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        stage = recipe.phase.stage(step, progress, recipe.batch)
        batch = training.batch(rng, sequences=stage.sequences, length=stage.length)
        loss = _step(model, batch, optimizer)
        step += 1
        tokens += batch.tokens
        if not math.isfinite(loss):
            raise NonFiniteWeightsError(
                f"the loss is {loss} after step {step}; lower the learning rate or lengthen the warm-up"
            )
        if step % recipe.report_every == 0:
            seconds = time.perf_counter() - start
            report(
                f"step {step} ({recipe.progress(step, seconds):.1%}), "
                f"{stage.sequences} x {stage.length} tokens, loss {loss:.3f}, "
                f"learning rate {rate:.2e}, {tokens / seconds:.0f} tokens/s"
            )
        if step % recipe.evaluate_every == 0:
            report(f"step {step}, {evaluate(model, held_out, DURING)}")
    model.eval()
    return Run(steps=step, tokens=tokens, seconds=time.perf_counter() - start, loss=loss)


def _optimizer(model: BertForPreTraining) -> torch.optim.Optimizer:
    """AdamW that decays matrices, not biases and LayerNorm."""
    parameters: list[torch.nn.Parameter] = list(model.parameters())
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": _WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        betas=_BETAS,
        eps=_EPSILON,
    )


def _step(model: BertForPreTraining, batch: Batch, optimizer: torch.optim.Optimizer) -> float:
    """One update; the loss before it, the sum of both tasks' means."""
    token_logits, pair_logits = forward(model, batch)
    loss = functional.cross_entropy(token_logits, batch.labels)
    loss = loss + functional.cross_entropy(pair_logits, batch.next_labels)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), _LARGEST_GRADIENT)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.item())
