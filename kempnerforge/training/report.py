"""``report.html``: one file that shows what a run did. It needs no network and loads nothing: styles, charts and images lie in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kempnerforge.config import EvalConfig
from kempnerforge.eval.evaluate import tasks_of
from kempnerforge.eval.task import Task
from kempnerforge.report.charts import Band, Series, line_chart
from kempnerforge.report.html import picture, text
from kempnerforge.report.page import tiles, write_page
from kempnerforge.training.report_facts import Facts
from kempnerforge.util.metrics import Metrics, read_metrics
from kempnerforge.util.numbers import format_duration, format_number, format_percent

MAX_IMAGE_SIDE = 320  # pixels; larger examples are shrunk so that the file stays small
MAX_ANSWERS = 40  # rows of the table per answer


@dataclass(frozen=True)
class Example:
    """A held-out question and what the model said.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        prompt, truth, answer: the question, the expected and the generated answer.
        right: whether the two are the same as the tokenizer writes them.
        blind_answer: the answer with the image blanked; None where that was not asked.
    """

    image: np.ndarray
    prompt: str
    truth: str
    answer: str
    right: bool
    blind_answer: str | None = None


def write_report(
    run_dir: Path,
    *,
    config_toml: str,
    stages: Sequence[tuple[str, int, int]],
    examples: Sequence[Example],
    summary: Mapping[str, object],
    remarks: Sequence[str] = (),
    changed: Sequence[str] = (),
    tasks: Sequence[Task] | None = None,
) -> Path:
    """Writes ``run_dir/report.html`` from ``run_dir/metrics.jsonl`` and what is given; an old report is replaced in one move.

    Args:
        stages: (name, first step, last step).
        changed: what later steps were trained with that earlier ones were not, a line each.
        examples: held-out samples to show; none for a run without images.
        summary: facts of the whole run, each optional. ``name``, ``arch``, ``device`` (text); ``parameters``, ``trainable_parameters``,
            ``steps``, ``train_s``, ``questions`` (how many were asked at the end); ``exact_match``, ``exact_match_blind``,
            ``question_only_prior`` (shares); ``loss`` (held out); ``tokens_per_s``, ``images_per_s``; ``by_answer``: answer -> (right, total). What is missing
            comes from the metrics or is left out; other plain values appear in the header under their own name. ``unreadable`` and ``too_long``
            (beside ``questions``), ``loss_samples`` and ``loss_unreadable`` are said beside their score.
        remarks: what has to be known beside the scores.
        tasks: their rows and curves are shown; None: those that every job has.

    Returns:
        The path of the report.
    """
    metrics = read_metrics(run_dir / "metrics.jsonl")
    tasks = tasks_of(EvalConfig()) if tasks is None else tasks
    facts = Facts(summary, metrics, [task.name for task in tasks if task.name not in EvalConfig.BUILT_IN])
    name = facts.text("name") or run_dir.resolve().name
    sections = [
        _header(name, facts, stages),
        _tiles(facts, tasks),
        "".join(f'<p class="note">{text(line)}</p>' for line in remarks),
        _charts(metrics, facts, stages, tasks),
        _answers(facts.by_answer),
        _examples(examples),
        _changed(changed),
        f"<details><summary>Configuration</summary><pre>{_said(config_toml)}</pre></details>" if config_toml else "",
        _footer(metrics),
    ]
    return write_page(run_dir / "report.html", name, "\n".join(filter(None, sections)))


def _changed(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return (
        f"<section><h2>Changed on the way</h2><p>The config below is that of the last steps.</p><ul>{items}</ul></section>" if items else ""
    )


def _header(name: str, facts: Facts, stages: Sequence[tuple[str, int, int]]) -> str:
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
        rows.append(("stages", ", ".join(f"{stage} ({max(last - first, 0):,} steps)" for stage, first, last in stages)))
    if seconds is not None:
        rows.append(("training time", format_duration(seconds)))
    rows += [("device", facts.text("device")), *facts.others()]
    items = "".join(f"<div><dt>{text(key)}</dt><dd>{text(value)}</dd></div>" for key, value in rows if value)
    return f'<header><h1>{text(name)}</h1><dl class="facts">{items}</dl></header>'


def _tiles(facts: Facts, tasks: Sequence[Task]) -> str:
    rows = [row for task in tasks for row in task.rows(facts)]
    cards = [(row.title, _value(row.value, row.unit), row.about, "lead" if row.lead else "") for row in rows]
    tokens, images, seconds = facts.rate("tokens_per_s"), facts.rate("images_per_s"), facts.number("train_s")
    if tokens is not None:
        more = "useful tokens, padding not counted" + (f"; {format_number(images)} images/s" if images else "")
        cards.append(("Throughput", _value(format_number(tokens), "tokens/s"), more, ""))
    if seconds is not None:
        steps = facts.number("steps")
        more = (
            f"{format_duration(seconds / steps)} a step; evaluation and saving not counted"
            if steps
            else "evaluation and saving not counted"
        )
        cards.append(("Training time", format_duration(seconds), more, ""))
    return tiles(cards)


def _value(value: str, unit: str) -> str:
    """As HTML."""
    return text(value) + (f" <small>{text(unit)}</small>" if unit else "")


def _wide(values: Sequence[float]) -> bool:
    """Whether values span so much that only a logarithmic axis shows them."""
    return bool(values) and min(values) > 0 and max(values) > 25 * min(values)


def _charts(metrics: Metrics, facts: Facts, stages: Sequence[tuple[str, int, int]], tasks: Sequence[Task]) -> str:
    bands: list[Band] = [(first, last, name) for name, first, last in stages] if len(stages) > 1 else []
    base = facts.baseline()
    rules = [(base[0], f"{base[1]}:")] if base else []
    charts: list[str] = []
    series = lambda key, name, smooth=False: Series(name, *metrics.points(key), smooth)

    def add(title: str, label: str, *lines: Series, log: bool = False, **options: Any) -> None:
        if present := [line for line in lines if line.x]:
            charts.append(line_chart(present, title, label, bands=bands, log=log, **options))

    losses = [series("train/loss", "training", smooth=True), series("eval/loss", "held out")]
    add("Loss", "nats per trained token", *losses, log=_wide(metrics.values("train/loss")))
    for curve in (curve for task in tasks for curve in task.curves()):
        options: dict[str, Any] = {"y_range": (0.0, 1.0), "y_format": format_percent} if curve.share else {}
        options |= {"rules": rules} if curve.baseline else {}
        add(curve.title, curve.label, *(series(key, name) for key, name in curve.lines.items()), **options)
    add("Throughput", "useful tokens per second", series("train/tokens_per_s", "tokens/s", smooth=True))
    if any(metrics.values("train/images_per_s")):
        add("Images", "images per second", series("train/images_per_s", "images/s", smooth=True))
    add("Learning rate", "of the step", series("train/lr", "rate"))
    norms = series("train/grad_norm", "norm", smooth=True)
    add("Gradient norm", "before clipping", norms, log=_wide(metrics.values("train/grad_norm")))
    if not charts:
        return ""
    cards = "".join(f'<div class="card">{chart}</div>' for chart in charts)
    return f'<section><h2>Curves</h2><p class="note">Bold lines are moving averages of the faint ones.</p><div class="charts">{cards}</div></section>'


def _answers(groups: Mapping[str, tuple[int, int]]) -> str:
    if not groups:
        return ""
    ranked = sorted(groups.items(), key=lambda item: (item[1][0] / item[1][1], -item[1][1], item[0]))
    shown = ranked[:MAX_ANSWERS]
    rows = [
        f'<tr><td class="name">{text(answer)}</td><td class="bar"><span class="track">'
        f'<span class="fill" style="width:{100 * right / total:.1f}%"></span></span></td>'
        f'<td class="n">{right:,} of {total:,}</td><td class="n">{100 * right / total:.1f}\u00a0%</td></tr>'
        for answer, (right, total) in shown
    ]
    head = '<thead><tr><th>answer</th><th></th><th class="n">right</th><th class="n">share</th></tr></thead>'
    half = (len(rows) + 1) // 2 if len(rows) > 5 else len(rows)
    tables = "".join(f"<table>{head}<tbody>{''.join(part)}</tbody></table>" for part in (rows[:half], rows[half:]) if part)
    more = f" The {len(shown)} weakest of {len(ranked)} are shown." if len(ranked) > len(shown) else ""
    return (
        f'<section><h2>Accuracy by answer</h2><p class="note">By the true answer, weakest first.{more}</p>'
        f'<div class="card table"><div class="answers">{tables}</div></div></section>'
    )


def _said(value: str) -> str:
    """Escaped, with its line breaks."""
    return text(value, keep="\n\t")


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    cards = []
    for one in examples:
        kind, mark = ("right", "✓ right") if one.right else ("wrong", "✗ wrong")
        truth = _said(one.truth) if one.right else f"<b>{_said(one.truth)}</b>"
        rows = f'<div class="answer"><b>{_said(one.answer or "(nothing)")}</b> <span class="mark">{mark}</span></div>'
        rows += f'<div class="row">truth: {truth}</div>'
        if one.blind_answer is not None:
            rows += f'<div class="row">image blanked: {_said(one.blind_answer or "(nothing)")}</div>'
        cards.append(
            f'<figure class="example {kind}">{picture(one.image, "image of the question", MAX_IMAGE_SIDE)}<figcaption>'
            f'<div class="question">{_said(one.prompt.strip())}</div>{rows}</figcaption></figure>'
        )
    right = sum(one.right for one in examples)
    return (
        f'<section><h2>Held-out examples</h2><p class="note">{right} of the {len(examples)} shown are right; mistakes are picked first.</p>'
        f'<div class="grid">{"".join(cards)}</div></section>'
    )


def _footer(metrics: Metrics) -> str:
    line = "Written by KempnerForge from metrics.jsonl and config.toml of this run."
    if metrics.unreadable:
        line += f" Lines of metrics.jsonl that could not be read and were left out: {metrics.unreadable}."
    return f"<footer>{line}</footer>"
