from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kempnerforge.report import charts
from kempnerforge.report.charts import Band, Series, line_chart, log_ticks, moving_average, nice_ticks
from kempnerforge.util.numbers import format_number, format_percent

SVG = "{http://www.w3.org/2000/svg}"
finite = st.floats(-1e12, 1e12, allow_nan=False)


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)  # well-formed XML or an error


def numbers(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)]


def lines(svg: str, kind: str = "kf-line") -> list[str]:
    return [path.get("d", "") for path in parse(svg).iter(f"{SVG}path") if path.get("class") == kind]


def texts(svg: str) -> list[str]:
    return ["".join(text.itertext()) for text in parse(svg).iter(f"{SVG}text")]


@settings(deadline=None)
@given(finite, finite)
def test_nice_ticks_enclose_and_are_round(a: float, b: float) -> None:
    low, high = sorted((a, b))
    ticks = nice_ticks(low, high)
    gaps = [y - x for x, y in pairwise(ticks)]
    slack = 1e-6 * max(gaps)
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 9
    assert max(gaps) - min(gaps) <= 1e-6 * max(gaps) + 8 * math.ulp(max(abs(low), abs(high)))


@settings(deadline=None)
@given(st.floats(1e-12, 1e12), st.floats(1e-12, 1e12))
def test_log_ticks_enclose(a: float, b: float) -> None:
    low, high = sorted((a, b))
    ticks = log_ticks(low, high)
    assert ticks == sorted(set(ticks)) and 2 <= len(ticks) <= 10
    assert ticks[0] <= low * (1 + 1e-6) and ticks[-1] >= high * (1 - 1e-6)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1500, "1.5k"), (999_999, "1M"), (0.012, "0.012"), (3e-5, "3e-5"), (2_500_000_000, "2.5G"), (-20, "-20"), (math.nan, "–")],
)
def test_format_number(value: float, text: str) -> None:
    assert format_number(value) == text


def test_format_percent() -> None:
    assert format_percent(0.5) == "50\u00a0%" and format_percent(0.9931) == "99.3\u00a0%"


def test_moving_average_of_a_constant_is_that_constant() -> None:
    points = [(float(x), 2.5) for x in range(100)]
    assert all(y == pytest.approx(2.5) for _, y in moving_average(points))


def test_moving_average_forgets_at_an_edge_and_skips_gaps() -> None:
    values = [5.0] * 20 + [1.0] * 20
    values[3] = math.nan
    points = list(zip(map(float, range(1, 41)), values, strict=True))
    blended = [y for _, y in moving_average(points)]
    parted = [y for _, y in moving_average(points, [0, 20])]  # steps 21.. belong to the second stage
    assert blended[20] > 2 and math.isnan(parted[3])
    assert parted[19] == pytest.approx(5) and all(y == pytest.approx(1) for y in parted[20:])


def test_line_stands_where_its_values_are() -> None:
    svg = line_chart([Series("a", [0, 50, 100], [0.0, 1.0, 0.5])], "t", "y", y_range=(0, 1))
    assert numbers(lines(svg)[0]) == [
        (charts.LEFT, charts.BOTTOM),
        ((charts.LEFT + charts.RIGHT) / 2, charts.TOP),
        (charts.RIGHT, (charts.TOP + charts.BOTTOM) / 2),
    ]


def test_log_axis_spaces_decades_evenly_and_leaves_out_what_is_not_positive() -> None:
    svg = line_chart([Series("a", [0, 1, 2, 3, 4], [1e-3, 1e-2, 1e-1, 0.0, -1.0])], "t", "y", log=True)
    (path,) = lines(svg)
    ys = [y for _, y in numbers(path)]
    assert len(ys) == 3 and ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.11)


def test_missing_values_leave_a_gap_and_a_lone_point_a_dot() -> None:
    svg = line_chart([Series("a", range(6), [1.0, 2.0, math.nan, 3.0, None, 4.0])], "t", "y")
    (path,) = lines(svg)
    assert path.count("M") == 3 and path.count("h0") == 2 and len(numbers(path)) == 4


@pytest.mark.parametrize("y", [[], [math.nan], [None, math.inf]])
@pytest.mark.parametrize("log", [False, True])
def test_nothing_to_draw(y: list[float | None], log: bool) -> None:
    svg = line_chart([Series("a", range(len(y)), y)], "t", "y", bands=[Band(0, 10, "one")], log=log)
    assert "no values yet" in texts(svg) and lines(svg) == [""]
    parse(line_chart([], "t", "y"))


