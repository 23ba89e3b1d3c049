"""Histograms: as inline SVG in the style of the other charts, and as lines of text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kempnerforge.data.audit_page import text
from kempnerforge.training.charts import BOTTOM, HEIGHT, LEFT, RIGHT, STYLE, TOP, WIDTH, format_number, nice_ticks

BLOCKS = " ▏▎▍▌▋▊▉█"


def bar_chart(counts: np.ndarray, edges: np.ndarray, title: str, x_label: str, rules: Sequence[tuple[float, str]] = ()) -> str:
    """A histogram as an SVG element.

    Args:
        counts: (n,) of each bin.
        edges: (n + 1,) rising.
        title, x_label: plain text, escaped here.
        rules: (x, name) vertical reference lines; those outside the bins widen the axis.
    """
    high = max([float(edges[-1]), *(x for x, _ in rules)])
    low = float(edges[0]) if edges[0] > high / 4 else 0.0
    x_of = lambda x: LEFT + (RIGHT - LEFT) * (x - low) / max(high - low, 1)
    ticks = nice_ticks(0, max(int(counts.max(initial=0)), 1))
    y_of = lambda y: BOTTOM - (BOTTOM - TOP) * y / ticks[-1]
    about = (
        f"{title}: {int(counts.sum()):,} samples between {format_number(float(edges[0]))} and {format_number(float(edges[-1]))} {x_label}"
    )
    parts = [
        f'<svg class="kf-chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img"'
        f' aria-label="{text(about)}"><title>{text(title)}</title><style>{STYLE}</style>'
        f'<text class="kf-title" x="2" y="15">{text(title)}</text><text x="2" y="34">samples</text>'
    ]
    for tick in ticks:
        y = y_of(tick)
        parts.append(f'<line class="kf-grid" x1="{LEFT:g}" x2="{RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6:g}" y="{y + 4:.1f}" text-anchor="end">{format_number(tick)}</text>')
    for count, begin, end in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if count:
            left, right, top = x_of(begin), x_of(end), min(y_of(count), BOTTOM - 1)
            parts.append(
                f'<rect x="{left:.2f}" y="{top:.2f}" width="{max(right - left - 0.6, 0.6):.2f}" height="{BOTTOM - top:.2f}" fill="var(--kf-1)">'
                f"<title>{format_number(begin)} to {format_number(end - 1)}: {count:,}</title></rect>"
            )
    parts.append(f'<line class="kf-axis" x1="{LEFT:g}" x2="{RIGHT:g}" y1="{BOTTOM:g}" y2="{BOTTOM:g}"/>')
    for tick in nice_ticks(low, high):
        if low <= tick <= high:
            anchor = "end" if x_of(tick) > RIGHT - 12 else "middle"
            parts.append(f'<text x="{x_of(tick):.1f}" y="{BOTTOM + 17:g}" text-anchor="{anchor}">{format_number(tick)}</text>')
    for number, (x, name) in enumerate(rules):
        anchor, shift = ("end", -4) if x_of(x) > (LEFT + RIGHT) / 2 else ("start", 4)
        parts.append(f'<line class="kf-rule" x1="{x_of(x):.1f}" x2="{x_of(x):.1f}" y1="{TOP - 8:g}" y2="{BOTTOM:g}"/>')
        parts.append(
            f'<text class="kf-over" x="{x_of(x) + shift:.1f}" y="{TOP + 6 + 14 * number:g}" text-anchor="{anchor}">{text(name)}</text>'
        )
    parts.append(f'<text x="{(LEFT + RIGHT) / 2:g}" y="{HEIGHT - 4:g}" text-anchor="middle">{text(x_label)}</text></svg>')
    return "".join(parts)


def bar_lines(counts: np.ndarray, edges: np.ndarray, width: int = 48) -> list[str]:
    """A histogram as lines of text, one for each bin."""
    most = max(int(counts.max(initial=0)), 1)
    digits = len(f"{int(edges[-1]):,}")
    lines = []
    for count, begin, end in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        eighths = -(-8 * width * count // most)
        bar = BLOCKS[8] * (eighths // 8) + BLOCKS[eighths % 8].strip()
        lines.append(f"{begin:>{digits},} to {end - 1:>{digits},}  {bar} {count:,}")
    return lines
