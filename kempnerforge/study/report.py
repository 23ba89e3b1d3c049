"""The comparison as a page in one file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kempnerforge.config import diff
from kempnerforge.report.charts import Series, line_chart
from kempnerforge.report.dots import Dot, Spread, interval_chart, scatter
from kempnerforge.report.page import write_page
from kempnerforge.study.disputes import disputes
from kempnerforge.study.findings import Findings, skills
from kempnerforge.study.results import Result, question_error, same_weights
from kempnerforge.study.statistics import ENOUGH, RESAMPLES, smallest_p
from kempnerforge.util.numbers import counted, format_duration, format_number

PAGE = "report.html"
COLOURS = 4
"""Lines of one chart."""


class Table(NamedTuple):
    """Text by row and column, the first column names."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Axis(NamedTuple):
    """What a curve is drawn over: a field of ``Spent``, what it is called, and the name of its figure."""

    field: str
    label: str


AXES = (Axis("samples", "training samples"), Axis("train_flops", "training FLOPs"), Axis("seconds", "seconds of training"))


def write_report(findings: Findings) -> Path:
    """Writes ``report.html`` into the directory of the study."""
    score, cfg = findings.score, findings.study.cfg
    done = sum(map(len, findings.by_row.values()))
    match = f"{cfg.match.quantity}, by {cfg.match.by}" if cfg.match else "nothing"
    tuned = f"{', '.join(cfg.tune.keys)}: {cfg.tune.trials} trials a row" if cfg.tune else "nothing"
    return write_page(
        findings.study.dir / PAGE,
        "study.html",
        title=cfg.name,
        facts=[
            ("rows", str(len(findings.rows))),
            ("seeds", ", ".join(map(str, cfg.seeds))),
            ("cells", f"{done} of {len(findings.rows) * len(cfg.seeds)} finished"),
            ("compared by", f"{score.key} ({score.better} is better)"),
            ("matched", match),
            ("tuned", tuned),
        ],
        verdict=findings.verdict,
        warnings=findings.warnings,
        scores=score_table(findings),
        pairs=pair_table(findings),
        pictures=_pictures(findings),
        curves=_curves(findings),
        pareto=_pareto(findings),
        kinds=_kind_table(findings),
        disputes=disputes(findings.by_row, score.key),
        budgets=budget_table(findings),
        trials=_trial_table(findings),
        starts=_starts(findings),
        differences=[(one.row.name, diff(findings.rows[0].job, one.job)) for one in findings.rows[1:]],
        first=findings.rows[0].row.name,
        method=_method(findings),
    )


# ---- tables --------------------------------------------------------------------------------------


def score_table(findings: Findings) -> Table:
    """Each row with its scores."""
    keys = [score.key for score in findings.study.cfg.scores]
    head = [
        "row",
        "cells",
        *(part for key in keys for part in (key.removeprefix("eval/"), "95 % interval")),
        "± questions",
        "blind",
        "parameters",
    ]
    rows = []
    for one in findings.rows:
        name, cells = one.row.name, findings.by_row[one.row.name]
        values: list[str] = []
        for key in keys:
            mean = findings.mean(name, key)
            shown = findings.shown if key == findings.score.key else lambda value: f"{value:.4g}"
            values += ["–", "–"] if mean is None else [shown(mean.value), _interval(mean.low, mean.high, shown)]
        blind, error = findings.mean(name, f"{keys[0]}_blind"), question_error(cells, keys[0])
        rows.append(
            [
                name,
                f"{len(cells)} of {len(findings.study.cfg.seeds)}",
                *values,
                "–" if math.isnan(error) else findings.points(error),
                "–" if blind is None else findings.shown(blind.value),
                format_number(one.budget.params),
            ]
        )
    return Table(head, rows)


def _interval(low: float, high: float, shown: Callable[[float], str]) -> str:
    return "–" if math.isnan(low) else f"{shown(low)} to {shown(high)}"


