"""What the report says: the numbers of ``metrics.jsonl`` and the summary of a run, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from kempnerforge.report.charts import Series
from kempnerforge.util.files import read_objects


@dataclass(frozen=True)
class Metrics:
    """What ``metrics.jsonl`` says: a row of numbers per step, ascending; the last line counts where a step was logged again."""

    rows: dict[int, dict[str, float]]
    unreadable: int

    def series(self, key: str, name: str, smooth: bool = False) -> Series | None:
        """The values of ``key`` over the steps that have it; None where no step does."""
        points = [(step, row[key]) for step, row in self.rows.items() if key in row]
        return Series(name, [step for step, _ in points], [value for _, value in points], smooth) if points else None

    def values(self, key: str) -> list[float]:
        return [row[key] for row in self.rows.values() if key in row and math.isfinite(row[key])]


def read_metrics(path: Path) -> Metrics:
    """Reads ``metrics.jsonl``. Lines that are not an object with a step (a kill may break one) are counted and left out."""
    rows: dict[int, dict[str, float]] = {}
    found, others = read_objects(path, "step", int) if path.exists() else ([], [])
    for row in found:
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        rows.setdefault(row["step"], {}).update(numbers)
    return Metrics(dict(sorted(rows.items())), len(others))


class Facts:
    """The summary, with the metrics' last word where it is silent."""

    HEADER = ("name", "arch", "parameters", "trainable_parameters", "steps", "train_s", "device")
    TILES = (
        "questions", "unreadable", "too_long", "exact_match", "exact_match_blind", "question_only_prior", "loss", "loss_samples",
        "loss_unreadable", "tokens_per_s", "images_per_s", "by_answer",
    )  # fmt: skip

    def __init__(self, summary: Mapping[str, object], metrics: Metrics) -> None:
        self.summary, self.metrics = summary, metrics
        groups = summary.get("by_answer")
        evaluations = [row for row in metrics.rows.values() if any(key.startswith("eval/") for key in row)]
        self._last = {key: value for key, value in (evaluations or [{}])[-1].items() if math.isfinite(value)}
        self.by_answer: dict[str, tuple[int, int]] = {}
        if isinstance(groups, Mapping):
            self.by_answer = {str(answer): (int(right), int(total)) for answer, (right, total) in groups.items() if int(total) > 0}

    def text(self, key: str) -> str:
        return str(self.summary.get(key) or "")

    def number(self, key: str) -> float | None:
        value = self.summary.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        return None

    def result(self, key: str) -> float | None:
        """A result on held-out data, or a count beside it: the summary's, else that of the last evaluation."""
        value = self.number(key)
        return value if value is not None else self._last.get(f"eval/{key}")

    def rate(self, key: str) -> float | None:
        """A throughput: the summary's, else the median over the run."""
        value, seen = self.number(key), self.metrics.values(f"train/{key}")
        return value if value is not None else median(seen) if seen else None

    def questions(self) -> int | None:
        """How many were asked for the accuracy."""
        asked = self.result("questions")
        return int(asked) if asked else sum(total for _, total in self.by_answer.values()) or None

    def beside(self, key: str, words: str) -> str:
        """A count as it stands beside a score; empty where there is none."""
        count = self.result(key)
        return f"; {count:,.0f} {words}" if count is not None else ""

    def baseline(self) -> tuple[float, str] | None:
        """What an answer without looking reaches: the given prior, or always saying the most frequent answer."""
        prior = self.number("question_only_prior")
        if prior is not None:
            return prior, "from the question alone"
        totals = [total for _, total in self.by_answer.values()]
        return (max(totals) / sum(totals), "always the most frequent answer") if len(totals) > 1 else None

    def others(self) -> list[tuple[str, str]]:
        """Plain values that no other place shows."""
        known = {*self.HEADER, *self.TILES}
        plain = {key: value for key, value in self.summary.items() if key not in known and isinstance(value, str | int | float)}
        return [(key.replace("_", " "), value if isinstance(value, str) else f"{value:,.6g}") for key, value in plain.items()]


def wilson_interval(right: float, total: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share (Wilson 1927): stays inside [0, 1], also near its ends."""
    assert total > 0
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(centre - half, 0.0), min(centre + half, 1.0)
