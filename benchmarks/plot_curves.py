"""Draws held-out accuracy over training time of several runs, as the SVG that README.md shows. For papers: ``kempnerforge report``.

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
        metrics = read_metrics(Path(directory) / "metrics.jsonl")
        curves.append(Series(name, *metrics.points("eval/exact_match", over="train/elapsed_s")))
    title = "Exact match on held-out questions"
    chart = line_chart(curves, title, "exact match", x_label="seconds of training", y_range=(0, 1), y_format=format_percent)
    Path(out).write_text(chart, encoding="utf-8")


if __name__ == "__main__":
    main()