def pair_table(findings: Findings) -> Table:
    """Each pair of rows."""
    rows = [
        [
            f"{one.b} − {one.a}",
            str(len(one.values)),
            findings.points(one.mean),
            f"{findings.points(one.low)} to {findings.points(one.high)}",
            f"{one.p_sign:.4g}",
            f"{one.p_t:.2g}",
            f"{one.p_holm:.2g}",
            findings.points(one.visible),
            "different" if one.is_shown else "no difference shown",
        ]
        for one in findings.pairs
    ]
    return Table(
        ["pair", "seeds", "difference", "95 % interval", "p sign-flip", "p paired t", "p Holm", "could have shown", "verdict"], rows
    )


def budget_table(findings: Findings) -> Table:
    """What was asked for and what was used: the mean over the finished cells of a row, and the largest miss
    of one of them.
    """
    rows = []
    for one in findings.rows:
        cells = findings.by_row[one.row.name]
        asked = "–" if one.asked is None else format_number(one.asked)
        miss = max((abs(findings.realised(one, cell) / one.asked - 1) for cell in cells), default=math.nan) if one.asked else math.nan
        spent = [float(np.mean([getattr(cell.spent, name) for cell in cells])) if cells else math.nan for name in SPENT]
        seconds = format_duration(spent[-1]) if cells else "–"
        memory = max((cell.memory_gib for cell in cells), default=math.nan)
        missed = "–" if math.isnan(miss) else f"{100 * miss:.2f} %"
        most = "–" if math.isnan(memory) else f"{memory:.2g} GiB"
        rows.append([one.row.name, asked, missed, *map(format_number, spent[:-1]), seconds, most])
    return Table(["row", "asked", "largest miss", "steps", "samples", "trained tokens", "training FLOPs", "time", "memory"], rows)


SPENT = ("steps", "samples", "trained_tokens", "train_flops", "seconds")


def _kind_table(findings: Findings) -> Table:
    names = [one.row.name for one in findings.rows]
    found = skills(findings)
    return Table(
        ["kind of question", *names], [[kind, *(findings.shown(of[n]) if n in of else "–" for n in names)] for kind, of in found.items()]
    )


def _trial_table(findings: Findings) -> Table:
    tune = findings.study.cfg.tune
    if tune is None:
        return Table([], [])
    rows = [
        [
            tuned.row.name,
            str(trial.number),
            *(f"{trial.values[key]:.4g}" for key in tune.keys),
            _told(trial.score),
            "chosen" if trial is tuned.best else "",
        ]
        for tuned in findings.progress.tuned
        for trial in tuned.trials
    ]
    return Table(["row", "trial", *tune.keys, f"{findings.score.key.removeprefix('eval/')}, validation", ""], rows)


def _told(score: float | None) -> str:
    return "not yet" if score is None else "failed" if math.isnan(score) else f"{score:.4g}"


def _starts(findings: Findings) -> Table:
    """By seed: the samples and the first weights."""
    rows = []
    for seed, found in findings.samples.items():
        weights = same_weights([one for one in findings.results if one.seed == seed and one.is_finished])
        digests = sorted(set(found.digests.values()))
        shared = weights.same + len(weights.different)
        rows.append([str(seed), f"{found.compared:,}", ", ".join(digests), "yes" if found.same else "NO", f"{weights.same} of {shared}"])
    return Table(
        ["seed", "samples compared", "digest of their ids, step by step", "the same in all rows", "first weights that are the same"], rows
    )


# ---- charts --------------------------------------------------------------------------------------


class Drawing(NamedTuple):
    """A chart: what is in it, and its words."""

    entries: Sequence[Any]
    title: str
    label: str


def scores_drawing(findings: Findings) -> Drawing:
    """Each row's mean, interval and single seeds."""
    key = findings.score.key
    means = [(name, findings.mean(name, key), list(values.values())) for name, values in findings.values(key).items()]
    spreads = [Spread(name, mean.value, mean.low, mean.high, values) for name, mean, values in means if mean is not None]
    return Drawing(spreads, "Score", f"{key}; mean, 95 % interval, single seeds")


def pairs_drawing(findings: Findings) -> Drawing:
    """Each pair's difference."""
    factor, unit = (100, "difference in points") if findings.is_share else (1, "difference")
    pairs = [
        Spread(
            f"{one.b} − {one.a}", factor * one.mean, factor * one.low, factor * one.high, [factor * value for value in one.values.values()]
        )
        for one in findings.pairs
    ]
    return Drawing(pairs, "Paired differences", f"{unit}; paired t interval, single seeds")


