"""Line charts as inline SVG: no script, no font and no other file is needed. They are readable on light and
dark pages.

Pages have these and not the figures of matplotlib (``figures.py``): CSS variables follow the reader's light
or dark setting, type grows on narrow screens, a point says its value under the mouse, and a report needs no
further package. Each chart brings its own style sheet, so that the same string works in a page and as an
``.svg`` file. Lengths are in units of the view box; a page scales it as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kempnerforge.report.html import text
from kempnerforge.util.numbers import format_number

WIDTH, HEIGHT = 480.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 468.0, 58.0, 232.0  # the plot area
MAX_COLUMNS = 420  # points of one line are thinned to a minimum and a maximum per column
MAX_MARKERS = 30  # a series with at most this many points shows each of them
SHORT = 13  # letters of a name that fit beside the title; longer ones are below the chart
MIN_SMOOTHED = 12  # fewer points than this are not smoothed

Point = tuple[float, float]


class Band(NamedTuple):
    """A part of the x axis with a name, such as a stage of a run."""

    start: float
    end: float
    name: str


STYLE = """
.kf-chart{--kf-ink:#16181d;--kf-muted:#5d6470;--kf-grid:#e3e6eb;--kf-axis:#aab0bb;--kf-band:#6b7a9014;--kf-surface:#fff;
--kf-1:#2468c9;--kf-2:#d9571b;--kf-3:#0f8a6a;--kf-4:#8a4fc7;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;font-size:11px;font-variant-numeric:tabular-nums}
@media (prefers-color-scheme:dark){.kf-chart{--kf-ink:#eceef2;--kf-muted:#a2a9b6;--kf-grid:#2b3038;--kf-axis:#59606c;--kf-band:#9fb0cc14;
--kf-surface:#171a1f;--kf-1:#6ea8ff;--kf-2:#ff9057;--kf-3:#43c9a3;--kf-4:#c39bf5}}
.kf-chart text{fill:var(--kf-muted)}.kf-chart .kf-title{fill:var(--kf-ink);font-size:13.5px;font-weight:600}
.kf-chart .kf-name{fill:var(--kf-ink)}.kf-chart .kf-over{paint-order:stroke;stroke:var(--kf-surface);stroke-width:3px;stroke-linejoin:round}
.kf-chart .kf-band-name{font-size:10px}
.kf-chart .kf-line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.kf-chart .kf-raw{fill:none;stroke-width:1;stroke-linejoin:round;opacity:.3}
.kf-chart .kf-dot{stroke:var(--kf-surface);stroke-width:1}
.kf-chart .kf-grid{stroke:var(--kf-grid);stroke-width:1}.kf-chart .kf-axis{stroke:var(--kf-axis);stroke-width:1}
.kf-chart .kf-edge{stroke:var(--kf-axis);stroke-width:1;stroke-dasharray:2 3}
.kf-chart .kf-rule{stroke:var(--kf-muted);stroke-width:1.2;stroke-dasharray:6 4}
@media (max-width:560px){.kf-chart{font-size:14px}.kf-chart .kf-title{font-size:17px}.kf-chart .kf-band-name{font-size:11.5px}}
"""


@dataclass(frozen=True)
class Series:
    """One line. ``None`` and values that are not finite (or beyond 1e100) leave a gap.

    Attributes:
        x, y: of equal length, in order of x.
        smooth: draw the values faintly and an exponential moving average boldly; it starts anew at each band.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    smooth: bool = False

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"series {self.name!r}: {len(self.x)} x values, {len(self.y)} y values: must be as many")

    def points(self, log: bool = False) -> list[Point]:
        """The values as numbers; y is NaN at a gap. With ``log``, values that are not positive are gaps too."""
        pairs = zip(self.x, self.y, strict=True)
        return [(float(x), number_on_axis(y, log)) for x, y in pairs if math.isfinite(number_on_axis(x, False))]


@dataclass(frozen=True)
class Axis:
    """Maps values in [low, high] to positions in [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        at = math.log10(max(value, 1e-300)) if self.log else value
        share = (at - low) / (high - low)
        return self.start + (self.end - self.start) * min(max(share, -10.0), 11.0)  # far outside is outside enough


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round values whose first and last enclose [low, high]: multiples of 1, 2, 2.5 or 5
    times a power of ten.
    """
    assert math.isfinite(low) and math.isfinite(high) and low <= high
    if low == high:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    rough = max((high - low) / count, math.ulp(max(abs(low), abs(high))) * 8, 1e-300)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next((factor for factor in (1.0, 2.0, 2.5, 5.0) if rough <= factor * power * (1 + 1e-9)), 10.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round values that enclose [low, high] on a logarithmic axis: powers of ten, with 2 and 5 times those
    when there are few.
    """
    assert 0 < low <= high
    if high <= low * (1 + 1e-6):
        low, high = low / 2, high * 2
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    fine = math.log10(high / low) <= 2.5
    factors, stride = ((1, 2, 5), 1) if fine else ((1,), math.ceil((last - first) / 6))
    ticks = [factor * 10.0**power for power in range(first, last + stride, stride) for factor in factors]
    start = max(index for index, tick in enumerate(ticks) if index == 0 or tick <= low * (1 + 1e-9))
    end = min(index for index, tick in enumerate(ticks) if index == len(ticks) - 1 or tick >= high * (1 - 1e-9))
    return ticks[start : end + 1]


def moving_average(points: Sequence[Point], edges: Iterable[float] = ()) -> list[Point]:
    """Exponential moving average without bias towards the first value (as Adam's, Kingma and Ba 2015, section
    3).

    Args:
        points: (x, y), y possibly not finite; such points carry no weight and stay as gaps.
        edges: x values after which the average forgets what was before.
    """
    decay = 1 - 2 / (max(3.0, len(points) / 25) + 1)
    starts = sorted(edges)
    total, weight, passed, result = 0.0, 0.0, 0, []
    for x, y in points:
        crossed = sum(start < x for start in starts)
        if crossed != passed:
            total, weight, passed = 0.0, 0.0, crossed
        if math.isfinite(y):
            total, weight = decay * total + (1 - decay) * y, decay * weight + (1 - decay)
            result.append((x, total / weight))
        else:
            result.append((x, math.nan))
    return result


def line_chart(
    series: Sequence[Series],
    title: str,
    y_label: str,
    x_label: str = "optimizer step",
    bands: Sequence[Band] = (),
    y_range: tuple[float, float] | None = None,
    log: bool = False,
    rules: Sequence[tuple[float, str]] = (),
    y_format: Callable[[float], str] = format_number,
) -> str:
    """An SVG element with the lines of ``series`` over one pair of axes.

    Args:
        series: at most four, so that colours tell them apart.
        title, y_label, x_label: plain text, escaped here.
        bands: parts of the x axis.
        y_range: limits of the y axis; lines are clipped there. By default all values fit.
        log: logarithmic y axis; values that are not positive leave gaps.
        rules: (y, name) horizontal reference lines.
    """
    assert len(series) <= 4, "a chart has four colours"
    lines = [one.points(log) for one in series]
    seen = [(x, y) for line in lines for x, y in line if math.isfinite(y)]
    rules = [(value, name) for value, name in rules if math.isfinite(number_on_axis(value, log))]
    values = [y for _, y in seen] + [value for value, _ in rules]
    x_axis, x_ticks = _x_axis([x for x, _ in seen])
    y_axis, y_ticks = _y_axis(values, y_range, log)
    smooth = [
        moving_average(line, (band.start for band in bands)) if one.smooth and len(line) >= MIN_SMOOTHED else None
        for one, line in zip(series, lines, strict=True)
    ]
    last = [next((y for _, y in reversed(avg or line) if math.isfinite(y)), None) for avg, line in zip(smooth, lines, strict=True)]
    about = "; ".join(f"{one.name}: {'no values' if y is None else f'last {y_format(y)}'}" for one, y in zip(series, last, strict=True))
    legend = [(one.name, "" if y is None else y_format(y)) for one, y in zip(series, last, strict=True)]
    below = len(legend) > 2 and max(len(name) for name, _ in legend) > SHORT
    parts = [
        head(title, y_label, x_label, about, HEIGHT + 20 * math.ceil(len(legend) / 2) * below),
        *(_legend_below(legend) if below else _legend(legend)),
        *_bands(bands, x_axis),
        *grid(x_axis, x_ticks, y_axis, y_ticks, x_label, y_format),
        _CLIP,
        *_rules(rules, y_axis, y_format),
    ]
    for number, (one, line, average) in enumerate(zip(series, lines, smooth, strict=True)):
        parts += _line(one.name, line, average, f"var(--kf-{number % 4 + 1})", x_axis, y_axis, y_format)
    if not seen:
        parts.append(f'<text x="{(LEFT + RIGHT) / 2:g}" y="{(TOP + BOTTOM) / 2:g}" text-anchor="middle">no values yet</text>')
    return "".join([*parts, "</svg></svg>"])


# A nested element clips lines that leave the plot, without an id; it has the coordinates of the chart.
_CLIP = (
    f'<svg x="{LEFT:g}" y="{TOP - 4:g}" width="{RIGHT - LEFT + 4:g}" height="{BOTTOM - TOP + 8:g}"'
    f' viewBox="{LEFT:g} {TOP - 4:g} {RIGHT - LEFT + 4:g} {BOTTOM - TOP + 8:g}">'
)


def head(title: str, y_label: str, x_label: str, about: str, height: float = HEIGHT) -> str:
    """How the element of a chart begins; ``about`` says what it shows."""
    return (
        f'<svg class="kf-chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {height:g}" role="img"'
        f' aria-label="{text(f"{title}. {about}")}"><title>{text(title)}</title>'
        f"<desc>{text(f'{y_label} over {x_label}. {about}')}</desc><style>{STYLE}</style>"
        f'<text class="kf-title" x="2" y="15">{text(title)}</text><text x="2" y="34">{text(y_label)}</text>'
    )


def number_on_axis(value: float | None, log: bool) -> float:
    """``value``, or NaN where it is missing, does not exist on the axis, or is too far out for arithmetic on
    it.
    """
    if value is None or not abs(value) < 1e100 or (log and value < 1e-100):
        return math.nan
    return float(value)


def _x_axis(values: list[float]) -> tuple[Axis, list[float]]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if 0 <= low <= high / 4 or low == high > 0:
        low = 0.0  # a run is shown from its beginning
    if low == high:
        low, high = low - 1, high + 1
    return Axis(low, high, LEFT, RIGHT), [tick for tick in nice_ticks(low, high) if low <= tick <= high]


def _y_axis(values: list[float], y_range: tuple[float, float] | None, log: bool) -> tuple[Axis, list[float]]:
    if y_range is not None:
        low, high = y_range
        if not low < high or (log and low <= 0):
            raise ValueError(f"y_range = {y_range}: must be an interval{', above 0 on a logarithmic axis' if log else ''}")
        ticks = [tick for tick in (log_ticks(low, high) if log else nice_ticks(low, high)) if low <= tick <= high]
        return Axis(low, high, BOTTOM, TOP, log), ticks
    low, high = (min(values), max(values)) if values else (0.1 if log else 0.0, 1.0)
    if not log and 0 < low <= 0.7 * high:
        low = 0.0
    ticks = log_ticks(low, high) if log else nice_ticks(low, high)
    inside = [tick for tick in ticks if low <= tick <= high]
    if log and len(inside) >= 2:
        return Axis(min(low / 1.15, inside[0]), max(high * 1.15, inside[-1]), BOTTOM, TOP, log), inside
    return Axis(ticks[0], ticks[-1], BOTTOM, TOP, log), ticks


def _cut(name: str, room: float, size: float) -> str:
    """``name``, shortened to what fits into ``room``; empty where hardly anything does."""
    letters = int(room / (0.56 * size))
    return name if len(name) <= letters else f"{name[: letters - 1]}…" if letters >= 4 else ""


def _legend(entries: list[tuple[str, str]]) -> list[str]:
    """Right-aligned beside the title and the label of the y axis: two lines, or one each of them when there
    are few.
    """
    parts = []
    for number, (name, value) in reversed(list(enumerate(entries))):
        y = 15 + 19 * number if len(entries) <= 2 else 15 + 19 * (number % 2)
        x = RIGHT if number + 2 >= len(entries) or len(entries) <= 2 else RIGHT - 138
        alone = len(entries) <= 2 or (number == 2 and len(entries) == 3)  # in its line
        shown = f'<tspan class="kf-name">{text(_cut(name, 130 if alone else 84, 11))}</tspan> <tspan>{text(value)}</tspan>'
        parts.append(
            f'<text x="{x - 14:g}" y="{y}" text-anchor="end">{shown}</text>'
            f'<rect x="{x - 9:g}" y="{y - 6}" width="9" height="4" rx="2" fill="var(--kf-{number % 4 + 1})"/>'
        )
    return parts


def _legend_below(entries: list[tuple[str, str]]) -> list[str]:
    """Two in a line, below the label of the x axis."""
    parts = []
    for number, (name, value) in enumerate(entries):
        x, y = 2 + WIDTH / 2 * (number % 2), HEIGHT + 13 + 20 * (number // 2)
        shown = f'<tspan class="kf-name">{text(_cut(name, WIDTH / 2 - 70, 14))}</tspan> <tspan>{text(value)}</tspan>'
        parts.append(
            f'<rect x="{x:g}" y="{y - 6:g}" width="9" height="4" rx="2" fill="var(--kf-{number % 4 + 1})"/>'
            f'<text x="{x + 14:g}" y="{y:g}">{shown}</text>'
        )
    return parts


def _bands(bands: Sequence[Band], axis: Axis) -> list[str]:
    parts = []
    for number, (start, end, name) in enumerate(bands):
        left, right = axis(max(start, axis.low)), axis(min(end, axis.high))
        if right <= left:
            continue
        height = BOTTOM - TOP
        if number % 2:
            parts.append(f'<rect x="{left:.1f}" y="{TOP:g}" width="{right - left:.1f}" height="{height:g}" fill="var(--kf-band)"/>')
        if start > axis.low:
            parts.append(f'<line class="kf-edge" x1="{left:.1f}" x2="{left:.1f}" y1="{TOP - 12:g}" y2="{BOTTOM:g}"/>')
        if shown := _cut(name, right - left - 6, 10):
            parts.append(f'<text class="kf-band-name" x="{left + 4:.1f}" y="{TOP - 4:g}">{text(shown)}<title>{text(name)}</title></text>')
    return parts


def grid(
    x_axis: Axis, x_ticks: list[float], y_axis: Axis, y_ticks: list[float], x_label: str, y_format: Callable[[float], str]
) -> list[str]:
    """Lines, ticks and their numbers, and the label of the x axis."""
    parts = []
    for tick in y_ticks:
        y = y_axis(tick)
        parts.append(f'<line class="kf-grid" x1="{LEFT:g}" x2="{RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6:g}" y="{y + 4:.1f}" text-anchor="end">{text(y_format(tick))}</text>')
    parts.append(f'<line class="kf-axis" x1="{LEFT:g}" x2="{RIGHT:g}" y1="{BOTTOM:g}" y2="{BOTTOM:g}"/>')
    for tick in x_ticks:
        x = x_axis(tick)
        anchor = "end" if x > RIGHT - 12 else "middle"
        parts.append(f'<line class="kf-axis" x1="{x:.1f}" x2="{x:.1f}" y1="{BOTTOM:g}" y2="{BOTTOM + 4:g}"/>')
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 17:g}" text-anchor="{anchor}">{text(format_number(tick))}</text>')
    parts.append(f'<text x="{(LEFT + RIGHT) / 2:g}" y="{HEIGHT - 4:g}" text-anchor="middle">{text(x_label)}</text>')
    return parts


def _rules(rules: Sequence[tuple[float, str]], axis: Axis, y_format: Callable[[float], str]) -> list[str]:
    parts = []
    for value, name in rules:
        y = axis(value)
        parts.append(f'<line class="kf-rule" x1="{LEFT:g}" x2="{RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = text(_cut(f"{name} {y_format(value)}", RIGHT - LEFT, 11))
        parts.append(f'<text class="kf-over" x="{LEFT + 4:g}" y="{y - 5 if y > TOP + 24 else y + 14:.1f}">{label}</text>')
    return parts


def _path(points: Sequence[Point], x_axis: Axis, y_axis: Axis) -> str:
    """Path data, with a gap at each value that is missing and at most two points a column of the plot."""
    runs: list[list[Point]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    stride = max(1, math.ceil(len(points) / MAX_COLUMNS))
    parts = []
    for run in (run for run in runs if run):
        kept = run
        if stride > 2:
            chunks = (run[at : at + stride] for at in range(0, len(run), stride))
            kept = [p for chunk in chunks for p in sorted({min(chunk, key=lambda p: p[1]), max(chunk, key=lambda p: p[1])})]
        coordinates = [f"{x_axis(x):.1f} {y_axis(y):.1f}" for x, y in kept]
        parts.append("M" + "L".join(coordinates) + ("h0" if len(kept) == 1 else ""))  # a round cap makes a dot of one point
    return "".join(parts)


def _line(
    name: str, line: list[Point], average: list[Point] | None, colour: str, x_axis: Axis, y_axis: Axis, y_format: Callable[[float], str]
) -> list[str]:
    """The values faintly below their average; or the values alone, each marked when there are few."""
    if average:
        return [
            f'<path class="kf-raw" stroke="{colour}" d="{_path(line, x_axis, y_axis)}"/>',
            f'<path class="kf-line" stroke="{colour}" d="{_path(average, x_axis, y_axis)}"/>',
        ]
    points = [(x, y) for x, y in line if math.isfinite(y)]
    dots = [
        f'<circle class="kf-dot" cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="3" fill="{colour}">'
        f"<title>{text(f'{name}, step {x:g}: {y_format(y)}')}</title></circle>"
        for x, y in points
    ]
    path = f'<path class="kf-line" stroke="{colour}" d="{_path(line, x_axis, y_axis)}"/>'
    return [path, *(dots if len(points) <= MAX_MARKERS else [])]
