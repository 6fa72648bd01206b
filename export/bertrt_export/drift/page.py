"""A drift report as one HTML page that needs nothing but itself."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from importlib import resources

from bertrt_export.drift.budgets import write_limit
from bertrt_export.drift.chart import layer_chart
from bertrt_export.drift.figures import FIGURES, Section, write_value
from bertrt_export.drift.prompts import BiasDrift, Lean, PromptDrift
from bertrt_export.drift.report import DriftReport, facts

# The figures in large print at the top, as far as the model has them.
_HEADLINES = (
    *("top1_agreement", "mlm_accuracy_change_points", "kl_mean", "nsp_changed"),
    *("hidden_cosine_mean", "layer_snr_lowest"),
)
# No script can run, and nothing can be loaded, whatever a text in the report may hold.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render(report: DriftReport) -> str:
    """The report as HTML: self-contained, light or dark as the reader's system is."""
    engine = report.engine
    verdict = "within budget" if report.passed else "over budget"
    title = f"Drift of {engine.name} ({engine.precision})"
    body = "\n".join(
        part
        for part in (
            _header(report, verdict),
            _violations(report),
            _tiles(report),
            _left_out(report),
            _prompts(report.prompts),
            _bias(report.bias) if report.bias else "",
            _layers(report),
            _figures(report),
            _method(report),
        )
        if part
    )
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(title)}: {verdict}</title>\n<style>\n{_stylesheet()}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def escape(text: str) -> str:
    """Text for HTML; a control character, which HTML cannot hold, becomes U+FFFD."""
    shown = "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )
    return html.escape(shown, quote=True)


def _stylesheet() -> str:
    return resources.files(__package__ or "").joinpath("page.css").read_text(encoding="utf-8")


def _header(report: DriftReport, verdict: str) -> str:
    engine, examples = report.engine, report.examples
    state = "ok" if report.passed else "over"
    return (
        f'<header>\n<div><h1>{escape(engine.name)} <span class="tag">{engine.precision}</span></h1>\n'
        f"<p>Distance from PyTorch float32 with the same weights, on {examples.examples:,} examples and "
        f"{examples.masked:,} masked positions from {escape(examples.text)}.</p></div>\n"
        f'<p class="verdict {state}">{verdict}</p>\n</header>'
    )


def _violations(report: DriftReport) -> str:
    if report.passed:
        return ""
    items = "".join(f"<li>{escape(violation.message)}</li>" for violation in report.violations)
    return f'<section class="alarm"><h2>Over budget</h2><ul>{items}</ul></section>'


def _left_out(report: DriftReport) -> str:
    if not report.left_out:
        return ""
    items = "".join(f"<li>{escape(part)}: {escape(why)}</li>" for part, why in report.left_out.items())
    return f"<section><h2>Left out</h2><ul>{items}</ul></section>"


