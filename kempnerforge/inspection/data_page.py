"""What ``data check`` found, as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kempnerforge.data.traces import KINDS
from kempnerforge.inspection.check_facts import COVERED, MULTIPLE, Batching, RowLimits, histogram
from kempnerforge.inspection.data_check import HELD_OUT, Checked, Leak
from kempnerforge.report.histogram import bar_chart
from kempnerforge.report.page import Tile, write_page
from kempnerforge.util.numbers import counted, format_percent

BINS = 60
SHOWN_BAD = 20
SHOWN_LEAKS = 5
RULE = (
    f"The recommended limits leave {COVERED:g} % of the samples whole, rounded up to a multiple of {MULTIPLE}; packed rows may be longer."
)


def write_data_page(path: Path, title: str, checked: Sequence[Checked], leaks: Sequence[Leak]) -> Path:
    """Writes the page."""
    sources = [_source(one) for one in checked]
    return write_page(path, "data.html", title=f"{title}: data", leaks=[_leak(leak) for leak in leaks], sources=sources, rule=RULE)


def _leak(leak: Leak) -> dict[str, Any]:
    what = f"share {KINDS[leak.kind]} with the training data"
    if leak.kind == "image":
        what = f"are also in the training data as {counted(leak.count, 'image')}, byte by byte"
    held_out = counted(len(leak.pairs), "held-out sample")
    return {"what": f"{held_out} {what}", "stages": leak.stages, "pairs": leak.pairs[:SHOWN_LEAKS]}


def _source(one: Checked) -> dict[str, Any]:
    kinds = ", ".join(f"{kind}: {number:,}" for kind, number in one.kinds.items())
    return {
        "title": "held out" if one.name == HELD_OUT else f"stage {one.name}",
        "tiles": _tiles(one),
        "charts": _charts(one),
        "remarks": [*one.found.remarks.lines(), *one.remarks],
        "parts_head": ("source", "samples", "unusable", *(name.replace("_", " ") for name in one.parts[0].totals)),
        "parts": [(part.name, *(f"{n:,}" for n in (part.samples, part.bad, *part.totals.values()))) for part in one.parts],
        "batching": one.batching,
        "limits": [_limits("of the job", one.now), _limits("recommended", one.advice)],
        "modes": [_mode(mode) for mode in one.modes],
        "bad": [(bad.id, bad.kind, bad.reason) for bad in one.found.bad[:SHOWN_BAD]],
        "bad_kinds": kinds + (f"; the first {SHOWN_BAD} of them" if len(one.found.bad) > SHOWN_BAD else ""),
    }


def _tiles(one: Checked) -> list[Tile]:
    totals = one.as_json()["totals"]
    read = len(one.found.indices)
    bad = f"{len(one.found.bad):,} of {read:,} ({format_percent(one.bad_fraction)}), {format_percent(one.max_bad_fraction)} allowed"
    cards = [
        Tile("Samples", f"{read:,}", f"of {one.total:,} read"),
        Tile("Unusable", f"{len(one.found.bad):,}", bad, kind="good" if one.usable else "bad"),
        Tile("Texts", f"{totals['texts']:,}", f"{totals['text_tokens']:,} tokens, {totals['trained']:,} trained"),
        Tile("Images", f"{totals['images']:,}", f"{totals['views']:,} views; {one.found.distinct_images:,} of different content"),
    ]
    if one.held_out is not None:
        known = one.held_out
        more = (
            f"{known.too_long:,} with answers of more than eval.max_new_tokens = {known.max_new_tokens} tokens; the longest {known.longest}"
        )
        cards.append(Tile("Questions", f"{len(known.questions):,}", more, kind="bad" if known.too_long else ""))
    return cards


def _charts(one: Checked) -> list[str]:
    charts = []
    for column, title, now, advice in (
        ("text_tokens", "Text tokens of a sample", one.now.max_text_len, one.advice.max_text_len),
        ("positions", "Positions of a sample, images included", one.now.seq_len, one.advice.seq_len),
    ):
        values = one.lengths(column)
        if len(values):
            rules = [(now, f"limit {now:,}"), (advice, f"recommended {advice:,}")]
            charts.append(bar_chart(*histogram(values, BINS), title, "tokens", rules))
    return charts


def _limits(name: str, limits: RowLimits) -> tuple[str, ...]:
    return name, f"{limits.max_text_len:,}", f"{limits.seq_len:,}", f"{limits.too_long:,}", f"{limits.shortened:,}"


def _mode(mode: Batching) -> tuple[str, ...]:
    useful, trained = format_percent(mode.useful), format_percent(mode.trained)
    return mode.name, useful, trained, f"{mode.row_length:,.1f}", f"{mode.samples_per_row:,.1f}"