def _pictures(findings: Findings) -> list[str]:
    scores, pairs = scores_drawing(findings), pairs_drawing(findings)
    charts = [interval_chart(*scores, findings.shown)] if scores.entries else []
    return [*charts, interval_chart(*pairs, zero=True)] if pairs.entries else charts


def series_over(cells: Sequence[Result], name: str, key: str, axis: str) -> Series:
    """The mean of ``key`` over seeds at each evaluation of ``cells``, against the mean of what was spent."""
    by_step: dict[int, list[tuple[float, float]]] = {}
    for one in cells:
        for spent, scores in one.curve:
            if key in scores:
                by_step.setdefault(spent.steps, []).append((getattr(spent, axis), scores[key]))
    points = [tuple(np.mean(found, axis=0)) for _, found in sorted(by_step.items()) if len(found) == len(cells)]
    return Series(name, [float(x) for x, _ in points], [float(y) for _, y in points])


def _curves(findings: Findings) -> list[str]:
    charts = []
    for axis in AXES:
        lines = [line for row, cells in findings.by_row.items() if (line := series_over(cells, row, findings.score.key, axis.field)).x]
        for part in batched_lines(lines):
            label = f"{findings.score.key.removeprefix('eval/')}, mean"
            charts.append(line_chart(part, f"Over {axis.label}", label, axis.label, y_format=findings.shown))
    return charts


def batched_lines(lines: Iterable[Series]) -> Iterable[list[Series]]:
    """At most ``COLOURS`` at a time."""
    found = list(lines)
    return [found[at : at + COLOURS] for at in range(0, len(found), COLOURS)]


def cost_drawings(findings: Findings) -> dict[str, Drawing]:
    """By the name of a figure: each row's score over a cost."""
    key = findings.score.key
    costs: dict[str, tuple[str, Callable[[str], float]]] = {
        "train_flops": ("training FLOPs", lambda row: float(np.mean([one.spent.train_flops for one in findings.by_row[row]]))),
        "params": ("parameters", lambda row: float(next(one.budget.params for one in findings.rows if one.row.name == row))),
        "memory": ("peak memory, GiB", lambda row: max(one.memory_gib for one in findings.by_row[row])),
        "latency": ("seconds to answer one question", lambda row: float(np.median([one.latency_s for one in findings.by_row[row]]))),
    }
    means = {row: mean for row in findings.by_row if (mean := findings.mean(row, key)) is not None}
    found = {}
    for name, (label, cost) in costs.items():
        dots = [Dot(row, x, mean.value, mean.low, mean.high) for row, mean in means.items() if not math.isnan(x := cost(row))]
        if dots:
            found[name] = Drawing(dots, f"Score against {label}", label)
    return found


def _pareto(findings: Findings) -> list[str]:
    key, higher = findings.score.key, findings.score.better == "higher"
    return [
        scatter(one.entries, one.title, key, one.label, findings.shown, log=True, higher=higher) for one in cost_drawings(findings).values()
    ]


def _method(findings: Findings) -> list[str]:
    count, pairs = len(findings.study.cfg.seeds), counted(len(findings.pairs), "pair")
    return [
        f"Means over seeds; their intervals are BCa bootstrap intervals ({RESAMPLES:,} resamples). Few seeds give intervals that are too narrow: with"
        " five, about 81 % of them hold the true mean. Differences are what to look at.",
        "Differences are paired: two cells of one seed begin with the same shared weights and see the same samples. Two rows are called different if"
        f" there are {ENOUGH} seeds or more, the paired t test says so at 5 % after Holm's correction for {pairs}, and the exact sign-flip"
        " test, which assumes nothing of the distribution, is below 5 % or at the smallest value that"
        f" {count} seeds can give ({smallest_p(count):.4g}).",
        "“Could have shown”: the smallest true difference that the t test finds in four of five studies with so many seeds and this spread.",
        "“± questions”: the standard error of the score for another draw of held-out questions, those about one image together; it is the same draw"
        " for all rows, so it matters less for their differences.",
    ]
