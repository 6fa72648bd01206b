"""What a drift measurement found, and its JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from bertrt.manifest import Heads, Precision, Source
from bertrt_export.drift.budgets import Violation
from bertrt_export.drift.prompts import BiasDrift, PromptDrift

FORMAT: Final = "bertrt-drift"
FORMAT_VERSION: Final = 1

# What `engine.json` keeps of a report; the rest is in the report.
_SUMMARY: Final = (
    *("logit_error_max", "kl_mean", "top1_agreement", "top5_overlap", "mlm_accuracy_change_points"),
    *("nsp_changed", "hidden_cosine_mean", "layer_snr_lowest", "bias_shift"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """The engine that was measured.

    Attributes:
        name: of its folder.
        source: where its weights came from.
        precision: of its matrix products.
        dialect: of its graph, where it has one.
        heads: those that were compared.
        backend: what computed.
        isa: the instruction set of its kernels, where it chooses one itself.
        threads: of each run.
    """

    name: str
    source: Source
    precision: Precision
    dialect: str | None
    heads: Heads
    backend: str
    isa: str | None = None
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleFacts:
    """What it was measured on.

    Attributes:
        text: name of the text.
        text_sha256: of the text, in hexadecimal.
        documents: of the text.
        sentences: of the text.
        seed: of the examples.
        examples: inputs built from the text.
        tokens: of all inputs.
        longest: tokens of the longest input.
        masked: positions that were to be predicted.
        following: inputs whose second span follows the first.
    """

    text: str
    text_sha256: str
    documents: int
    sentences: int
    seed: int
    examples: int
    tokens: int
    longest: int
    masked: int
    following: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDrift:
    """Signal and noise behind one layer.

    Attributes:
        name: ``embeddings``, or ``layer 1`` and so on.
        snr_db: infinite if exact, minus infinity if nothing is left of the signal.
        non_finite: values that are NaN or infinite.
    """

    name: str
    snr_db: float
    non_finite: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftReport:
    """The result of a drift measurement.

    Attributes:
        engine: what was measured.
        examples: on what.
        figures: by name, as `bertrt_export.drift.figures.FIGURES` explains them; those of a head that the
            checkpoint lacks are not there.
        budgets: by the name of the figure.
        violations: figures over their budgets.
        layers: the embeddings and every layer, in order.
        layer_tokens: tokens that the layers were compared on.
        prompts: the model card's; none without a masked-LM head.
        bias: the shift between the two about a man and a woman.
        left_out: what could not be measured, and why.
        versions: of the packages that took part.
        machine: what it ran on.
        seconds: how long it took.
    """

    engine: EngineFacts
    examples: ExampleFacts
    figures: Mapping[str, float]
    budgets: Mapping[str, float]
    violations: tuple[Violation, ...]
    layers: tuple[LayerDrift, ...]
    layer_tokens: int
    prompts: tuple[PromptDrift, ...]
    bias: BiasDrift | None
    left_out: Mapping[str, str]
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every figure is within its budget."""
        return not self.violations

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON value.

        A number that is not finite is ``null``; a layer without any noise has ``"exact": true`` beside it.
        """
        value = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "passed": self.passed,
            "violations": [
                {**asdict(violation), "message": violation.message} for violation in self.violations
            ],
            "engine": {
                name: asdict(fact) if isinstance(fact, Source | Heads) else fact
                for name in EngineFacts.__slots__
                for fact in [getattr(self.engine, name)]
            },
            "examples": asdict(self.examples),
            "figures": dict(self.figures),
            "budgets": dict(self.budgets),
            "layers": [{**asdict(layer), "exact": layer.snr_db == math.inf} for layer in self.layers],
            "layer_tokens": self.layer_tokens,
            "prompts": [asdict(prompt) for prompt in self.prompts],
            "bias": {**asdict(self.bias), "shift_points": self.bias.shift_points} if self.bias else None,
            "left_out": dict(self.left_out),
            "versions": dict(self.versions),
            "machine": dict(self.machine),
            "seconds": round(self.seconds, 1),
        }
        return {name: _finite(part) for name, part in value.items()}

    def summary(self) -> dict[str, Any]:
        """What ``engine.json`` keeps."""
        return {
            "passed": self.passed,
            "violations": [violation.figure for violation in self.violations],
            "figures": {name: _finite(self.figures[name]) for name in _SUMMARY if name in self.figures},
            "text": self.examples.text,
            "text_sha256": self.examples.text_sha256,
            "examples": self.examples.examples,
            "masked": self.examples.masked,
            "seed": self.examples.seed,
            "backend": self.engine.backend,
            "isa": self.engine.isa,
            "versions": dict(self.versions),
        }

    def to_markdown(self) -> str:
        """The report for people who read text."""
        from bertrt_export.drift.markdown import render

        return render(self)

    def to_html(self) -> str:
        """The report as one self-contained page."""
        from bertrt_export.drift.page import render

        return render(self)


def facts(report: DriftReport) -> dict[str, str]:
    """How it was measured, for people: by what, on what, where."""
    engine, examples, source, machine = report.engine, report.examples, report.engine.source, report.machine
    revision = f" at {source.revision}" if source.revision else ""
    seed = f", seed {source.seed}" if source.seed is not None else ""
    dialect = f", dialect {engine.dialect}" if engine.backend == "onnxruntime" and engine.dialect else ""
    isa = f" with {engine.isa}" if engine.isa else ""
    return {
        "Source": f"{source.name} ({source.kind}{seed}){revision}",
        "Weights": f"SHA-256 {source.weights_sha256}" if source.weights_sha256 else "random",
        "Engine": f"{engine.precision}{dialect}, backend {engine.backend}{isa}, {engine.threads} threads",
        "Reference": "the same weights in PyTorch float32, through transformers, on identical token ids",
        "Text": f"{examples.text}: {examples.documents:,} documents, {examples.sentences:,} sentences, "
        f"SHA-256 {examples.text_sha256}",
        "Examples": f"seed {examples.seed}; {examples.tokens:,} tokens, at most {examples.longest} in one; "
        "15 % masked (80 % mask, 10 % another token, 10 % as they are); "
        f"{examples.following:,} of {examples.examples:,} second spans follow the first",
        "Machine": f"{machine.get('cpu', 'unknown')}; {machine.get('usable_cpus', '?')} processors; "
        f"{', '.join(machine.get('instruction_sets', ()))}",
        "Versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        "Took": f"{report.seconds:.0f} s",
    }


def _finite(value: Any) -> Any:
    """A JSON value with ``None`` for every float that is NaN or infinite."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {name: _finite(part) for name, part in value.items()}
        case list() | tuple():
            return [_finite(part) for part in value]
        case _:
            return value
