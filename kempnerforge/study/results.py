"""What the cells of a study have found, from the files in their directories."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kempnerforge.study.cells import Cell
from kempnerforge.study.run import State, state_of
from kempnerforge.study.statistics import clustered_error
from kempnerforge.training.hooks.study import INITIAL, PREDICTIONS
from kempnerforge.util.digest import digest
from kempnerforge.util.errors import InputError
from kempnerforge.util.files import read_objects
from kempnerforge.util.metrics import Metrics, read_metrics
from kempnerforge.util.reading import read_object


class Spent(NamedTuple):
    """What a cell had used when it was evaluated; ``seconds`` without evaluation and saving."""

    steps: int = 0
    samples: float = 0.0
    trained_tokens: float = 0.0
    train_flops: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Result:
    """A cell.

    Attributes:
        scores: finite ones of the evaluation after the last step, by key; empty where it is not finished.
        curve: the evaluations on the way: what was spent, and scores by key.
        stream: (samples so far, sum of the hashes of their ids) after each step.
        initial: shape and digest of each parameter at step 0.
        memory_gib: at most; NaN where it is not known.
        latency_s: the median time to answer one question alone; NaN where it is not known.
        unreadable: lines of its ``metrics.jsonl`` that are left out.
    """

    cell: Cell
    seed: int
    state: State
    scores: dict[str, float] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)
    curve: list[tuple[Spent, dict[str, float]]] = field(default_factory=list)
    stream: list[tuple[int, int]] = field(default_factory=list)
    initial: dict[str, str] = field(default_factory=dict)
    memory_gib: float = math.nan
    latency_s: float = math.nan
    unreadable: int = 0

    @property
    def row(self) -> str:
        return self.cell.row.name

    @property
    def is_finished(self) -> bool:
        return self.state.name == "finished"


def read_result(cell: Cell) -> Result:
    """What is in the directory of ``cell``."""
    seed, state = cell.job.train.seed, state_of(cell)
    metrics = read_metrics(cell.dir / "metrics.jsonl")
    if not metrics.rows:
        return Result(cell, seed, state, unreadable=metrics.unreadable)
    curve = _curve(metrics)
    sums = [list(accumulate(metrics.points(f"study/{key}").y)) for key in ("samples", "sample_ids")]
    return Result(
        cell,
        seed,
        state,
        scores=_finite(metrics.evaluation_at(cell.job.total_steps())) if state.name == "finished" else {},
        spent=curve[-1][0],
        curve=[(spent, found) for spent, found in curve if found],
        stream=[(int(count), int(ids)) for count, ids in zip(*sums, strict=False)],
        initial=_initial(cell.dir),
        memory_gib=max(metrics.values("study/peak_memory_gib"), default=math.nan),
        latency_s=next(reversed(metrics.values("study/latency_s")), math.nan),
        unreadable=metrics.unreadable,
    )


def _finite(scores: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in scores.items() if math.isfinite(value)}


def _curve(metrics: Metrics) -> list[tuple[Spent, dict[str, float]]]:
    """After each step what was spent, and what was measured then."""
    samples = tokens = flops = seconds = 0.0
    found = []
    for step, row in metrics.rows.items():
        samples += row.get("study/samples", 0)
        tokens += row.get("study/trained_tokens", 0)
        flops += row.get("study/flops", 0)
        seconds = row.get("train/elapsed_s", seconds)
        found.append((Spent(step, samples, tokens, flops, seconds), _finite(metrics.evaluation_at(step))))
    return found


def _initial(directory: Path) -> dict[str, str]:
    try:
        return {name: str(value) for name, value in read_object(directory / INITIAL).items()}
    except (OSError, InputError):
        return {}


# ---- comparisons of cells that share a seed ------------------------------------------------------


class SameSamples(NamedTuple):
    """Whether cells saw the same samples in the same order.

    Attributes:
        compared: samples up to which all of them can be compared.
        digests: by row; the same ones mean the same samples in each step.
    """

    compared: int
    digests: dict[str, str]

    @property
    def same(self) -> bool:
        return len(set(self.digests.values())) <= 1


def same_samples(results: Sequence[Result]) -> SameSamples:
    """Compares the streams of ``results``, which have one seed, wherever all have seen the same number of
    samples.
    """
    streams = {one.row: dict(one.stream) for one in results if one.stream}
    common = sorted(set.intersection(*(set(stream) for stream in streams.values()))) if streams else []
    return SameSamples(common[-1] if common else 0, {row: digest([(n, stream[n]) for n in common]) for row, stream in streams.items()})


class SameWeights(NamedTuple):
    """Parameters at step 0 that have the same name and shape in two rows or more.

    Attributes:
        same: how many have the same values in all of them.
        different: names of the others.
    """

    same: int
    different: list[str]


def same_weights(results: Sequence[Result]) -> SameWeights:
    """Compares the first weights of ``results``, which have one seed."""
    by_name: dict[tuple[str, str], list[str]] = defaultdict(list)
    for one in results:
        for name, described in one.initial.items():
            shape, _, content = described.rpartition(" ")
            by_name[name, shape].append(content)
    shared = {name: contents for (name, _), contents in by_name.items() if len(contents) > 1}
    different = sorted(name for name, contents in shared.items() if len(set(contents)) > 1)
    return SameWeights(len(shared) - len(different), different)


# ---- questions -----------------------------------------------------------------------------------


def question_error(results: Sequence[Result], key: str) -> float:
    """Standard error of the mean score of a row over the questions that were asked, those about one image
    together; the points of a question are its mean over seeds. NaN where no predictions are kept.
    """
    points: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for one in results:
        for given in answered(one, key):
            points[given.question].append(given.points)
    if not points:
        return math.nan
    return clustered_error([float(np.mean(values)) for values in points.values()], [sample for sample, _, _ in points])


class Answered(NamedTuple):
    """A question (sample, prompt, truth), a cell's answer to it and its points."""

    question: tuple[str, str, str]
    answer: str
    points: float


def answered(result: Result, key: str) -> list[Answered]:
    """The answers of a cell that count for the score ``key``; none where they are not kept."""
    path, task = result.cell.dir / PREDICTIONS, key.removeprefix("eval/")
    if not path.is_file():
        return []
    rows, _ = read_objects(path, "id", str)
    worth = "right" if task == "exact_match" else "points"
    mine = [row for row in rows if row.get("task", "exact_match") == task]
    return [
        Answered((row["id"], str(row.get("prompt")), str(row.get("truth"))), str(row.get("answer")), float(points))
        for row in mine
        if isinstance(points := row.get(worth), bool | int | float)
    ]
