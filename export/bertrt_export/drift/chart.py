"""The chart of a drift report: signal to noise, layer by layer, as inline SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from bertrt_export.drift.figures import write_value
from bertrt_export.drift.report import LayerDrift

_WIDTH, _HEIGHT = 760, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 22, 30
# More bars than this have no room for a number on each.
_MOST_LABELS = 16


def layer_chart(layers: Sequence[LayerDrift], limit: float | None) -> str:
    """A bar for each layer; the budget, where there is one, as a dashed line.

    A layer without noise has a bar of full height, one without signal none; the label says which it is.
    """
    finite = [layer.snr_db for layer in layers if math.isfinite(layer.snr_db)]
    highest = max([20.0, *finite])
    # A budget far above every bar would press them flat; its line then lies at the top.
    highest = max(highest, min(limit or 0.0, 2 * highest))
    step = _step(highest)
    top = step * math.ceil(highest * 1.05 / step)
    height = _HEIGHT - _TOP - _BOTTOM
    slot = (_WIDTH - _LEFT - _RIGHT) / len(layers)

    def level(decibels: float) -> float:
        return _TOP + height * (1 - max(0.0, min(decibels, top)) / top)

    parts = []
    for mark in range(0, int(top) + 1, int(step)):
        y = level(mark)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="axis" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{mark}</text>')
    parts.append(f'<text class="axis" x="{_LEFT - 8}" y="{_TOP - 9}" text-anchor="end">dB</text>')
    for index, layer in enumerate(layers):
        x, y = _LEFT + slot * index, level(layer.snr_db)
        words = f"{layer.name}: {write_value('decibels', layer.snr_db)}"
        over = limit is not None and layer.snr_db < limit
        parts.append(
            f'<rect class="{"over" if over else "fill"}" x="{x + slot * 0.18:.1f}" y="{y:.1f}" '
            f'width="{slot * 0.64:.1f}" height="{_TOP + height - y:.1f}" rx="2">'
            f"<title>{html.escape(words)}</title></rect>"
        )
        middle = x + slot / 2
        if len(layers) <= _MOST_LABELS:
            label = f"{layer.snr_db:.1f}" if math.isfinite(layer.snr_db) else words.partition(": ")[2]
            parts.append(
                f'<text class="amount" x="{middle:.1f}" y="{y - 5:.1f}" text-anchor="middle">{label}</text>'
            )
        name = layer.name.removeprefix("layer ") if len(layers) > 8 else layer.name
        if name == "embeddings" and len(layers) > 8:
            name = "emb."
        parts.append(
            f'<text class="axis" x="{middle:.1f}" y="{_HEIGHT - 10}" text-anchor="middle">{html.escape(name)}</text>'
        )
    if limit is not None:
        y = level(limit)
        parts.append(f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    description = "; ".join(f"{layer.name} {write_value('decibels', layer.snr_db)}" for layer in layers)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Signal to noise: {html.escape(description)}">'
        f"{''.join(parts)}</svg>"
        + (f'<p class="quiet">Dashed: the budget, {limit:g} dB.</p>' if limit is not None else "")
    )


def _step(highest: float) -> float:
    """Distance of the grid's lines: five to ten of them, at round numbers."""
    step = 5.0
    while highest / step > 8:
        step *= 2
    return step
