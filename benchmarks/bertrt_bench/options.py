"""What the user asks a benchmark to do, and the checks of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bertrt.errors import InputError, MissingHeadError
from bertrt.machine import usable_cpus
from bertrt.manifest import Manifest
from bertrt_bench.cases import MASKED, TASKS, Case, Task, shortest
from bertrt_bench.contestants import RIVALS, ContestantKind

# Above these a run is no benchmark any more, or its answer does not fit into memory beside the models.
_LARGEST_RUN_TOKENS: Final = 1 << 18
_LARGEST_ANSWER_BYTES: Final = 1 << 30
_BYTES_PER_LOGIT: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """One benchmark; every combination of task, batch and sequence is a case, and so is each task over a mix.

    Attributes:
        engine: an engine folder, or the name of a built-in engine.
        tasks: what is asked; see `bertrt_bench.cases.Case`.
        batches: sequences in one run.
        sequences: tokens of each, special tokens included.
        lengths_from: a text whose paragraphs' lengths are such a mix (see `bertrt_bench.lengths`); with it
            ``batches`` and ``sequences`` may be empty.
        paragraphs: the most of them that are taken, from the start of the text.
        threads: of every contestant; ``None`` for all the CPUs that this process may use.
        against: names of the rivals.
        reference: the checkpoint that the engine was made from, for rivals that need it; ``None`` for
            what the engine names.
        backend: of the engine; ``None`` for its default.
        verify: compare the engine's files with their hashes first.
        warmup: runs of each contestant and case before its first turn; every later turn begins with one.
        repeats: timed runs of each contestant in each case, spread over the rounds; ``None`` goes by time.
        seconds: timed seconds of each contestant in each case, spread over the rounds, if ``repeats`` is
            ``None``.
        rounds: how often the turn comes to each contestant.
        seed: of the token ids.
        timeout: seconds that any one step of a contestant may take, beyond the time that it measures.
    """

    engine: str
    tasks: Sequence[Task] = ("features",)
    batches: Sequence[int] = (1, 8)
    sequences: Sequence[int] = (16, 128)
    lengths_from: str | None = None
    paragraphs: int = 512
    threads: int | None = None
    against: Sequence[str] = ()
    reference: str | None = None
    backend: str | None = None
    verify: bool = True
    warmup: int = 3
    repeats: int | None = None
    seconds: float = 2.0
    rounds: int = 5
    seed: int = 0
    timeout: float = 300.0

    def __post_init__(self) -> None:
        _check_list("tasks", self.tasks)
        if self.lengths_from is None or self.batches or self.sequences:
            _check_list("batches", self.batches)
            _check_list("sequences", self.sequences)
        for task in self.tasks:
            if task not in TASKS:
                raise InputError(f"there is no task {task!r}; choose from {', '.join(TASKS)}")
        _check_whole("batch", *self.batches, least=1)
        _check_whole("sequence", *self.sequences, least=1)
        _check_whole("paragraphs", self.paragraphs, least=1)
        _check_whole("warmup", self.warmup, least=0)
        _check_whole("rounds", self.rounds, least=1)
        _check_whole("seed", self.seed, least=0)
        if self.repeats is not None:
            _check_whole("repeats", self.repeats, least=1)
        for name, value in (("seconds", self.seconds), ("timeout", self.timeout)):
            if not math.isfinite(value) or value <= 0:
                raise InputError(f"{name} must be a positive number, got {value}")
        if self.threads is not None:
            _check_whole("threads", self.threads, least=1)
            if self.threads > (cpus := usable_cpus()):
                raise InputError(
                    f"threads is {self.threads}, but this process may use {cpus} CPUs; more threads than "
                    f"CPUs measure the scheduler: ask for at most {cpus}"
                )
        if len(set(self.against)) != len(self.against):
            raise InputError(f"each rival takes part once, got {', '.join(self.against)}")

    @property
    def thread_count(self) -> int:
        """Threads of every contestant."""
        return self.threads if self.threads is not None else usable_cpus()

    @property
    def round_count(self) -> int:
        """Rounds: not more than there are timed runs."""
        return self.rounds if self.repeats is None else min(self.rounds, self.repeats)

    @property
    def case_count(self) -> int:
        """How many cases there are."""
        shapes = len(self.batches) * len(self.sequences)
        return len(self.tasks) * (shapes + (self.lengths_from is not None))

    def cases(self, lengths: Sequence[int] | None = None) -> list[Case]:
        """All the cases, task by task, small shapes first as they were given, then the mix.

        Args:
            lengths: of the mix, if ``lengths_from`` asks for one; what is too short for a task is left out of
                its mix.

        Raises:
            InputError: nothing is left of the mix.
        """
        found = []
        for task in self.tasks:
            found += [
                Case(task=task, batch=batch, sequence=sequence)
                for batch in self.batches
                for sequence in self.sequences
            ]
            if lengths is None:
                continue
            usable = [length for length in lengths if length >= shortest(task)]
            if not usable:
                raise InputError(
                    f"no paragraph has the {shortest(task)} tokens that {task} needs; pass another text"
                )
            found.append(Case.mix(task, usable))
        return found

    def kinds(self, registry: Mapping[str, ContestantKind] = RIVALS) -> list[ContestantKind]:
        """The rivals.

        Raises:
            InputError: there is none of that name.
            MeasurementError: one is not installed.
        """
        kinds = []
        for name in self.against:
            if name not in registry:
                raise InputError(f"there is no rival {name!r}; choose from {', '.join(sorted(registry))}")
            registry[name].check_installed()
            kinds.append(registry[name])
        return kinds

    def runs_of_round(self, number: int) -> tuple[int, float]:
        """Of the round with this number (from 0): least timed runs, and least timed seconds."""
        if self.repeats is None:
            return 1, self.seconds / self.round_count
        # The first rounds take what does not divide evenly.
        return self.repeats // self.round_count + (number < self.repeats % self.round_count), 0.0


def check_fits(cases: Sequence[Case], manifest: Manifest) -> None:
    """Check the cases against a model.

    Raises:
        MissingHeadError: a task needs a head that the engine lacks.
        InputError: a sequence is too short for its task or longer than the model's positions, or a run too
            large.
    """
    architecture, heads = manifest.architecture, manifest.heads
    for case in cases:
        if case.task in MASKED and not heads.mlm:
            raise MissingHeadError(
                f"task {case.task} needs the masked-LM head, which this engine's checkpoint lacks"
            )
        if case.task == "next-sentence" and not heads.nsp:
            raise MissingHeadError(
                "task next-sentence needs the next-sentence head, which this engine's checkpoint lacks"
            )
        if case.sequence > architecture.max_position_embeddings:
            raise InputError(
                f"a sequence of {case.sequence} tokens does not fit: the model has "
                f"{architecture.max_position_embeddings} positions"
            )
        if case.sequence < shortest(case.task):
            raise InputError(
                f"a sequence of {case.sequence} tokens is too short for {case.task}: with its special tokens "
                f"it needs at least {shortest(case.task)}"
            )
        if case.tokens > _LARGEST_RUN_TOKENS:
            raise InputError(
                f"{case} has {case.tokens} tokens, the limit is {_LARGEST_RUN_TOKENS}; ask for less"
            )
        logits = case.tokens * architecture.vocab_size * _BYTES_PER_LOGIT
        # Of a mix, the logits of one padded block at a time are enough, but where all are asked for.
        whole = case.task == "mlm-all" or case.lengths is None
        if case.task in MASKED and whole and logits > _LARGEST_ANSWER_BYTES:
            raise InputError(
                f"{case} makes {logits / 1e9:.1f} GB of logits where the head runs at every position, the "
                f"limit is {_LARGEST_ANSWER_BYTES / 1e9:.1f} GB; ask for a smaller batch or sequence"
            )


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """The whole numbers of a list such as ``1,8``.

    Raises:
        InputError: another thing is in the list.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(
            f"--{option} must be whole numbers with commas between them, such as 1,8; got {text!r}"
        ) from error


def _check_list(name: str, values: Sequence[object]) -> None:
    if not values or len(set(values)) != len(values):
        raise InputError(f"{name} must hold at least one value, and each once; got {list(values)}")


def _check_whole(name: str, *values: int, least: int) -> None:
    for value in values:
        if type(value) is not int or value < least:
            raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")
