"""Figures for papers: what is drawn, and what a publisher asks of the files."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kempnerforge.report.charts import MIN_SMOOTHED, Series, moving_average
from kempnerforge.report.dots import Dot, Spread
from kempnerforge.report.figures import Interval, curves, intervals, save, scatter
from kempnerforge.util.errors import InputError
from kempnerforge.util.numbers import format_percent

FEW = Series("a run", [0, 100, 200], [4.0, None, 1.0])
MANY = Series("mot", range(MIN_SMOOTHED), [float(k % 2 + 1) for k in range(MIN_SMOOTHED)], smooth=True)


def y_of(line: Any) -> list[float]:
    return [float(y) for y in line.get_ydata()]


def test_values_their_average_and_their_interval_are_drawn() -> None:
    figure = curves([FEW, MANY], "Loss at $5", "nats", intervals={"mot": Interval([0.5] * MIN_SMOOTHED, [2.5] * MIN_SMOOTHED)})
    (axes,) = figure.axes
    few, average, raw = axes.lines
    assert y_of(few) == pytest.approx([4.0, float("nan"), 1.0], nan_ok=True) and few.get_marker() == "o"
    assert y_of(raw) == list(MANY.y) and y_of(average) == [y for _, y in moving_average(MANY.points())]
    assert average.get_color() == raw.get_color() != few.get_color() and average.get_linestyle() != few.get_linestyle()
    shaded = axes.collections[0].get_paths()[0].vertices
    assert (shaded[:, 1].min(), shaded[:, 1].max()) == (0.5, 2.5)
    legend = axes.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["a run", "mot"]
    assert axes.get_title() == r"Loss at \$5" and axes.get_ylabel() == "nats"


def test_a_logarithmic_axis_has_round_numbers_and_gaps_where_there_is_no_logarithm() -> None:
    (axes,) = curves([Series("a", [0, 1, 2, 3], [10.0, -1.0, 0.0, 1.0])], "t", "y", log=True).axes
    assert y_of(axes.lines[0]) == pytest.approx([10, float("nan"), float("nan"), 1], nan_ok=True)
    assert list(axes.get_yticks()) == [1, 2, 5, 10] and axes.get_legend() is None
    (axes,) = curves([FEW], "t", "y", y_range=(0, 1), y_format=format_percent).axes
    assert axes.get_ylim() == (0, 1) and axes.yaxis.get_major_formatter()(0.5) == "50\u00a0%"


def test_intervals_and_costs_show_each_entry(tmp_path: Path) -> None:
    """Names from top to bottom; an interval that is not known is left out."""
    entries = [Spread("b − a", 3.0, 1.0, 5.0, [2.0, 4.0]), Spread("c − a", -1.0, float("nan"), float("nan"))]
    figure = intervals(entries, "Differences", "points", zero=True)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b − a", "c − a"] and axes.yaxis_inverted()
    drawn = [([float(x) for x in line.get_xdata()], line.get_linestyle()) for line in axes.lines]
    assert drawn == [([2.0, 4.0], "None"), ([1.0, 5.0], "-"), ([3.0], "None"), ([], "None"), ([-1.0], "None"), ([0.0, 0.0], "-")]
    save(figure, tmp_path / "differences.pdf")

    (axes,) = scatter([Dot("a", 1e9, 0.5, 0.4, 0.6), Dot("b", 4e10, 0.7)], "Score", "score", "FLOPs", y_format=format_percent).axes
    assert axes.get_xscale() == "log" and [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert [[float(y) for y in line.get_ydata()] for line in axes.lines] == [[0.5], [0.4, 0.6], [0.7]]


def test_a_pdf_holds_its_fonts_and_is_the_same_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save(curves([FEW], "Loss", "nats"), tmp_path / "new" / "loss.pdf").read_bytes()
    assert b"/FontFile2" in first and b"/Type3" not in first
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    import matplotlib

    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 20, "pdf.fonttype": 3}):
        assert save(curves([FEW], "Loss", "nats"), tmp_path / "loss.pdf").read_bytes() == first


def test_a_png_has_the_width_of_a_column_at_300_dots_an_inch(tmp_path: Path) -> None:
    with Image.open(save(curves([FEW], "Loss", "nats"), tmp_path / "loss.png")) as image:
        assert image.size == (1020, 720)


def test_other_formats_and_a_missing_package_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = curves([FEW], "Loss", "nats")
    with pytest.raises(InputError, match=r"loss.gif: .gif is no format of figures; take one of .pdf, .png"):
        save(figure, tmp_path / "loss.gif")
    plain = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"need the package matplotlib: pip install 'kempnerforge\[paper\]'"):
        curves([FEW], "Loss", "nats")
