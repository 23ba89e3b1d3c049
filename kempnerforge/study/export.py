"""The comparison as CSV, as Markdown, and as figures for a paper."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from kempnerforge.study.findings import Findings
from kempnerforge.study.report import (
    AXES,
    SPENT,
    Table,
    budget_table,
    cost_drawings,
    pair_table,
    pairs_drawing,
    score_table,
    scores_drawing,
    series_over,
)
from kempnerforge.study.results import Result
from kempnerforge.util.files import write_text


def write_csv(findings: Findings, path: Path) -> Path:
    """One line a cell: its state, its scores and what it used. Numbers are as they were recorded."""
    keys = sorted({key for one in findings.results for key in one.scores})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "seed", "state", *SPENT, "memory_gib", "latency_s", *keys])
    for one in sorted(findings.results, key=lambda one: (one.row, one.seed)):
        spent = [getattr(one.spent, name) for name in SPENT]
        writer.writerow(
            [
                one.row,
                one.seed,
                one.state.name,
                *spent,
                *("" if math.isnan(value) else value for value in (one.memory_gib, one.latency_s)),
                *(one.scores.get(key, "") for key in keys),
            ]
        )
    return write_text(path, out.getvalue())


def write_markdown(findings: Findings, path: Path) -> Path:
    """The verdict, the warnings and the tables."""
    parts = [f"# {findings.study.cfg.name}", *findings.verdict]
    parts += ["## Warnings", *(f"* {line}" for line in findings.warnings)] if findings.warnings else []
    for title, table in (("Scores", score_table(findings)), ("Pairs", pair_table(findings)), ("Budgets", budget_table(findings))):
        parts += [f"## {title}", _markdown(table)]
    return write_text(path, "\n\n".join(parts) + "\n")


def _markdown(table: Table) -> str:
    line = lambda cells: f"| {' | '.join(cell.replace('|', '¦') for cell in cells)} |"
    return "\n".join([line(table.head), line(["---"] * len(table.head)), *map(line, table.rows)])


def write_figures(findings: Findings, folder: Path) -> list[Path]:
    """The charts of the page as PDF files; curves have the range of their seeds.

    Raises:
        InputError: matplotlib is not installed.
    """
    from kempnerforge.report.figures import Interval, curves, intervals, save, scatter

    key, figures = findings.score.key, {}
    for axis in AXES:
        lines = {row: series_over(cells, row, key, axis.field) for row, cells in findings.by_row.items()}
        present = {row: line for row, line in lines.items() if line.x}
        ranges = {row: Interval(*_range(findings.by_row[row], key)) for row in present}
        if present:
            figures[f"over-{axis.field}"] = curves(
                list(present.values()), key, "mean over seeds", axis.label, y_format=findings.shown, intervals=ranges
            )
    if (scores := scores_drawing(findings)).entries:
        figures["scores"] = intervals(*scores, x_format=findings.shown)
    if (pairs := pairs_drawing(findings)).entries:
        figures["differences"] = intervals(*pairs, zero=True)
    for name, one in cost_drawings(findings).items():
        figures[f"against-{name}"] = scatter(one.entries, one.title, key, one.label, y_format=findings.shown)
    begin = key.removeprefix("eval/").replace("/", "-")
    return [save(figure, folder / f"{begin}-{name}.pdf") for name, figure in figures.items()]


def _range(cells: Sequence[Result], key: str) -> tuple[list[float], list[float]]:
    """The lowest and highest value of ``key`` at each step at which all ``cells`` have one."""
    by_step: dict[int, list[float]] = {}
    for one in cells:
        for spent, scores in one.curve:
            if key in scores:
                by_step.setdefault(spent.steps, []).append(scores[key])
    full = [values for _, values in sorted(by_step.items()) if len(values) == len(cells)]
    return [min(values) for values in full], [max(values) for values in full]
