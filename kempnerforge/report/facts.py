"""What the report says: the summary of a run, and the last numbers of ``metrics.jsonl`` where it has none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from kempnerforge.util.metrics import Metrics


class Facts:
    """The summary, with the metrics' last word where it is silent."""

    HEADER = ("name", "arch", "parameters", "trainable_parameters", "steps", "train_s", "device")
    TILES = (
        "questions", "unreadable", "too_long", "cut", "exact_match", "exact_match_blind", "exact_match_shuffled", "question_only_prior", "loss", "loss_samples",
        "loss_unreadable", "tokens_per_s", "images_per_s", "by_answer",
    )  # fmt: skip

    def __init__(self, summary: Mapping[str, object], metrics: Metrics, tasks: Sequence[str] = ()) -> None:
        self.summary, self.metrics = summary, metrics
        groups, ends = summary.get("by_answer"), ("", "_blind", "_shuffled", "_questions", "_unreadable", "_too_long", "_cut")
        self._shown = {*self.HEADER, *self.TILES, *(name + end for name in tasks for end in ends)}
        self._last = metrics.last_evaluation()
        self.by_answer: dict[str, tuple[int, int]] = {}
        if isinstance(groups, Mapping):
            self.by_answer = {str(answer): (int(right), int(total)) for answer, (right, total) in groups.items() if int(total) > 0}
            self._last.setdefault("eval/questions", sum(total for _, total in self.by_answer.values()))

    def text(self, key: str) -> str:
        return str(self.summary.get(key) or "")

    def number(self, key: str) -> float | None:
        value = self.summary.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        return None

    def result(self, key: str) -> float | None:
        """A result on held-out data, or a count beside it: from the summary or the last evaluation."""
        value = self.number(key)
        return value if value is not None else self._last.get(f"eval/{key}")

    def rate(self, key: str) -> float | None:
        """A throughput: the summary's, else the median over the run."""
        value, seen = self.number(key), self.metrics.values(f"train/{key}")
        return value if value is not None else median(seen) if seen else None

    def beside(self, key: str, words: str) -> str:
        """A count as it is beside a score; empty where there is none."""
        count = self.result(key)
        return f"; {count:,.0f} {words}" if count is not None else ""

    def baseline(self) -> tuple[float, str] | None:
        """The score of answers without looking, and how: the prior, or always the most frequent answer."""
        prior = self.number("question_only_prior")
        if prior is not None:
            return prior, "from the question alone"
        totals = [total for _, total in self.by_answer.values()]
        return (max(totals) / sum(totals), "always the most frequent answer") if len(totals) > 1 else None

    def others(self) -> list[tuple[str, str]]:
        """Plain values that no other place shows."""
        plain = {key: value for key, value in self.summary.items() if key not in self._shown and isinstance(value, str | int | float)}
        return [(key.replace("_", " "), value if isinstance(value, str) else f"{value:,.6g}") for key, value in plain.items()]
