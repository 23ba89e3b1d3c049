"""Charts of intervals and of values over a cost."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from kempnerforge.report.dots import Dot, Spread, interval_chart, scatter

SVG = "{http://www.w3.org/2000/svg}"


def circles(drawing: str) -> list[ElementTree.Element]:
    return [one for one in ElementTree.fromstring(drawing).iter(f"{SVG}circle") if one.get("class") == "kf-dot"]


def test_an_interval_chart_grows_with_its_entries_and_is_to_scale():
    entries = [Spread("a <b>", 0.5, 0.25, 0.75, [0.3, 0.7]), Spread("c", 1.0, math.nan, math.nan)]
    drawing = interval_chart(entries, "Score", "share")
    first, second = circles(drawing)
    root = ElementTree.fromstring(drawing)
    lines = [one for one in root.iter(f"{SVG}line") if one.get("stroke-width") == "2"]
    assert len(lines) == 1, "an interval that is not known is not drawn"
    low, high = (float(lines[0].get(name) or 0) for name in ("x1", "x2"))
    assert float(first.get("cx") or 0) == pytest.approx((low + high) / 2, abs=0.11)
    assert float(second.get("cx") or 0) > high
    assert "a &lt;b&gt;" in drawing
    height = lambda drawn: float((ElementTree.fromstring(drawn).get("viewBox") or "").split()[3])
    assert height(drawing) - height(interval_chart(entries[:1], "Score", "share")) == 24


def test_zero_is_on_the_axis_where_it_matters():
    assert 'class="kf-rule"' in interval_chart([Spread("a", 0.5, 0.4, 0.6)], "Difference", "points", zero=True)
    assert 'class="kf-rule"' not in interval_chart([Spread("a", 0.5, 0.4, 0.6)], "Score", "share")


def test_what_is_beaten_is_pale():
    dots = [Dot("cheap and bad", 1e9, 0.5), Dot("dear and good", 4e9, 0.9), Dot("dear and bad", 5e9, 0.6), Dot("not known", math.nan, 0.9)]
    assert [one.get("opacity") for one in circles(scatter(dots, "t", "score", "FLOPs", log=True))] == ["1.0", "1.0", "0.5"]
    assert [one.get("opacity") for one in circles(scatter(dots, "t", "loss", "FLOPs", higher=False))] == ["1.0", "0.5", "0.5"]


def test_costs_that_hardly_differ_are_drawn_side_by_side():
    a, b = circles(scatter([Dot("a", 1.0e9, 0.5), Dot("b", 1.001e9, 0.9)], "t", "score", "FLOPs"))
    assert abs(float(a.get("cx") or 0) - float(b.get("cx") or 0)) < 5
