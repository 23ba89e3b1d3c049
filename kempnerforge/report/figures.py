"""Figures for papers, drawn by matplotlib in the style of ``paper.mplstyle``. Pages have the charts of
``charts.py`` instead.

::

    figure = curves([Series("run a", steps, losses), Series("run b", steps, others)], "Loss", "nats", log=True)
    save(figure, Path("loss.pdf"))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kempnerforge.report.charts import MAX_MARKERS, MIN_SMOOTHED, Point, Series, log_ticks, moving_average
from kempnerforge.report.dots import Dot, Spread
from kempnerforge.util.errors import InputError
from kempnerforge.util.files import write_whole
from kempnerforge.util.numbers import format_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("paper.mplstyle")
FORMATS = (".pdf", ".png")
FAINT, SHADE = 0.25, 0.18
"""Opacity of values below their moving average, and of an interval."""


class Interval(NamedTuple):
    """Limits of a confidence interval (or of a range over seeds) at each x of a series."""

    low: Sequence[float]
    high: Sequence[float]


def curves(
    series: Sequence[Series],
    title: str,
    y_label: str,
    x_label: str = "optimizer step",
    *,
    y_range: tuple[float, float] | None = None,
    log: bool = False,
    y_format: Callable[[float], str] = format_number,
    intervals: Mapping[str, Interval] | None = None,
) -> Figure:
    """The lines of ``series`` over one pair of axes.

    Args:
        series: drawn in this order; the first seven differ in colour and line style.
        title, y_label, x_label: plain text; a ``$`` is a dollar sign.
        y_range: limits of the y axis; None: all values fit.
        log: logarithmic y axis; values that are not positive leave gaps.
        y_format: the numbers on the y axis.
        intervals: by name of a series, shaded around its line.

    Raises:
        InputError: matplotlib is not installed.
    """
    with _style():
        from matplotlib.figure import Figure

        figure = Figure()
        axes = figure.subplots()
        for one in series:
            points = one.points(log)
            drawn = points
            if one.smooth and len(points) >= MIN_SMOOTHED:
                drawn = moving_average(points)
            (line,) = axes.plot(*_columns(drawn), label=_literal(one.name), marker="o" if len(drawn) <= MAX_MARKERS else "")
            if drawn is not points:
                axes.plot(*_columns(points), color=line.get_color(), linestyle="-", linewidth=0.5, alpha=FAINT, zorder=1)
            if intervals and one.name in intervals:
                low, high = intervals[one.name]
                axes.fill_between(list(one.x), low, high, color=line.get_color(), alpha=SHADE, linewidth=0)
        axes.set_title(_literal(title))
        axes.set_xlabel(_literal(x_label))
        axes.set_ylabel(_literal(y_label))
        if log:
            axes.set_yscale("log")
        if y_range is not None:
            axes.set_ylim(*y_range)
        if log:
            low, high = axes.get_ylim()
            axes.set_yticks([tick for tick in log_ticks(low, high) if low <= tick <= high])
            axes.minorticks_off()
        axes.locator_params(axis="x", nbins=6)
        axes.xaxis.set_major_formatter(lambda value, _: format_number(value))
        axes.yaxis.set_major_formatter(lambda value, _: y_format(value))
        if len(series) > 1:
            axes.legend()
    return figure


def intervals(
    entries: Sequence[Spread], title: str, x_label: str, *, zero: bool = False, x_format: Callable[[float], str] = format_number
) -> Figure:
    """A line for each of ``entries``, the first on top: its value, interval and single values.

    Args:
        zero: mark 0.

    Raises:
        InputError: matplotlib is not installed.
    """
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, min(max(height, 0.28 * len(entries) + 0.9), 3 * height))
        axes = figure.subplots()
        for place, one in enumerate(entries):
            axes.plot(list(one.points), [place] * len(one.points), linestyle="", marker="o", color="0.6", markersize=2.5)
            if math.isfinite(one.low) and math.isfinite(one.high):
                axes.plot([one.low, one.high], [place, place], color="C0", linestyle="-", marker="")
            axes.plot([one.value], [place], color="C0", linestyle="", marker="s")
        if zero:
            axes.axvline(0, color="0.3", linewidth=0.8, linestyle="-")
        axes.set_yticks(range(len(entries)), [_literal(one.name) for one in entries])
        axes.invert_yaxis()
        axes.set_title(_literal(title))
        axes.set_xlabel(_literal(x_label))
        axes.xaxis.set_major_formatter(lambda value, _: x_format(value))
    return figure


def scatter(dots: Sequence[Dot], title: str, y_label: str, x_label: str, *, y_format: Callable[[float], str] = format_number) -> Figure:
    """Values with their intervals over a cost, whose axis is logarithmic.

    Raises:
        InputError: matplotlib is not installed.
    """
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        axes = figure.subplots()
        for one in dots:
            (mark,) = axes.plot([one.x], [one.y], linestyle="", marker="o", label=_literal(one.name))
            if math.isfinite(one.low) and math.isfinite(one.high):
                axes.plot([one.x, one.x], [one.low, one.high], color=mark.get_color(), linestyle="-", marker="")
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xticks([tick for tick in log_ticks(low, high) if low <= tick <= high])
        axes.minorticks_off()
        axes.set_title(_literal(title))
        axes.set_xlabel(_literal(x_label))
        axes.set_ylabel(_literal(y_label))
        axes.xaxis.set_major_formatter(lambda value, _: format_number(value))
        axes.yaxis.set_major_formatter(lambda value, _: y_format(value))
        axes.legend()
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Writes ``figure`` to ``path``; an old file is replaced in one move. The same figure gives the same
    bytes.

    PDF files hold their fonts as TrueType (type 42): publishers refuse matplotlib's default, type 3.

    Args:
        path: its suffix says in which of ``FORMATS``; its directory is made.

    Raises:
        InputError: it is another format.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: {path.suffix or 'no suffix'} is no format of figures; take one of {', '.join(FORMATS)}")
    kind = path.suffix.lower().removeprefix(".")
    metadata = {"CreationDate": None} if kind == "pdf" else {}
    with _style():
        return write_whole(path, lambda part: figure.savefig(part, format=kind, metadata=metadata))


def _style() -> AbstractContextManager[object]:
    """The style of papers alone: neither the user's ``matplotlibrc`` nor the styles of others change a
    figure.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
    except ImportError:
        raise InputError("figures for papers need the package matplotlib: pip install 'kempnerforge[paper]'") from None
    return style.context(str(STYLE), after_reset=True)


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _literal(text: str) -> str:
    """``text`` without mathematics: matplotlib reads what is between dollar signs as TeX."""
    return text.replace("$", r"\$")
