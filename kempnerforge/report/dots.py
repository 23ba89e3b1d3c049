"""Charts of points as inline SVG: values with their intervals, and values over a cost. They look like the
charts of ``charts.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kempnerforge.report.charts import BOTTOM, LEFT, RIGHT, STYLE, TOP, WIDTH, Axis, grid, head, log_ticks, nice_ticks
from kempnerforge.report.html import text
from kempnerforge.util.numbers import format_number

LINE, LETTER, LONGEST = 24.0, 7.4, 30
"""Height of one line of an interval chart, width of a letter on a narrow screen, and letters of a name at
most.
"""
CLOSE = 1.2
"""Costs whose ratio is at most this are shown side by side, not spread over the whole axis."""


class Spread(NamedTuple):
    """A value with an interval, and the single values; an interval that is not known is NaN."""

    name: str
    value: float
    low: float
    high: float
    points: Sequence[float] = ()


class Dot(NamedTuple):
    """A value over a cost."""

    name: str
    x: float
    y: float
    low: float = math.nan
    high: float = math.nan


def interval_chart(
    entries: Sequence[Spread], title: str, x_label: str, x_format: Callable[[float], str] = format_number, zero: bool = False
) -> str:
    """A line for each of ``entries``: its value, interval and single values.

    Args:
        zero: mark 0, which the axis holds then.
    """
    ends = [v for one in entries for v in (one.value, one.low, one.high, *one.points) if math.isfinite(v)] + ([0.0] if zero else [])
    ticks = nice_ticks(min(ends, default=0.0), max(ends, default=1.0), 4)
    names = [_lines(one.name) for one in entries]
    line = LINE + 14 * (max(map(len, names), default=1) - 1)
    room = LETTER * max((len(part) for parts in names for part in parts), default=0) + 4
    left, top = room + 12, 34.0
    axis, bottom = Axis(ticks[0], ticks[-1], left, RIGHT), top + line * len(entries)
    about = "; ".join(f"{one.name}: {x_format(one.value)}" for one in entries)
    parts = [
        f'<svg class="kf-chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {bottom + 42:g}" role="img"'
        f' aria-label="{text(f"{title}. {about}")}"><title>{text(title)}</title><style>{STYLE}</style>'
        f'<text class="kf-title" x="2" y="15">{text(title)}</text>'
    ]
    for tick in ticks:
        x, kind = axis(tick), "kf-rule" if zero and tick == 0 else "kf-grid"
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top:g}" y2="{bottom:g}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 16:g}" text-anchor="{"end" if x > RIGHT - 12 else "middle"}">{text(x_format(tick))}</text>'
        )
    fits = LETTER * len(x_label) < RIGHT - left
    at, anchor = ((left + RIGHT) / 2, "middle") if fits else (RIGHT, "end")
    parts.append(f'<text x="{at:g}" y="{bottom + 34:g}" text-anchor="{anchor}">{text(x_label)}</text>')
    for number, (one, lines) in enumerate(zip(entries, names, strict=True)):
        y = top + line * (number + 0.5)
        first = y + 4 - 7 * (len(lines) - 1)
        for row, name in enumerate(lines):
            shown = f"{text(name)}<title>{text(one.name)}</title>"
            parts.append(f'<text class="kf-name" x="{room:g}" y="{first + 14 * row:.1f}" text-anchor="end">{shown}</text>')
        parts += [
            f'<circle cx="{axis(v):.1f}" cy="{y:.1f}" r="2.2" fill="var(--kf-muted)" opacity=".55"/>'
            for v in one.points
            if math.isfinite(v)
        ]
        if math.isfinite(one.low) and math.isfinite(one.high):
            parts.append(
                f'<line x1="{axis(one.low):.1f}" x2="{axis(one.high):.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--kf-1)" stroke-width="2"/>'
            )
        if math.isfinite(one.value):
            label = text(f"{one.name}: {x_format(one.value)}")
            parts.append(
                f'<circle class="kf-dot" cx="{axis(one.value):.1f}" cy="{y:.1f}" r="4.5" fill="var(--kf-1)"><title>{label}</title></circle>'
            )
    return "".join([*parts, "</svg>"])


def _lines(name: str) -> list[str]:
    """``name`` as it is written: a long difference of two in two lines."""
    parts = name.partition(" − ")
    lines = [parts[0], f"− {parts[2]}"] if len(name) > LONGEST and parts[2] else [name]
    return [line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…" for line in lines]


def scatter(
    dots: Sequence[Dot],
    title: str,
    y_label: str,
    x_label: str,
    y_format: Callable[[float], str] = format_number,
    log: bool = False,
    higher: bool = True,
) -> str:
    """Each of ``dots`` with its name; those that another one beats in both (a better y for no more of x) are
    pale.

    Args:
        log: logarithmic x axis.
        higher: a higher y is better.
    """
    seen = [dot for dot in dots if math.isfinite(dot.x) and math.isfinite(dot.y) and (dot.x > 0 or not log)]
    ys = [v for dot in seen for v in (dot.y, dot.low, dot.high) if math.isfinite(v)] or [0.0, 1.0]
    xs = [dot.x for dot in seen] or [1.0, 10.0]
    if max(xs) <= CLOSE * min(xs):  # that they hardly differ shall be seen
        xs += [max(xs) / CLOSE, min(xs) * CLOSE]
    wide = log and max(xs) > 3 * min(xs)
    x_ticks = log_ticks(min(xs), max(xs)) if wide else nice_ticks(min(xs), max(xs), 4)
    y_ticks = nice_ticks(min(ys), max(ys))
    x_axis, y_axis = Axis(x_ticks[0], x_ticks[-1], LEFT + 12, RIGHT - 12, wide), Axis(y_ticks[0], y_ticks[-1], BOTTOM, TOP)
    about = "; ".join(f"{dot.name}: {y_format(dot.y)} at {format_number(dot.x)}" for dot in seen)
    parts = [head(title, y_label, x_label, about), *grid(x_axis, x_ticks, y_axis, y_ticks, x_label, y_format)]
    labels: list[tuple[float, float]] = []
    for dot in seen:
        beaten = any(other.x <= dot.x and (other.y > dot.y if higher else other.y < dot.y) for other in seen)
        x, y, shade = x_axis(dot.x), y_axis(dot.y), 0.5 if beaten else 1.0
        if math.isfinite(dot.low) and math.isfinite(dot.high):
            ends = f'y1="{y_axis(dot.low):.1f}" y2="{y_axis(dot.high):.1f}"'
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" {ends} stroke="var(--kf-1)" stroke-width="1.5" opacity="{shade}"/>')
        label = text(f"{dot.name}: {y_format(dot.y)} at {format_number(dot.x)}")
        parts.append(
            f'<circle class="kf-dot" cx="{x:.1f}" cy="{y:.1f}" r="5" fill="var(--kf-1)" opacity="{shade}"><title>{label}</title></circle>'
        )
        side, shift = ("end", -8) if x > (LEFT + RIGHT) / 2 else ("start", 8)
        at = y - 6
        while any(abs(x - other) < 90 and abs(at - height) < 13 for other, height in labels):
            at += 13  # below a name that is there
        labels.append((x, at))
        parts.append(f'<text class="kf-over" x="{x + shift:.1f}" y="{at:.1f}" text-anchor="{side}">{text(dot.name)}</text>')
    return "".join([*parts, "</svg>"])
