"""``report.html``: one file that shows what a run did; styles and images are in it. It loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kempnerforge.config import EvalConfig
from kempnerforge.eval.evaluate import tasks_of
from kempnerforge.eval.task import ReportCurve, Task
from kempnerforge.report.charts import Band, Series, line_chart
from kempnerforge.report.facts import Facts
from kempnerforge.report.page import Tile, write_page
from kempnerforge.util.metrics import Metrics, read_metrics
from kempnerforge.util.numbers import format_duration, format_number, format_percent

MAX_ANSWERS = 40  # rows of the table per answer


@dataclass(frozen=True)
class Example:
    """A held-out question and what the model said.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        prompt, truth, answer: the question, the expected and the generated answer.
        right: whether the two are the same as the tokenizer writes them.
        blind_answer: the answer with the image blanked; None where that was not asked.
        drawn: the model has written the image; the answer says what is seen in it.
    """

    image: np.ndarray
    prompt: str
    truth: str
    answer: str
    right: bool
    blind_answer: str | None = None
    drawn: bool = False


def write_report(
    run_dir: Path,
    *,
    config_toml: str,
    stages: Sequence[Band],
    examples: Sequence[Example],
    summary: Mapping[str, object],
    remarks: Sequence[str] = (),
    changed: Sequence[str] = (),
    tasks: Sequence[Task] | None = None,
) -> Path:
    """Writes ``run_dir/report.html`` from ``run_dir/metrics.jsonl`` and the arguments.

    Args:
        stages: with their first and last steps.
        changed: what later steps were trained with that earlier ones were not, a line each.
        examples: held-out samples to show; none for a run without images.
        summary: facts of the whole run, each optional. ``name``, ``arch``, ``device`` (text); ``parameters``,
            ``trainable_parameters``, ``steps``, ``train_s``, ``questions`` (asked at the end);
            ``exact_match``, ``exact_match_blind``, ``question_only_prior`` (shares); ``loss`` (held out);
            ``tokens_per_s``, ``images_per_s``; ``by_answer``: answer -> (right, total). Missing facts come
            from the metrics or are left out; other plain values appear in the header under their own name.
            ``unreadable`` and ``too_long`` (beside ``questions``), ``loss_samples`` and ``loss_unreadable``
            are shown beside their score.
        remarks: what has to be known beside the scores.
        tasks: their rows and curves are shown; None: those that every job has.

    Returns:
        The path of the report.
    """
    metrics = read_metrics(run_dir / "metrics.jsonl")
    tasks = tasks_of(EvalConfig()) if tasks is None else tasks
    facts = Facts(summary, metrics, [task.name for task in tasks if task.name not in EvalConfig.BUILT_IN])
    name = facts.text("name") or run_dir.resolve().name
    return write_page(
        run_dir / "report.html",
        "report.html",
        title=name,
        facts=_header(facts, stages),
        scores=_scores(facts, tasks),
        remarks=remarks,
        curves=_curves(metrics, facts, stages, tasks),
        answers=_answers(facts.by_answer),
        answers_in_all=len(facts.by_answer),
        examples=examples,
        changed=changed,
        config=config_toml,
        unreadable=metrics.unreadable,
    )


def _header(facts: Facts, stages: Sequence[Band]) -> list[tuple[str, str]]:
    parameters, trainable = facts.number("parameters"), facts.number("trainable_parameters")
    steps, seconds = facts.number("steps"), facts.number("train_s")
    if steps is None and facts.metrics.rows:
        steps = max(facts.metrics.rows)
    rows = [("architecture", facts.text("arch"))]
    if parameters is not None:
        frozen = f", {format_number(trainable)} trainable" if trainable is not None and trainable != parameters else ""
        rows.append(("parameters", format_number(parameters) + frozen))
    if steps is not None:
        rows.append(("steps", f"{steps:,.0f}"))
    if len(stages) > 1:
        rows.append(("stages", ", ".join(f"{stage.name} ({max(stage.end - stage.start, 0):,} steps)" for stage in stages)))
    if seconds is not None:
        rows.append(("training time", format_duration(seconds)))
    return [*rows, ("device", facts.text("device")), *facts.others()]


def _scores(facts: Facts, tasks: Sequence[Task]) -> list[Tile]:
    rows = [row for task in tasks for row in task.rows(facts)]
    cards = [Tile(row.title, row.value, row.about, row.unit, "lead" if row.lead else "") for row in rows]
    tokens, images, seconds = facts.rate("tokens_per_s"), facts.rate("images_per_s"), facts.number("train_s")
    if tokens is not None:
        more = "useful tokens, padding not counted" + (f"; {format_number(images)} images/s" if images else "")
        cards.append(Tile("Throughput", format_number(tokens), more, "tokens/s"))
    if seconds is not None:
        steps = facts.number("steps")
        a_step = f"{format_duration(seconds / steps)} a step; " if steps else ""
        cards.append(Tile("Training time", format_duration(seconds), f"{a_step}evaluation and saving not counted"))
    return cards


def _curves(metrics: Metrics, facts: Facts, stages: Sequence[Band], tasks: Sequence[Task]) -> list[str]:
    bands = stages if len(stages) > 1 else []
    base = facts.baseline()
    rules = [(base[0], f"{base[1]}:")] if base else []
    charts = []
    for curve in (*score_curves(tasks), *SPEED, *([IMAGES] if any(metrics.values("train/images_per_s")) else []), *STEPS):
        if lines := [line for key, name in curve.lines.items() if (line := series_of(metrics, key, name)).x]:
            beside = rules if curve.baseline else []
            charts.append(line_chart(lines, curve.title, curve.label, bands=bands, rules=beside, **axis_of(curve, metrics)))
    return charts


LOSS = ReportCurve(
    "Loss",
    "nats per trained token, or per pair of an image and its text",
    {
        "train/loss": "training",
        "train/weighted_loss": "training, weighted",
        "eval/loss": "held out",
        "train/pair_loss": "training, of pairs",
    },
)
SPEED = [ReportCurve("Throughput", "useful tokens per second", {"train/tokens_per_s": "tokens/s"})]
IMAGES = ReportCurve("Images", "images per second", {"train/images_per_s": "images/s"})
STEPS = [
    ReportCurve("Learning rate", "of the step", {"train/lr": "rate"}),
    ReportCurve("Gradient norm", "before clipping", {"train/grad_norm": "norm"}),
]
SMOOTH = ("train/loss", "train/weighted_loss", "train/pair_loss", "train/tokens_per_s", "train/images_per_s", "train/grad_norm")
"""Values that are shown with their moving average."""
WIDE = ("train/loss", "train/grad_norm")
"""Values that get a logarithmic axis when they span much."""


def score_curves(tasks: Sequence[Task]) -> list[ReportCurve]:
    """The curves that say how well a model learns: loss, and what each task shows."""
    return [LOSS, *(curve for task in tasks for curve in task.curves())]


def series_of(metrics: Metrics, key: str, name: str, over: str = "") -> Series:
    """The values of ``key``, for a chart or figure; see ``Metrics.points``."""
    return Series(name, *metrics.points(key, over), smooth=key in SMOOTH)


def axis_of(curve: ReportCurve, *runs: Metrics) -> dict[str, Any]:
    """Options of the y axis of ``line_chart`` and ``figures.curves``: percent for shares, logarithmic if the
    values of ``runs`` span much.
    """
    if curve.share:
        return {"y_range": (0.0, 1.0), "y_format": format_percent}
    values = [value for metrics in runs for key in curve.lines if key in WIDE for value in metrics.values(key)]
    return {"log": bool(values) and min(values) > 0 and max(values) > 25 * min(values)}


def _answers(groups: Mapping[str, tuple[int, int]]) -> list[tuple[str, str, str, str]]:
    """(true answer, right, total, percent) of the ``MAX_ANSWERS`` with the lowest share, lowest first."""
    ranked = sorted(groups.items(), key=lambda item: (item[1][0] / item[1][1], -item[1][1], item[0]))
    return [(name, f"{right:,}", f"{total:,}", f"{100 * right / total:.1f}") for name, (right, total) in ranked[:MAX_ANSWERS]]
