"""The measurement: an engine and PyTorch answer the same examples, batch by batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bertrt.backends.base import Backend, Float32, Int64, TokenBatch, Wanted
from bertrt.backends.placement import Placement, Provider
from bertrt.backends.registry import (
    ONNXRUNTIME,
    backend_status,
    choose_backend,
    choose_provider,
    create_backend,
)
from bertrt.batching import offsets_of, plan_batches
from bertrt.errors import CheckpointError, InputError
from bertrt.folder import EngineFolder
from bertrt.machine import describe, usable_cpus
from bertrt.manifest import Heads, Manifest
from bertrt.tokenization import WordPieceTokenizer
from bertrt_export.checkpoints import Checkpoint
from bertrt_export.drift.budgets import NON_FINITE, check_budgets, resolve_budgets
from bertrt_export.drift.examples import Example, build_examples
from bertrt_export.drift.layers import Probe, make_probe
from bertrt_export.drift.metrics import CosineDrift, LayerNoise, MaskedLmDrift, NextSentenceDrift
from bertrt_export.drift.prompts import BiasDrift, PromptDrift, compare_prompts
from bertrt_export.drift.reference import Reference, open_reference, require
from bertrt_export.drift.report import DriftReport, EngineFacts, ExampleFacts, LayerDrift
from bertrt_export.drift.text import Corpus, read_corpus, read_text
from bertrt_export.graph.twin import TwinBackend

# With the demo's text these are some 9,500 masked positions: a top-1 agreement of 97 % is then known to
# within 0.35 points (two standard errors), which tells a good int8 engine from a bad one.
DEFAULT_EXAMPLES = 400
MOST_EXAMPLES = 20_000
DEFAULT_SEED = 0
# Padded tokens of a batch. Bounds the memory: 15 % of them have a row of logits each, in both models.
TOKEN_BUDGET = 2048
# The layers' outputs of every fourth batch say as much about signal and noise as all would.
_PROBE_EVERY = 4

Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftOptions:
    """How drift is measured.

    Attributes:
        examples: how many inputs are built from the text, from 1 to `MOST_EXAMPLES`.
        seed: of the examples, 0 or more.
        budgets: changes to the precision's default budgets by the name of the figure; ``None`` lifts one.
        backend: of the engine; ``None`` takes the default.
        threads: of both models; ``None`` takes the CPUs that the process may use.
        provider: of the backend onnxruntime; ``None`` takes the best. On the CPU an engine in parts is computed with
            every value rounded to its type (see `bertrt_export.graph.twin`).
        devices: GPUs of the engine.

    Raises:
        InputError: a value out of range.
    """

    examples: int = DEFAULT_EXAMPLES
    seed: int = DEFAULT_SEED
    budgets: Mapping[str, float | None] = field(default_factory=dict)
    backend: str | None = None
    threads: int | None = None
    provider: Provider | None = None
    devices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.examples <= MOST_EXAMPLES:
            raise InputError(f"examples must be from 1 to {MOST_EXAMPLES:,}, got {self.examples}")
        if self.seed < 0:
            raise InputError(f"the seed must be 0 or more, got {self.seed}")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads must be 1 or more, got {self.threads}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What `compare` found, before any budget; the fields are those of `DriftReport`."""

    figures: dict[str, float]
    layers: tuple[LayerDrift, ...]
    layer_tokens: int
    prompts: tuple[PromptDrift, ...]
    bias: BiasDrift | None


def measure_drift(
    folder: EngineFolder,
    checkpoint: Checkpoint,
    text: Path | str,
    *,
    options: DriftOptions | None = None,
    progress: Progress | None = None,
) -> DriftReport:
    """Measure how far an engine is from PyTorch float32.

    Args:
        folder: the engine.
        checkpoint: what it was exported from.
        text: a file (``Path``), or the text itself (``str``); paragraphs one a line, a blank line between
            documents.
        options: see `DriftOptions`.
        progress: called with the number of examples done since it was last called.

    Raises:
        ReferenceUnavailableError: PyTorch or transformers is missing, or cannot load the checkpoint.
        CheckpointError: the engine was exported from other weights.
        InputError: the text is too short, too long or not there; an unknown budget.
        TextEncodingError: the text is not UTF-8.
        BackendError: the engine cannot run here, or failed.
    """
    options = options or DriftOptions()
    started = time.monotonic()
    manifest = folder.manifest
    budgets = resolve_budgets(manifest.precision, options.budgets)
    versions = require()
    check_reference(manifest, checkpoint)
    tokenizer = WordPieceTokenizer.from_folder(folder.path, manifest.files)
    positions = manifest.architecture.max_position_embeddings
    name, content = (_name(text), read_text(text)) if isinstance(text, Path) else ("text", text)
    corpus = read_corpus(content, tokenizer, name=name, max_length=positions)
    examples = list(
        build_examples(
            corpus,
            tokenizer,
            count=options.examples,
            seed=options.seed,
            max_length=positions,
            segments=manifest.architecture.type_vocab_size,
        )
    )
    threads = options.threads or usable_cpus()
    backend = _open_backend(folder, options, threads)
    try:
        with open_reference(checkpoint, manifest.heads, threads=threads) as reference:
            probe = make_probe(folder, backend)
            try:
                found = compare(
                    backend,
                    reference,
                    probe,
                    tokenizer=tokenizer,
                    heads=manifest.heads,
                    examples=examples,
                    max_length=positions,
                    progress=progress,
                )
            finally:
                if probe is not None:
                    probe.close()
        engine = _engine_facts(folder, backend)
    finally:
        backend.close()
    return DriftReport(
        engine=engine,
        examples=_example_facts(corpus, examples, options.seed),
        figures=found.figures,
        budgets={name: limit for name, limit in budgets.items() if name in found.figures},
        violations=check_budgets(found.figures, budgets),
        layers=found.layers,
        layer_tokens=found.layer_tokens,
        prompts=found.prompts,
        bias=found.bias,
        left_out=_left_out(manifest.heads, found),
        versions={**_versions(engine.backend), **versions},
        machine=describe().to_json(),
        seconds=time.monotonic() - started,
    )


