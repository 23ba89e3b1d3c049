"""What ``data check`` found, as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kempnerforge.data.traces import KINDS
from kempnerforge.inspection.audit import count
from kempnerforge.inspection.check_facts import COVERED, MULTIPLE, Batching, Limits, histogram
from kempnerforge.inspection.data_check import HELD_OUT, Checked, Leak
from kempnerforge.report.histogram import bar_chart
from kempnerforge.report.html import text
from kempnerforge.report.page import table, tiles, write_page
from kempnerforge.util.numbers import format_percent

BINS = 60
SHOWN_BAD = 20
SHOWN_LEAKS = 5
RULE = (
    f"The recommended limits leave {COVERED:g} % of the samples whole, rounded up to a multiple of {MULTIPLE}; packed rows may be longer."
)


def write_data_page(path: Path, title: str, checked: Sequence[Checked], leaks: Sequence[Leak]) -> Path:
    """Writes the page."""
    head = f"<header><h1>{text(title)}: data</h1></header>"
    style = ".good{color:var(--good)}.bad{color:var(--bad)}.card.pad{padding:12px 16px;border-color:var(--bad)}"
    return write_page(path, f"{title}: data", "\n".join([head, *map(_leak, leaks), *map(_section, checked)]), style)


def _leak(leak: Leak) -> str:
    pairs = table(("trained on", "held out"), leak.pairs[:SHOWN_LEAKS], numbers=False)
    what = f"share {KINDS[leak.kind]} with the training data"
    if leak.kind == "image":
        what = f"are also in the training data as {count(leak.count, 'image')}, byte by byte"
    held_out = count(len(leak.pairs), "held-out sample")
    return f'<p class="card pad"><b class="bad">{held_out} {what}</b> (stages {text(leak.stages)}). The first ones:</p>{pairs}'


def _section(one: Checked) -> str:
    totals = one.as_json()["totals"]
    read = len(one.found.indices)
    bad = f"{len(one.found.bad):,} of {read:,} ({format_percent(one.bad_fraction)}), {format_percent(one.max_bad_fraction)} allowed"
    cards = [
        ("Samples", f"{read:,}", f"of {one.total:,} read", ""),
        ("Unusable", f"{len(one.found.bad):,}", bad, "good" if one.usable else "bad"),
        ("Texts", f"{totals['texts']:,}", f"{totals['text_tokens']:,} tokens, {totals['trained']:,} trained", ""),
        ("Images", f"{totals['images']:,}", f"{totals['views']:,} views; {one.found.distinct_images:,} of different content", ""),
    ]
    if one.held_out is not None:
        known = one.held_out
        more = (
            f"{known.too_long:,} with answers of more than eval.max_new_tokens = {known.max_new_tokens} tokens; the longest {known.longest}"
        )
        cards.append(("Questions", f"{len(known.questions):,}", more, "bad" if known.too_long else ""))
    title = "held out" if one.name == HELD_OUT else f"stage {one.name}"
    body = [f"<section><h2>{text(title)}</h2>", tiles(cards), _charts(one)]
    body += [f'<p class="note">{text(line)}</p>' for line in (*one.found.remarks.lines(), *one.remarks)]
    if len(one.parts) > 1:
        rows = [(part.name, *(f"{n:,}" for n in (part.samples, part.bad, *part.totals.values()))) for part in one.parts]
        body += ["<h2>Sources</h2>", table(("source", "samples", "unusable", *(n.replace("_", " ") for n in one.parts[0].totals)), rows)]
    if one.modes:
        rows = [_mode(mode) for mode in one.modes]
        note = f'<p class="note">{RULE} Shares are of all positions of the rows; the job uses {text(one.batching)}.</p>'
        body += ["<h2>Rows</h2>", note, _limits(one), table(("batching", "useful", "trained", "positions a row", "samples a row"), rows)]
    if one.found.bad:
        rows = [(bad.id, bad.kind, bad.reason) for bad in one.found.bad[:SHOWN_BAD]]
        kinds = ", ".join(f"{kind}: {number:,}" for kind, number in one.kinds.items())
        more = f"; the first {SHOWN_BAD} of them" if len(one.found.bad) > SHOWN_BAD else ""
        body += [
            f'<h2>Unusable samples</h2><p class="note">{text(kinds + more)}</p>',
            table(("sample", "kind", "reason"), rows, numbers=False),
        ]
    return "\n".join([*body, "</section>"])


def _charts(one: Checked) -> str:
    charts = []
    for column, title, now, advice in (
        ("text_tokens", "Text tokens of a sample", one.now.max_text_len, one.advice.max_text_len),
        ("positions", "Positions of a sample, images included", one.now.seq_len, one.advice.seq_len),
    ):
        values = one.lengths(column)
        if len(values):
            rules = [(now, f"limit {now:,}"), (advice, f"recommended {advice:,}")]
            charts.append(f'<div class="card">{bar_chart(*histogram(values, BINS), title, "tokens", rules)}</div>')
    return f'<div class="charts" style="margin-top:14px">{"".join(charts)}</div>' if charts else ""


def _limits(one: Checked) -> str:
    def row(name: str, limits: Limits) -> tuple[str, ...]:
        return name, f"{limits.max_text_len:,}", f"{limits.seq_len:,}", f"{limits.too_long:,}", f"{limits.shortened:,}"

    head = ("limits", "vlm.max_text_len", "train.seq_len", "samples too long", "samples with texts left out")
    return table(head, [row("of the job", one.now), row("recommended", one.advice)]) + "<p>&nbsp;</p>"


def _mode(mode: Batching) -> tuple[str, ...]:
    useful, trained = format_percent(mode.useful), format_percent(mode.trained)
    return mode.name, useful, trained, f"{mode.row_length:,.1f}", f"{mode.samples_per_row:,.1f}"
