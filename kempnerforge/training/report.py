"""``report.html``: one file that shows what a run did. It needs no network and loads nothing: styles, charts and images lie in it."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kempnerforge.training.charts import Band, Series, format_number, format_percent, line_chart
from kempnerforge.training.report_facts import Facts, Metrics, read_metrics, wilson_interval
from kempnerforge.training.report_style import STYLE

MAX_IMAGE_SIDE = 320  # pixels; larger examples are shrunk so that the file stays small
MAX_ANSWERS = 40  # rows of the table per answer
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Example:
    """A held-out question and what the model said.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        prompt, truth, answer: the question, the expected and the generated answer.
        blind_answer: the answer with the image blanked; None where that was not asked.
    """

    image: np.ndarray
    prompt: str
    truth: str
    answer: str
    blind_answer: str | None = None

    @property
    def right(self) -> bool:
        return self.answer.split() == self.truth.split()


def write_report(
    run_dir: Path,
    *,
    config_toml: str,
    stages: Sequence[tuple[str, int, int]],
    examples: Sequence[Example],
    summary: Mapping[str, object],
) -> Path:
    """Writes ``run_dir/report.html`` from ``run_dir/metrics.jsonl`` and what is given; an old report is replaced in one move.

    Args:
        config_toml: the resolved config.
        stages: (name, first step, last step).
        examples: held-out samples to show; none for a run without images.
        summary: facts of the whole run, each optional. ``name``, ``arch``, ``device`` (text); ``parameters``, ``trainable_parameters``,
            ``steps``, ``train_s``, ``questions`` (how many were asked at the end); ``exact_match``, ``exact_match_blind``,
            ``question_only_prior`` (shares); ``loss`` (held out); ``tokens_per_s``, ``images_per_s``; ``by_answer``: answer -> (right, total). What is missing
            comes from the metrics or is left out; other plain values appear in the header under their own name.

    Returns:
        The path of the report.
    """
    metrics = read_metrics(run_dir / "metrics.jsonl")
    facts = Facts(summary, metrics)
    name = facts.text("name") or run_dir.resolve().name
    sections = [
        _header(name, facts, stages),
        _tiles(facts),
        _charts(metrics, facts, stages),
        _answers(facts.by_answer),
        _examples(examples),
        f"<details><summary>Configuration</summary><pre>{_text(config_toml)}</pre></details>" if config_toml else "",
        _footer(metrics),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{_text(name)}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body><main>\n'
        + "\n".join(filter(None, sections))
        + "\n</main></body></html>\n"
    )
    target = run_dir / "report.html"
    temporary = run_dir / f".report.html.{os.getpid()}"
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _text(text: object) -> str:
    """Escaped for HTML. What cannot stand in a UTF-8 file (half of a surrogate pair) and controls become visible replacements."""
    clean = str(text).encode("utf-8", "replace").decode("utf-8")
    return escape("".join(c if c >= " " or c in "\n\t" else "\ufffd" for c in clean), quote=True)


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


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
        rows.append(("training time", _duration(seconds)))
    rows += [("device", facts.text("device")), *facts.others()]
    items = "".join(f"<div><dt>{_text(key)}</dt><dd>{_text(value)}</dd></div>" for key, value in rows if value)
    return f'<header><h1>{_text(name)}</h1><dl class="facts">{items}</dl></header>'


def _tiles(facts: Facts) -> str:
    tiles = []
    seen, blind, total, base = facts.result("exact_match"), facts.result("exact_match_blind"), facts.questions(), facts.baseline()
    if seen is not None:
        more = "generated answer equals the truth"
        if total:
            low, high = wilson_interval(seen * total, total)
            more = f"{round(seen * total):,} of {total:,} right; 95\u00a0% interval {100 * low:.1f} to {format_percent(high)}"
        tiles.append(("Exact match", _percent(seen), more, "tile lead"))
    if blind is not None:
        more = "image blanked" + (f"; {base[1]}: {format_percent(base[0])}" if base else ": the same questions")
        tiles.append(("Blind exact match", _percent(blind), more, "tile"))
    if seen is not None and blind is not None:
        points = f"{100 * (seen - blind):+.1f} <small>points</small>".replace("-", "−")
        tiles.append(("What the image adds", points, "difference of the two", "tile"))
    loss = facts.result("loss")
    if loss is not None:
        tiles.append(("Held-out loss", f"{loss:.4g}", f"nats a token; perplexity {format_number(math.exp(min(loss, 700.0)))}", "tile lead"))
    tokens, images, seconds = facts.rate("tokens_per_s"), facts.rate("images_per_s"), facts.number("train_s")
    if tokens is not None:
        more = "useful tokens, padding not counted" + (f"; {format_number(images)} images/s" if images else "")
        tiles.append(("Throughput", f"{format_number(tokens)} <small>tokens/s</small>", more, "tile"))
    if seconds is not None:
        steps = facts.number("steps")
        more = f"{_duration(seconds / steps)} a step; evaluation and saving not counted" if steps else "evaluation and saving not counted"
        tiles.append(("Training time", _duration(seconds), more, "tile"))
    if not tiles:
        return ""
    cards = "".join(
        f'<div class="{kind}"><div class="label">{_text(label)}</div><div class="value">{value}</div><div class="more">{_text(more)}</div></div>'
        for label, value, more, kind in tiles
    )
    return f'<section class="tiles">{cards}</section>'


def _percent(share: float) -> str:
    """Two decimals near the ends, where they matter."""
    digits = 2 if share >= 0.98 and share < 1 else 1
    return f"{100 * share:.{digits}f} <small>%</small>"


def _wide(values: Sequence[float]) -> bool:
    """Whether values span so much that only a logarithmic axis shows them."""
    return bool(values) and min(values) > 0 and max(values) > 25 * min(values)


def _charts(metrics: Metrics, facts: Facts, stages: Sequence[tuple[str, int, int]]) -> str:
    bands: list[Band] = [(first, last, name) for name, first, last in stages] if len(stages) > 1 else []
    base = facts.baseline()
    rules = [(base[0], f"{base[1]}:")] if base else []
    charts: list[str] = []

    def add(title: str, label: str, *lines: Series | None, log: bool = False, **options: Any) -> None:
        present = [line for line in lines if line]
        if present:
            charts.append(line_chart(present, title, label, bands=bands, log=log, **options))

    losses = [metrics.series("train/loss", "training", smooth=True), metrics.series("eval/loss", "held out")]
    add("Loss", "nats per trained token", *losses, log=_wide(metrics.values("train/loss")))
    matches = [metrics.series("eval/exact_match", "exact match"), metrics.series("eval/exact_match_blind", "image blanked")]
    add("Accuracy", "share of answers that match", *matches, y_range=(0.0, 1.0), y_format=format_percent, rules=rules)
    add("Throughput", "useful tokens per second", metrics.series("train/tokens_per_s", "tokens/s", smooth=True))
    if any(metrics.values("train/images_per_s")):
        add("Images", "images per second", metrics.series("train/images_per_s", "images/s", smooth=True))
    add("Learning rate", "of the step", metrics.series("train/lr", "rate"))
    norms = metrics.series("train/grad_norm", "norm", smooth=True)
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
        f'<tr><td class="name">{_text(answer)}</td><td class="bar"><span class="track">'
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


def _image(image: np.ndarray) -> str:
    """An ``img`` element with the pixels in it as a PNG."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"example image is {image.dtype} {image.shape}: must be uint8 (H, W, 3)")
    picture = Image.fromarray(np.ascontiguousarray(image))
    small = max(picture.size) <= 96
    picture.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img{" class=small" if small else ""} alt="image of the question" src="data:image/png;base64,{data}">'


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    cards = []
    for one in examples:
        kind, mark = ("right", "✓ right") if one.right else ("wrong", "✗ wrong")
        rows = f'<div class="answer"><b>{_text(one.answer or "(nothing)")}</b> <span class="mark">{mark}</span></div>'
        if not one.right:
            rows += f'<div class="row">truth: <b>{_text(one.truth)}</b></div>'
        else:
            rows += f'<div class="row">truth: {_text(one.truth)}</div>'
        if one.blind_answer is not None:
            rows += f'<div class="row">image blanked: {_text(one.blind_answer or "(nothing)")}</div>'
        cards.append(
            f'<figure class="example {kind}">{_image(one.image)}<figcaption><div class="question">{_text(one.prompt.strip())}</div>{rows}'
            "</figcaption></figure>"
        )
    right = sum(one.right for one in examples)
    return (
        f'<section><h2>Held-out examples</h2><p class="note">{right} of the {len(examples)} shown are right; mistakes are picked first.</p>'
        f'<div class="grid">{"".join(cards)}</div></section>'
    )


def _footer(metrics: Metrics) -> str:
    text = "Written by KempnerForge from metrics.jsonl and config.toml of this run."
    if metrics.unreadable:
        text += f" Lines of metrics.jsonl that could not be read and were left out: {metrics.unreadable}."
    return f"<footer>{text}</footer>"
