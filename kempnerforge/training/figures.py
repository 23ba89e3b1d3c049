"""Loss and score curves of one or several runs, as figures for a paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kempnerforge.config import load_config
from kempnerforge.eval.evaluate import tasks_of
from kempnerforge.eval.task import ReportCurve
from kempnerforge.report.figures import curves
from kempnerforge.training.hooks.metrics import NAME
from kempnerforge.training.report import axis_of, score_curves, series_of
from kempnerforge.util.errors import InputError
from kempnerforge.util.metrics import Metrics, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OVER = {"steps": ("", "optimizer step"), "seconds": ("train/elapsed_s", "seconds of training")}
"""What a figure can be drawn over: the key of its values (none for the step), and the label of the x axis."""


class RunCurves(NamedTuple):
    """A run as figures show it: its metrics, and what its config records."""

    metrics: Metrics
    curves: list[ReportCurve]


class NamedFigure(NamedTuple):
    """A figure, and a name for its file."""

    name: str
    figure: Figure


def read_run(path: Path) -> RunCurves:
    """Reads a run directory.

    Raises:
        InputError: it has no metrics.
    """
    if not (path / NAME).is_file():
        raise InputError(f"{path}: has no {NAME}; name a run directory")
    return RunCurves(read_metrics(path / NAME), score_curves(tasks_of(load_config(path / "config.toml").eval)))


def figures_of(runs: Mapping[str, RunCurves], over: str = "steps") -> Iterator[NamedFigure]:
    """The curves that the runs have recorded: of one run all lines of a curve in one figure; of several a
    figure for each key, with a line for each run.

    Args:
        runs: by the name in the legend.
        over: a key of ``OVER``.
    """
    key_over, x_label = OVER[over]
    metrics = [run.metrics for run in runs.values()]
    for curve in _panels(runs):
        lines = [
            series_of(run.metrics, key, name if len(runs) > 1 else line, key_over)
            for key, line in curve.lines.items()
            for name, run in runs.items()
        ]
        if shown := [line for line in lines if line.x]:
            figure = curves(shown, curve.title, curve.label, x_label, **axis_of(curve, *metrics))
            yield NamedFigure(next(iter(curve.lines)).replace("/", "-"), figure)


def _panels(runs: Mapping[str, RunCurves]) -> list[ReportCurve]:
    """The curve of each figure, once if several runs have it."""
    found: dict[str, ReportCurve] = {}
    for curve in (curve for run in runs.values() for curve in run.curves):
        if len(runs) == 1:
            found.setdefault(next(iter(curve.lines)), curve)
            continue
        for key, line in curve.lines.items():
            title = f"{curve.title}: {line}" if len(curve.lines) > 1 else curve.title
            found.setdefault(key, curve._replace(title=title, lines={key: line}))
    return list(found.values())