def _tiles(report: DriftReport) -> str:
    over = {violation.figure for violation in report.violations}
    tiles = []
    for name in _HEADLINES:
        if name not in report.figures:
            continue
        figure = FIGURES[name]
        limit = f"budget {write_limit(name, report.budgets[name])}" if name in report.budgets else "no budget"
        state = "over" if name in over else "ok" if name in report.budgets else "free"
        tiles.append(
            f'<div class="tile {state}"><p class="label">{figure.title}</p>'
            f'<p class="value">{figure.write(report.figures[name])}</p><p class="limit">{limit}</p></div>'
        )
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _figures(report: DriftReport) -> str:
    over = {violation.figure for violation in report.violations}
    rows = []
    section: Section | None = None
    for name, figure in FIGURES.items():
        if name not in report.figures:
            continue
        if figure.section != section:
            section = figure.section
            rows.append(f'<tr class="group"><th colspan="4" scope="colgroup">{section}</th></tr>')
        limit = write_limit(name, report.budgets[name]) if name in report.budgets else "&#8211;"
        mark = ""
        if name in report.budgets:
            mark = '<span class="over">over</span>' if name in over else '<span class="ok">ok</span>'
        rows.append(
            f'<tr><td>{figure.label}<span class="meaning">{escape(figure.meaning)}</span></td>'
            f'<td class="number">{figure.write(report.figures[name])}</td>'
            f'<td class="number quiet">{limit}</td><td>{mark}</td></tr>'
        )
    head = (
        '<tr><th>figure</th><th class="number">measured</th><th class="number">budget</th>'
        '<th><span class="unseen">verdict</span></th></tr>'
    )
    return (
        f'<section><h2>All figures</h2><div class="wide"><table><thead>{head}</thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _layers(report: DriftReport) -> str:
    if not report.layers:
        return ""
    return (
        "<section><h2>Where the error comes from</h2>"
        "<p>Signal-to-noise ratio behind the embeddings and behind each layer, over "
        f"{report.layer_tokens:,} tokens. Every 6 dB less is one bit of precision lost.</p>"
        f"{layer_chart(report.layers, report.budgets.get('layer_snr_lowest'))}</section>"
    )


def _prompts(prompts: Sequence[PromptDrift]) -> str:
    if not prompts:
        return ""
    blocks = []
    for prompt in prompts:
        widest = max(
            (max(p.reference, p.engine) for p in (*prompt.reference, *prompt.engine) if prompt.engine),
            default=max((p.reference for p in prompt.reference), default=1.0),
        )
        sides = "".join(
            f'<div><h4>{label}</h4><ol class="bars">{_bars(rows, widest)}</ol></div>'
            for label, rows in (
                ("PyTorch float32", [(p.token_str, p.reference) for p in prompt.reference]),
                ("engine", [(p.token_str, p.engine) for p in prompt.engine]),
            )
        )
        blocks.append(
            f'<article><h3>{escape(prompt.prompt)}</h3><div class="sides">{sides}</div>'
            f'<p class="quiet">KL divergence {write_value("number", prompt.kl)}</p></article>'
        )
    return f'<section><h2>The model card&#8217;s prompts</h2><div class="prompts">{"".join(blocks)}</div></section>'


def _bars(rows: Iterable[tuple[str, float]], widest: float) -> str:
    bars = "".join(
        f'<li><span class="word">{escape(word)}</span>'
        f'<span class="bar"><span style="width:{100 * score / widest:.1f}%"></span></span>'
        f'<span class="score">{score:.4f}</span></li>'
        for word, score in rows
    )
    return bars or '<li><span class="word">not finite</span></li>'


def _bias(bias: BiasDrift) -> str:
    widest = max(1.0, *(abs(value) for lean in bias.leans for value in (lean.reference, lean.engine)))
    rows = "".join(
        f"<tr><td>{escape(lean.token_str)}</td><td>{_lean(lean, widest)}</td>"
        f'<td class="number">{lean.reference:+.2f}</td><td class="number">{lean.engine:+.2f}</td>'
        f'<td class="number">{lean.engine - lean.reference:+.2f}</td></tr>'
        for lean in bias.leans
    )
    return (
        "<section><h2>Man and woman</h2>"
        "<p>How differently the model goes on, as the total-variation distance of its two answers: "
        f"<strong>{bias.reference:.4f}</strong> in PyTorch, <strong>{bias.engine:.4f}</strong> in the engine, "
        f"a shift of {bias.shift_points:+.2f} points. Below, to whom each of the best words leans: log<sub>2</sub> of "
        "its probability for the woman over that for the man (+1: twice as likely for the woman). "
        'The <span class="dot reference">&#9679;</span> is PyTorch, the '
        '<span class="dot engine">&#9670;</span> the engine.</p>'
        '<div class="wide"><table class="leans"><thead><tr><th>word</th>'
        '<th><span class="ends"><span>man</span><span>woman</span></span></th>'
        '<th class="number">PyTorch</th><th class="number">engine</th><th class="number">change</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _lean(lean: Lean, widest: float) -> str:
    def place(value: float) -> str:
        return f"{50 + 48 * value / widest:.1f}%"

    return (
        '<span class="scale">'
        f'<span class="dot reference" style="left:{place(lean.reference)}">&#9679;</span>'
        f'<span class="dot engine" style="left:{place(lean.engine)}">&#9670;</span></span>'
    )


def _method(report: DriftReport) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts(report).items())
    return f"<section><h2>How it was measured</h2><dl>{items}</dl></section>"