def _open_backend(folder: EngineFolder, options: DriftOptions, threads: int) -> Backend:
    """The backend that is measured: of an engine in parts without a GPU, its twin on the CPU."""
    placement = Placement(threads=threads, provider=options.provider, devices=options.devices)
    name = choose_backend(options.backend, folder, placement)
    if (
        folder.manifest.target != "cpu"
        and name == ONNXRUNTIME
        and choose_provider(folder, placement) == "cpu"
    ):
        return TwinBackend(folder, threads)
    return create_backend(name, folder, threads, provider=options.provider, devices=options.devices or None)


def check_reference(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Refuse to compare an engine with weights that it was not made from.

    Raises:
        CheckpointError: it was not.
    """
    engine, reference = manifest.source, checkpoint.source
    if engine.kind == "random":
        same = (reference.kind, reference.name, reference.seed) == ("random", engine.name, engine.seed)
    else:
        same = reference.kind != "random" and engine.weights_sha256 == reference.weights_sha256
    if not same:
        raise CheckpointError(
            f"the engine was exported from {engine.name!r} (weights {_short(engine.weights_sha256)}), not from "
            f"{reference.name!r} (weights {_short(reference.weights_sha256)}); drift is the distance from the "
            "same weights: pass the checkpoint that was exported, or export this one"
        )


def compare(
    backend: Backend,
    reference: Reference,
    probe: Probe | None,
    *,
    tokenizer: WordPieceTokenizer,
    heads: Heads,
    examples: Sequence[Example],
    max_length: int,
    progress: Progress | None = None,
) -> Comparison:
    """Let both answer the examples, and gather how far they are apart.

    No more than one batch's outputs are in memory at a time.

    Args:
        backend: of the engine.
        reference: PyTorch.
        probe: gives the engine's layers; without it they are left out.
        tokenizer: of the model.
        heads: those that are compared.
        examples: at least one.
        max_length: positions of the model.
        progress: called with the number of examples done since it was last called.

    Raises:
        InputError: the text has no token that can be masked.
    """
    if heads.mlm and not any(example.positions.shape[0] for example in examples):
        raise InputError(
            "the text has no token that can be masked: the tokenizer knows none of its words; pass another"
        )
    mlm, nsp = MaskedLmDrift(), NextSentenceDrift()
    hidden, pooled = CosineDrift("hidden"), CosineDrift("pooled")
    layers: list[LayerNoise] = []
    for number, indices in enumerate(
        plan_batches([example.input_ids.shape[0] for example in examples], token_budget=TOKEN_BUDGET)
    ):
        batch, positions, labels, follows = _pack([examples[index] for index in indices])
        probed = probe is not None and number % _PROBE_EVERY == 0
        expected = reference.run(batch, positions, layers=probed)
        found = backend.run(
            batch,
            Wanted(
                mlm_positions=positions if heads.mlm else None,
                mlm_logits=heads.mlm,
                hidden_states=True,
                pooled=heads.pooler,
                nsp=heads.nsp,
            ),
        )
        hidden.add(expected.hidden_states, _given(found.hidden_states))
        if expected.mlm_logits is not None:
            mlm.add(expected.mlm_logits, _given(found.mlm_logits), labels)
        if expected.pooled is not None:
            pooled.add(expected.pooled, _given(found.pooled))
        if expected.nsp_logits is not None:
            nsp.add(expected.nsp_logits, _given(found.nsp_logits), follows)
        if probe is not None and probed:
            states = probe.run(batch)
            layers = layers or [LayerNoise() for _ in states]
            for layer, before, after in zip(layers, expected.layers, states, strict=True):
                layer.add(before, after)
        if progress:
            progress(len(indices))
    prompts: tuple[PromptDrift, ...] = ()
    bias: BiasDrift | None = None
    if heads.mlm:
        prompts, bias = compare_prompts(tokenizer, backend, reference, max_length=max_length)
    return _gather(mlm, nsp, hidden, pooled, layers, prompts, bias)


def _gather(
    mlm: MaskedLmDrift,
    nsp: NextSentenceDrift,
    hidden: CosineDrift,
    pooled: CosineDrift,
    layers: Sequence[LayerNoise],
    prompts: tuple[PromptDrift, ...],
    bias: BiasDrift | None,
) -> Comparison:
    parts: tuple[MaskedLmDrift | NextSentenceDrift | CosineDrift | LayerNoise | PromptDrift, ...]
    parts = (mlm, nsp, hidden, pooled, *layers, *prompts)
    figures: dict[str, float] = {
        NON_FINITE: sum(part.non_finite for part in parts),
        **mlm.figures(),
        **nsp.figures(),
        **hidden.figures(),
        **pooled.figures(),
    }
    if layers:
        figures["layer_snr_lowest"] = min(layer.decibels for layer in layers)
    if prompts:
        figures["prompt_kl_max"] = float(np.max([prompt.kl for prompt in prompts]))
    if bias:
        figures["bias_shift"] = bias.shift_points
    return Comparison(
        figures=figures,
        layers=tuple(
            LayerDrift(
                name=f"layer {number}" if number else "embeddings",
                snr_db=layer.decibels,
                non_finite=layer.non_finite,
            )
            for number, layer in enumerate(layers)
        ),
        layer_tokens=layers[0].tokens if layers else 0,
        prompts=prompts,
        bias=bias,
    )


def _pack(
    examples: Sequence[Example],
) -> tuple[TokenBatch, Int64, Int64, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """The batch, the masked positions in it, what stood there, and whether each B follows its A."""
    offsets = offsets_of([example.input_ids.shape[0] for example in examples])
    batch = TokenBatch(
        input_ids=np.concatenate([example.input_ids for example in examples]),
        token_type_ids=np.concatenate([example.token_type_ids for example in examples]),
        offsets=offsets,
    )
    positions = [example.positions + start for example, start in zip(examples, offsets, strict=False)]
    return (
        batch,
        np.concatenate(positions),
        np.concatenate([example.labels for example in examples]),
        np.array([example.follows for example in examples]),
    )


def _given(array: Float32 | None) -> Float32:
    assert array is not None, "a backend gives what it is asked for"  # noqa: S101 - the Backend contract
    return array


def _left_out(heads: Heads, found: Comparison) -> dict[str, str]:
    """What is not in the report, and why."""
    missing = {}
    if not heads.mlm:
        missing["Masked LM"] = "the checkpoint has no masked-LM head"
    elif not found.prompts:
        missing["Prompts"] = "the model has too few positions for the model card's prompts"
    if not found.layers:
        missing["Layers"] = "what runs on a GPU shows its last layer only"
    if not heads.nsp:
        missing["Next sentence"] = "the checkpoint has no next-sentence head"
    if not heads.pooler:
        missing["Pooled output"] = "the checkpoint has no pooler"
    return missing


def _engine_facts(folder: EngineFolder, backend: Backend) -> EngineFacts:
    manifest = folder.manifest
    return EngineFacts(
        name=_name(folder.path.resolve()),
        source=manifest.source,
        precision=manifest.precision,
        dialect=manifest.dialect,
        heads=manifest.heads,
        backend=backend.name,
        isa=getattr(backend, "isa", None),
        threads=backend.threads,
    )


def _example_facts(corpus: Corpus, examples: Sequence[Example], seed: int) -> ExampleFacts:
    lengths = [example.input_ids.shape[0] for example in examples]
    return ExampleFacts(
        text=corpus.name,
        text_sha256=corpus.sha256,
        documents=len(corpus.documents),
        sentences=corpus.sentences,
        seed=seed,
        examples=len(examples),
        tokens=sum(lengths),
        longest=max(lengths),
        masked=sum(example.positions.shape[0] for example in examples),
        following=sum(example.follows for example in examples),
    )


def _versions(backend: str) -> dict[str, str]:
    from bertrt import __version__

    versions = {"bertrt": __version__, "numpy": np.__version__}
    for status in backend_status():
        if status.name == backend and status.version:
            versions[backend] = status.version
    return versions


def _name(path: Path) -> str:
    """A file's name as text; bytes in it that are not UTF-8 become question marks."""
    return path.name.encode("utf-8", "replace").decode()


def _short(digest: str | None) -> str:
    return f"{digest[:16]}…" if digest else "random"