@pytest.mark.parametrize("log", [False, True])
def test_one_point(log: bool) -> None:
    svg = line_chart([Series("a", [7], [0.25])], "t", "y", log=log)
    (dot,) = parse(svg).iter(f"{SVG}circle")
    assert charts.LEFT <= float(dot.get("cx", "")) <= charts.RIGHT and charts.TOP <= float(dot.get("cy", "")) <= charts.BOTTOM


def test_noisy_series_has_a_faint_raw_line_and_a_bold_average() -> None:
    y = [1.0 + (-1) ** i for i in range(400)]
    svg = line_chart([Series("a", range(400), y, smooth=True)], "t", "y")
    (raw,), (bold,) = lines(svg, "kf-raw"), lines(svg)
    span = [max(y for _, y in numbers(d)[50:]) - min(y for _, y in numbers(d)[50:]) for d in (raw, bold)]
    assert span[1] < 0.3 * span[0]
    assert not lines(line_chart([Series("a", range(400), y)], "t", "y"), "kf-raw")


def test_long_series_are_thinned_but_keep_their_extremes() -> None:
    y = [1.0] * 100_000
    y[56_789] = 9.0
    svg = line_chart([Series("a", range(len(y)), y)], "t", "y", y_range=(0, 10))
    (path,) = lines(svg)
    assert len(numbers(path)) <= 2 * charts.MAX_COLUMNS + 2 and len(svg) < 40_000
    assert min(y for _, y in numbers(path)) == pytest.approx(charts.BOTTOM - 0.9 * (charts.BOTTOM - charts.TOP), abs=0.1)


def test_text_is_escaped_and_legal_xml() -> None:
    evil = '</svg><script>alert("1")</script>&\x00\ud800'
    svg = line_chart(
        [Series(evil, [0, 1], [0, 1])], evil, evil, x_label=evil, bands=[Band(0, 1, evil), Band(0.5, 1, evil)], rules=[(0.5, evil)]
    )
    svg.encode("utf-8")
    assert "<script" not in svg and not list(parse(svg).iter("script"))
    assert svg.count("</svg>") == 2


def test_bands_are_labelled_and_the_second_one_is_shaded() -> None:
    svg = line_chart(
        [Series("a", [0, 100], [0, 1])], "t", "y", bands=[Band(0, 50, "captions"), Band(50, 100, "questions"), Band(100, 900, "never")]
    )
    names = [text.text for text in parse(svg).iter(f"{SVG}text") if text.get("class") == "kf-band-name"]
    assert names == ["captions", "questions"]
    shaded = [rect for rect in parse(svg).iter(f"{SVG}rect") if rect.get("fill") == "var(--kf-band)"]
    assert [float(rect.get("x", "")) for rect in shaded] == [pytest.approx((charts.LEFT + charts.RIGHT) / 2, abs=0.1)]


def test_legend_names_all_series_with_their_last_value() -> None:
    svg = line_chart([Series("seeing", [1, 2], [0.5, 0.99]), Series("blind", [1, 2], [0.5, math.nan])], "t", "y", y_format=format_percent)
    assert "seeing 99\u00a0%" in texts(svg) and "blind 50\u00a0%" in texts(svg)
    assert "seeing: last 99\u00a0%" in parse(svg).get("aria-label", "") and parse(svg).find(f"{SVG}title") is not None


def test_a_rule_is_drawn_at_its_value() -> None:
    svg = line_chart([Series("a", [0, 1], [0, 1])], "t", "y", y_range=(0, 1), rules=[(0.6, "prior"), (math.nan, "none")])
    (rule,) = [line for line in parse(svg).iter(f"{SVG}line") if line.get("class") == "kf-rule"]
    assert float(rule.get("y1", "")) == pytest.approx(charts.BOTTOM - 0.6 * (charts.BOTTOM - charts.TOP), abs=0.1)
    assert "prior 0.6" in texts(svg)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="2 x values, 1 y values"):
        Series("a", [1, 2], [1])
    with pytest.raises(ValueError, match="y_range"):
        line_chart([], "t", "y", y_range=(1, 0))
    with pytest.raises(ValueError, match="above 0"):
        line_chart([], "t", "y", y_range=(0, 1), log=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True)), max_size=60), st.booleans(), st.booleans())
def test_any_values_give_a_chart_with_finite_coordinates(y: list[float | None], smooth: bool, log: bool) -> None:
    svg = line_chart([Series("a", range(len(y)), y, smooth=smooth)], "t", "y", bands=[Band(0, 9, "a"), Band(9, 99, "b")], log=log)
    parse(svg)
    coordinates = re.sub(r"<(style|title|desc|text)\b.*?</\1>", "", svg, flags=re.DOTALL)
    assert not re.search(r'[" MLh](nan|-?inf)', coordinates)
