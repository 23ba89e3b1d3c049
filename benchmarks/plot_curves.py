"""Draws held-out accuracy over training time of several runs, as the SVG that README.md shows.

Usage: python benchmarks/plot_curves.py OUT.svg NAME=RUN_DIR [NAME=RUN_DIR ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from kempnerforge.report.charts import Series, line_chart
from kempnerforge.util.metrics import read_metrics
from kempnerforge.util.numbers import format_percent


def main() -> None:
    out, *runs = sys.argv[1:]
    curves = []
    for run in runs:
        name, _, directory = run.partition("=")
        rows = read_metrics(Path(directory) / "metrics.jsonl").rows
        elapsed = {step: row["train/elapsed_s"] for step, row in rows.items() if "train/elapsed_s" in row}
        steps = [step for step, row in rows.items() if "eval/exact_match" in row and step in elapsed]
        curves.append(Series(name, [elapsed[step] for step in steps], [rows[step]["eval/exact_match"] for step in steps]))
    title = "Exact match on held-out questions"
    chart = line_chart(curves, title, "exact match", x_label="seconds of training", y_range=(0, 1), y_format=format_percent)
    Path(out).write_text(chart, encoding="utf-8")


if __name__ == "__main__":
    main()
