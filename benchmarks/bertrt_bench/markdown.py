"""Tables and words of a record in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from bertrt.cli.console import printable


def table(
    heading: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] | None = None
) -> list[str]:
    """A Markdown table; all columns but the first are numbers, unless ``right`` names those that are."""
    numbers = range(1, len(heading)) if right is None else right
    rule = ["---:" if column in numbers else "---" for column in range(len(heading))]
    return [f"| {' | '.join(map(cell, row))} |" for row in (heading, rule, *rows)]


def cell(text: str) -> str:
    """Text that cannot break out of its place: no control characters, no bars, no markup of HTML."""
    return printable(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")


def number(value: float) -> str:
    """Three significant digits, or all the digits of a larger number."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
