"""``metrics.jsonl`` as numbers by step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from kempnerforge.util.files import read_objects


class Points(NamedTuple):
    """Values over another: equally many of both."""

    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class Metrics:
    """A row of numbers per step, ascending; the last line counts where a step was logged again.

    Attributes:
        unreadable: lines that are left out: no object with a step (a kill may break one).
        not_finite: keys of each step whose value was NaN or infinite, which is written as null.
    """

    rows: dict[int, dict[str, float]]
    unreadable: int
    not_finite: dict[int, set[str]] = field(default_factory=dict)

    def points(self, key: str, over: str = "") -> Points:
        """The values of ``key``, and the steps that have one; with ``over``, the values of this key there
        instead of the steps.
        """
        found = [(row[over] if over else step, row[key]) for step, row in self.rows.items() if key in row and (not over or over in row)]
        return Points([x for x, _ in found], [y for _, y in found])

    def values(self, key: str) -> list[float]:
        """The finite values of ``key``."""
        return [value for value in self.points(key).y if math.isfinite(value)]

    def evaluation_at(self, step: int) -> dict[str, float]:
        """What was measured after ``step``, by key; NaN where it was not finite; empty where nothing was."""
        found = self.rows.get(step, {}) | dict.fromkeys(self.not_finite.get(step, ()), math.nan)
        return {key: value for key, value in found.items() if key.startswith("eval/")}

    def last_evaluation(self, until: float = math.inf) -> dict[str, float]:
        """The finite values of the last evaluation up to the step ``until``, by key."""
        for step in reversed(self.rows):
            if step <= until and (found := self.evaluation_at(step)):
                return {key: value for key, value in found.items() if math.isfinite(value)}
        return {}


def read_metrics(path: Path) -> Metrics:
    """Reads the file; no rows where there is none."""
    rows: dict[int, dict[str, float]] = {}
    not_finite: dict[int, set[str]] = {}
    found, others = read_objects(path, "step", int) if path.is_file() else ([], [])
    for row in found:
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        rows.setdefault(row["step"], {}).update(numbers)
        missing = not_finite.setdefault(row["step"], set())
        missing |= {key for key, value in row.items() if value is None}
        missing -= numbers.keys()
    return Metrics(dict(sorted(rows.items())), len(others), {step: keys for step, keys in not_finite.items() if keys})
