"""Brings the contestants together: one process each, the same questions, one turn at a time."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bertrt.errors import InputError
from bertrt.folder import EngineFolder
from bertrt.tokenization import WordPieceTokenizer
from bertrt_bench import agreement
from bertrt_bench.agreement import Agreement
from bertrt_bench.cases import RANKED, Case, Question, SpecialIds, make_question
from bertrt_bench.contestants import ENGINE, ContestantKind, Setup
from bertrt_bench.patience import StepTimeout
from bertrt_bench.process import ContestantProcess
from bertrt_bench.reference import reference_folder
from bertrt_bench.texts import make_text_question


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A rival, and how well the engine agrees with it."""

    rival: str
    agreement: Agreement


class Arena:
    """The contestants of one benchmark; a context manager that starts and ends their processes.

    A process of its own for each, because thread pools that spin disturb one another when they share one.
    They are all alive at once, but only one ever computes.

    Args:
        folder: the engine.
        cases: what will be measured.
        rivals: who takes part beside the engine.
        threads: of each contestant.
        backend: of the engine; ``None`` for its default.
        reference: see `bertrt_bench.reference.reference_folder`.
        seed: of the token ids.
        timeout: seconds for any one step.
        engine: how the engine itself takes part.
    """

    def __init__(
        self,
        folder: EngineFolder,
        cases: Sequence[Case],
        *,
        rivals: Sequence[ContestantKind] = (),
        threads: int,
        backend: str | None = None,
        reference: str | None = None,
        seed: int = 0,
        timeout: float = 300.0,
        engine: ContestantKind = ENGINE,
    ) -> None:
        self.cases = list(cases)
        self.contestants: list[ContestantProcess] = []
        self._folder = folder
        self._kinds = [engine, *rivals]
        self._threads = threads
        self._backend = backend
        self._reference = reference
        self._seed = seed
        self._timeout = timeout
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Arena:
        with contextlib.ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bertrt-bench-")))
            reference = None
            if any(kind.needs_reference for kind in self._kinds):
                source = self._folder.manifest.source
                reference = str(reference_folder(source, self._reference, scratch))
            elif self._reference is not None:
                raise InputError(
                    "a reference checkpoint is of use only to a rival that needs it; name one with --against"
                )
            setup = Setup(
                engine=str(self._folder.path.absolute()),
                threads=self._threads,
                backend=self._backend,
                reference=reference,
            )
            for number, kind in enumerate(self._kinds):
                private = scratch / f"contestant-{number}"
                private.mkdir()
                own = replace(setup, precision=kind.precision_beside(self._folder.manifest.precision))
                process = ContestantProcess(kind, own, private, patience=StepTimeout(self._timeout))
                self.contestants.append(stack.enter_context(process))
            self._ask_questions(scratch)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def check(self, case: Case) -> list[Check]:
        """Let all answer a case once, and compare the engine's answer with each rival's.

        Raises:
            AnswersDisagreeError: beyond the tolerance of the coarser precision, or not finite.
            MeasurementError: a contestant failed.
        """
        index, manifest = self.cases.index(case), self._folder.manifest
        architecture = manifest.architecture
        rows, shapes = (
            agreement.rows_compared(case, architecture),
            agreement.answer_shapes(case, architecture),
        )
        answers = []
        for contestant in self.contestants:
            expected = dict(shapes)
            if contestant is not self.contestants[0] and case.task in RANKED:
                expected["all_log_probs"] = (shapes["ids"][0], architecture.vocab_size)
            answer = contestant.answer(index, case, rows=rows)
            agreement.check_answer(contestant.kind.name, case, answer, expected)
            answers.append(answer)
        checks = []
        for contestant, answer in zip(self.contestants[1:], answers[1:], strict=True):
            theirs = contestant.kind.precision_beside(manifest.precision)
            precision = agreement.coarser(manifest.precision, theirs)
            outcome = agreement.compare(case, precision, answers[0], answer)
            agreement.require(case, "engine", contestant.kind.name, outcome, outcome="nothing was timed")
            checks.append(Check(rival=contestant.kind.name, agreement=outcome))
        return checks

    def turn(
        self, contestant: ContestantProcess, case: Case, *, warmup: int, runs: int, seconds: float
    ) -> list[int]:
        """Let one contestant run a case while the others are at rest; see `ContestantProcess.time`."""
        return contestant.time(self.cases.index(case), case, warmup=warmup, runs=runs, seconds=seconds)

    def peak(self) -> float | None:
        """The engine's `bertrt_bench.contestants.engine.EngineContestant.peak`, measured now."""
        return self.contestants[0].peak()

    def _ask_questions(self, scratch: Path) -> None:
        manifest = self._folder.manifest
        tokenizer = WordPieceTokenizer.from_folder(self._folder.path, manifest.files)
        for index, case in enumerate(self.cases):
            folder = scratch / f"question-{index}"
            folder.mkdir()
            self._question(case, tokenizer).save(folder)
            for contestant in self.contestants:
                contestant.prepare(index, case, folder)

    def _question(self, case: Case, tokenizer: WordPieceTokenizer) -> Question:
        text = replace(case, task="fill-mask-text")
        if case == text:
            return make_text_question(case, tokenizer, seed=self._seed)
        if case.task == "features" and text in self.cases:
            # The same text, so that the one time can be held against the other.
            tokens = make_text_question(text, tokenizer, seed=self._seed).tokens
            return Question(case=case, tokens=tokens, masks=np.zeros(0, dtype=np.int64))
        architecture = self._folder.manifest.architecture
        return make_question(
            case,
            special=SpecialIds.of(tokenizer),
            vocab_size=architecture.vocab_size,
            type_vocab_size=architecture.type_vocab_size,
            seed=self._seed,
        )
