"""Histograms: as inline SVG in the style of the other charts, and as lines of text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kempnerforge.report.charts import BOTTOM, LEFT, RIGHT, TOP, Axis, grid, head, nice_ticks
from kempnerforge.report.html import text
from kempnerforge.util.numbers import format_number

BLOCKS = " ▏▎▍▌▋▊▉█"


def bar_chart(counts: np.ndarray, edges: np.ndarray, title: str, x_label: str, rules: Sequence[tuple[float, str]] = ()) -> str:
    """A histogram as an SVG element.

    Args:
        title, x_label: plain text, escaped here.
        rules: (x, name) vertical reference lines; those outside the bins widen the axis.
    """
    high = max([float(edges[-1]), *(x for x, _ in rules)])
    low = float(edges[0]) if edges[0] > high / 4 else 0.0
    y_ticks = nice_ticks(0, max(int(counts.max(initial=0)), 1))
    x_axis, y_axis = Axis(low, max(high, low + 1), LEFT, RIGHT), Axis(0, y_ticks[-1], BOTTOM, TOP)
    about = f"{int(counts.sum()):,} samples between {format_number(float(edges[0]))} and {format_number(float(edges[-1]))} {x_label}"
    x_ticks = [tick for tick in nice_ticks(low, high) if low <= tick <= high]
    parts = [head(title, "samples", x_label, about), *grid(x_axis, x_ticks, y_axis, y_ticks, x_label, format_number)]
    for count, begin, end in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if count:
            left, right, top = x_axis(begin), x_axis(end), min(y_axis(count), BOTTOM - 1)
            parts.append(
                f'<rect x="{left:.2f}" y="{top:.2f}" width="{max(right - left - 0.6, 0.6):.2f}" height="{BOTTOM - top:.2f}" fill="var(--kf-1)">'
                f"<title>{format_number(begin)} to {format_number(end - 1)}: {count:,}</title></rect>"
            )
    for number, (x, name) in enumerate(rules):
        anchor, shift = ("end", -4) if x_axis(x) > (LEFT + RIGHT) / 2 else ("start", 4)
        parts.append(f'<line class="kf-rule" x1="{x_axis(x):.1f}" x2="{x_axis(x):.1f}" y1="{TOP - 8:g}" y2="{BOTTOM:g}"/>')
        where = f'x="{x_axis(x) + shift:.1f}" y="{TOP + 6 + 14 * number:g}" text-anchor="{anchor}"'
        parts.append(f'<text class="kf-over" {where}>{text(name)}</text>')
    return "".join([*parts, "</svg>"])


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
