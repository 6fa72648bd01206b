"""What a run measures: a checkpoint, the cases, and the token ids that everybody is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bertrt.architecture import BertArchitecture
from bertrt.manifest import Heads, Source
from bertrt.tokenization import WordPieceTokenizer
from bertrt_bench.cases import Case, SpecialIds, make_question
from bertrt_bench.gpu.options import DEMO, TASKS, GpuOptions
from bertrt_bench.lengths import Lengths, read_lengths
from bertrt_export.checkpoints import Checkpoint, open_checkpoint
from bertrt_export.demo import demo_folder, evaluation_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is measured.

    Attributes:
        checkpoint: how jobs open it, see `bertrt_export.checkpoints.open_checkpoint`.
        random: whether its weights are random.
        weights: a folder that holds them, for PyTorch.
        source: where they came from.
        architecture: the dimensions.
        heads: those that there are.
        cases: in the order of measurement.
        questions: for each case the folder of its token ids (`bertrt_bench.cases.Question.save`).
        lengths: of the mix.
        left_out: cases that are not measured, with the reason.
    """

    checkpoint: str
    random: bool
    weights: Path
    source: Source
    architecture: BertArchitecture
    heads: Heads
    cases: tuple[Case, ...]
    questions: tuple[Path, ...]
    lengths: Lengths
    left_out: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What a record says of it."""
        return {
            "name": self.source.name,
            "kind": self.source.kind,
            "seed": self.source.seed,
            "weights_sha256": self.source.weights_sha256,
            "architecture": self.architecture.to_json(),
            "mix": self.lengths.to_json(),
            "left_out": self.left_out,
        }


def open_subject(options: GpuOptions, scratch: Path) -> Subject:
    """Open the checkpoint whose speed is measured, and draw the token ids.

    Args:
        options: of the run.
        scratch: a folder for weights that lie in none, and for the token ids.

    Raises:
        CheckpointError: the checkpoint cannot be opened.
        InputError, TextEncodingError: the text of the mix cannot be used.
    """
    name, random = options.speed_source
    with open_checkpoint(name, random=random) as checkpoint:
        weights = checkpoint.folder
        if weights is None:
            weights = scratch / "weights"
            checkpoint.materialize(weights)
        lengths = read_lengths(
            options.lengths_from or evaluation_text(),
            # The made-up vocabulary of random weights knows few words: a text in it is longer than any real one.
            WordPieceTokenizer.from_folder(demo_folder()) if random else checkpoint.tokenizer,
            most=options.scale.paragraphs,
            max_length=checkpoint.architecture.max_position_embeddings,
        )
        cases, left_out = _cases(checkpoint, options, lengths)
        questions = []
        for index, case in enumerate(cases):
            folder = scratch / f"question-{index}"
            folder.mkdir()
            make_question(
                case,
                special=SpecialIds.of(checkpoint.tokenizer),
                vocab_size=checkpoint.architecture.vocab_size,
                type_vocab_size=checkpoint.architecture.type_vocab_size,
                seed=options.seed,
            ).save(folder)
            questions.append(folder)
        return Subject(
            # Jobs work offline: what came from the hub lies in a folder by now.
            checkpoint=name if random or name == DEMO else str(weights.absolute()),
            random=random,
            weights=weights.absolute(),
            source=checkpoint.source,
            architecture=checkpoint.architecture,
            heads=checkpoint.heads,
            cases=tuple(cases),
            questions=tuple(questions),
            lengths=lengths,
            left_out=left_out,
        )


def _cases(
    checkpoint: Checkpoint, options: GpuOptions, lengths: Lengths
) -> tuple[list[Case], dict[str, str]]:
    found, left_out = [], {}
    positions = checkpoint.architecture.max_position_embeddings
    for task in TASKS:
        cases = [Case(task=task, batch=batch, sequence=sequence) for batch, sequence in options.scale.shapes]
        if task == "features":
            # [CLS], a token and [SEP] at least: a paragraph has no less.
            cases.append(Case.mix(task, lengths.tokens))
        for case in cases:
            if task == "next-sentence" and not checkpoint.heads.nsp:
                left_out[str(case)] = "the checkpoint has no next-sentence head"
            elif case.sequence > positions:
                left_out[str(case)] = f"the model has {positions} positions"
            else:
                found.append(case)
    return found, left_out
