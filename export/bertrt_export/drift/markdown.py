"""A drift report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bertrt_export.drift.budgets import write_limit
from bertrt_export.drift.figures import FIGURES, write_value
from bertrt_export.drift.prompts import Prediction
from bertrt_export.drift.report import DriftReport, facts


def render(report: DriftReport) -> str:
    """The report as Markdown."""
    engine, examples = report.engine, report.examples
    lines = [
        f"# Drift of {_cell(engine.name)} ({engine.precision})",
        "",
        f"**{'Within' if report.passed else 'Over'} budget.** Compared with PyTorch float32 on "
        f"{examples.examples:,} examples ({examples.masked:,} masked positions) from {_cell(examples.text)}.",
        "",
    ]
    if report.violations:
        lines += ["Over budget:", "", *(f"- {violation.message}" for violation in report.violations), ""]
    if report.left_out:
        lines += ["Left out:", "", *(f"- {part}: {_cell(why)}" for part, why in report.left_out.items()), ""]
    over = {violation.figure for violation in report.violations}
    lines += [
        "## Figures",
        "",
        *_table(
            ("", "figure", "measured", "budget", ""),
            (
                (
                    figure.section,
                    figure.label,
                    figure.write(report.figures[name]),
                    write_limit(name, report.budgets[name]) if name in report.budgets else "",
                    "over" if name in over else "ok" if name in report.budgets else "",
                )
                for name, figure in FIGURES.items()
                if name in report.figures
            ),
            align="--:--",
        ),
        "",
    ]
    if report.layers:
        lines += [
            "## Signal to noise, layer by layer",
            "",
            f"Against PyTorch's layers, over {report.layer_tokens:,} tokens.",
            "",
            *_table(
                ("output of", "signal to noise"),
                ((layer.name, write_value("decibels", layer.snr_db)) for layer in report.layers),
                align="-:",
            ),
            "",
        ]
    if report.prompts:
        lines += ["## The model card's prompts", ""]
        for prompt in report.prompts:
            lines += [
                f"{_cell(prompt.prompt)} (KL divergence {write_value('number', prompt.kl)})",
                "",
                *_table(
                    ("reference", "score", "engine", "score"),
                    (
                        (
                            *_prediction(prompt.reference, rank, "reference"),
                            *_prediction(prompt.engine, rank, "engine"),
                        )
                        for rank in range(len(prompt.reference))
                    ),
                    align="-:-:",
                ),
                "",
            ]
    if report.bias:
        bias = report.bias
        lines += [
            "## Man and woman",
            "",
            f"Total-variation distance between the two predictions: {bias.reference:.4f} in the reference, "
            f"{bias.engine:.4f} in the engine ({bias.shift_points:+.2f} points). Below, log2 of how much "
            "more likely a word is for the woman than for the man; -1 is twice as likely for the man.",
            "",
            *_table(
                ("word", "reference", "engine", "change"),
                (
                    (
                        lean.token_str,
                        f"{lean.reference:+.2f}",
                        f"{lean.engine:+.2f}",
                        f"{lean.engine - lean.reference:+.2f}",
                    )
                    for lean in bias.leans
                ),
                align="-:::",
            ),
            "",
        ]
    lines += ["## How it was measured", ""]
    lines += [f"- {name}: {_cell(fact)}" for name, fact in facts(report).items()]
    lines.append("")
    return "\n".join(lines)


def _prediction(predictions: Sequence[Prediction], rank: int, side: str) -> tuple[str, str]:
    if rank >= len(predictions):
        return "", ""
    return predictions[rank].token_str, f"{getattr(predictions[rank], side):.4f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, align: str) -> list[str]:
    """A table whose columns are as wide as they need, so that it reads well unrendered too."""
    cells = [header, *([_cell(cell) for cell in row] for row in rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(
                cell.rjust(width) if side == ":" else cell.ljust(width)
                for cell, width, side in zip(row, widths, align, strict=True)
            )
            + " |"
        )

    rule = [
        ("-" * (width - 1)) + (":" if side == ":" else "-") for width, side in zip(widths, align, strict=True)
    ]
    return [line(cells[0]), "| " + " | ".join(rule) + " |", *map(line, cells[1:])]


def _cell(text: str) -> str:
    """Text that cannot break out of its place: no line ends or control characters, Markdown's own escaped."""
    text = "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )
    for character in "\\`*_[]<>|":
        text = text.replace(character, "\\" + character)
    return text
