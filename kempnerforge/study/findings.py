"""The comparison itself: each row over its seeds, each pair of rows, and what a reader has to be warned of."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kempnerforge.study.budget import TOLERANCE, Planned
from kempnerforge.study.cells import refuse_changed
from kempnerforge.study.config import ScoreConfig, Study
from kempnerforge.study.progress import Progress, asked_first, look
from kempnerforge.study.results import Result, SameSamples, read_result, same_samples, same_weights
from kempnerforge.study.statistics import Difference, Mean, differences, mean_of, smallest_p
from kempnerforge.study.tune import Tuned
from kempnerforge.util.numbers import counted, format_number, format_percent

STILL_RISING = 0.1
"""Share of its whole gain that a row may still make in the last fifth of its steps."""
BLIND = 0.02
"""Share of the score that images have to add."""


@dataclass(frozen=True)
class Findings:
    """A study as far as it has come.

    Attributes:
        results: of all cells that are known.
    """

    study: Study
    progress: Progress
    results: list[Result]

    @property
    def score(self) -> ScoreConfig:
        """What rows are compared by."""
        return self.study.cfg.scores[0]

    @property
    def rows(self) -> list[Planned]:
        return self.progress.planned

    @cached_property
    def by_row(self) -> dict[str, list[Result]]:
        """The finished cells of each row, by seed."""
        found: dict[str, list[Result]] = {one.row.name: [] for one in self.rows}
        for result in sorted(self.results, key=lambda one: one.seed):
            if result.is_finished:
                found[result.row].append(result)
        return found

    def values(self, key: str) -> dict[str, dict[int, float]]:
        """Row -> seed -> score, of the finished cells that have ``key``."""
        return {row: {one.seed: one.scores[key] for one in cells if key in one.scores} for row, cells in self.by_row.items()}

    def mean(self, row: str, key: str) -> Mean | None:
        """Of ``key`` over the seeds of ``row``; None: no cell has it."""
        values = list(self.values(key)[row].values())
        return mean_of(values) if values else None

    @cached_property
    def pairs(self) -> list[Difference]:
        """The pairs of rows that the study asks about, by the first score."""
        return differences(self.values(self.score.key), self.study.cfg.pairs)

    @cached_property
    def samples(self) -> dict[int, SameSamples]:
        """By seed: whether all rows saw the same samples."""
        return {seed: same_samples(cells) for seed, cells in self._by_seed().items()}

    def _by_seed(self) -> dict[int, list[Result]]:
        found: dict[int, list[Result]] = defaultdict(list)
        for result in self.results:
            if result.is_finished:
                found[result.seed].append(result)
        return dict(sorted(found.items()))

    @cached_property
    def verdict(self) -> list[str]:
        """What was found, in sentences."""
        missing = len(self.rows) * len(self.study.cfg.seeds) - sum(map(len, self.by_row.values()))
        said = (
            [f"{counted(missing, 'cell')} of the study {'is' if missing == 1 else 'are'} missing: what follows is of the others."]
            if missing
            else []
        )
        if not self.pairs:
            return [*said, "No two rows have two seeds in common yet: nothing can be compared."]
        shown = [one for one in self.pairs if one.is_shown]
        for one in shown:
            flip = (one.mean > 0) != (self.score.better == "higher")
            winner, other = (one.a, one.b) if flip else (one.b, one.a)
            low, high = sorted((abs(one.low), abs(one.high)))
            said.append(
                f"{winner} is better than {other} by {self.points(abs(one.mean))} (95 % interval {self.points(low)} to {self.points(high)}; p ="
                f" {one.p_holm:.2g} after Holm's correction for {counted(len(self.pairs), 'pair')})."
            )
        rest = len(self.pairs) - len(shown)
        if rest:
            asked = f"in any of the {counted(rest, 'pair')} that the study asks about" if self.study.cfg.pairs else "between any two rows"
            others = f"in the other {counted(rest, 'pair')}" if rest > 1 else "in the other pair"
            about = others if shown else asked
            said.append(f"No difference is shown {about}: the order of their means says nothing.")
        return said

    @cached_property
    def is_share(self) -> bool:
        """Whether the first score lies between 0 and 1 in all cells."""
        return all(0 <= value <= 1 for values in self.values(self.score.key).values() for value in values.values())

    def shown(self, value: float) -> str:
        """A value of the first score."""
        return format_percent(value) if self.is_share else f"{value:.4g}"

    def points(self, value: float) -> str:
        """A difference of two values of the first score."""
        return f"{100 * value:.1f} points" if self.is_share else f"{value:.3g}"

    @cached_property
    def warnings(self) -> list[str]:
        """What makes the comparison less than it looks."""
        return [*self._incomplete(), *self._budgets(), *self._starts(), *self._scores(), *self._seeds()]

    def _incomplete(self) -> list[str]:
        cfg, lines = self.study.cfg, []
        for one in self.rows:
            if lack := [seed for seed in cfg.seeds if seed not in {result.seed for result in self.by_row[one.row.name]}]:
                lines.append(f"{one.row.name}: the cells of seeds {', '.join(map(str, lack))} are missing.")
        lines += [f"{one.cell.name} has failed: {one.state.why}" for one in self.results if one.state.name == "failed"]
        lines += [
            f"{one.cell.name}: {counted(one.unreadable, 'line')} of its metrics cannot be read." for one in self.results if one.unreadable
        ]
        if (first := asked_first(self.study)) is not None and first != cfg.pairs:
            lines.append(f"When the first cell was run, the study asked about {_pairs(first)}; now it asks about {_pairs(cfg.pairs)}.")
        lines += [line for score in cfg.scores for line in self._without(score.key)]
        if cfg.tune is None:
            lines.append("Nothing was tuned: all rows have the learning rate of the common config, which may suit one better than another.")
        for tuned in self.progress.tuned:
            scored = [trial for trial in tuned.trials if trial.score is not None and math.isfinite(trial.score)]
            if len(scored) < (cfg.tune.trials if cfg.tune else 0):
                lines.append(f"{tuned.row.name}: {len(scored)} of its trials have a score; the rows are not tuned alike.")
            lines += [f"{tuned.row.name}: the chosen {value} of all that were tried." for value in _at_an_end(tuned)]
        return lines

    def _without(self, key: str) -> list[str]:
        """A warning if finished cells do not have the score ``key``: the others alone are compared."""
        done = [one for cells in self.by_row.values() for one in cells]
        lacking = [one.cell.name for one in done if key not in one.scores]
        if len(lacking) < len(done):
            return [f"{key}: has no finite value in {', '.join(lacking)}."] if lacking else []
        known = sorted({known for one in done for known in one.scores})
        return [f"{key}: has no finite value in any finished cell; there are {', '.join(known) or 'no scores'}."] if done else []

    def _budgets(self) -> list[str]:
        lines = []
        for one in self.rows:
            for result in self.by_row[one.row.name]:
                real = self.realised(one, result)
                if one.asked and abs(miss := real / one.asked - 1) > TOLERANCE:
                    used = f"{format_number(real)} {one.quantity} instead of {format_number(one.asked)}"
                    lines.append(f"{result.cell.name}: {used} ({100 * miss:+.1f} %).")
        if self.study.cfg.match is None:
            lines.append("Nothing is matched: rows may have had other budgets; see the table of budgets.")
        return lines

    def realised(self, planned: Planned, result: Result) -> float:
        """How much of what is matched a cell has used."""
        if planned.quantity == "params":
            return float(planned.budget.params)
        return float(getattr(result.spent, "seconds" if planned.quantity == "wall_clock" else planned.quantity or "samples"))

    def _starts(self) -> list[str]:
        """About rows that are compared."""
        lines = []
        for pair in self.study.cfg.pairs or [list(self.by_row)]:
            rows = " and ".join(pair) if self.study.cfg.pairs else "the rows"
            other: list[int] = []
            different: dict[int, list[str]] = {}
            for seed, cells in self._by_seed().items():
                compared = [one for one in cells if one.row in pair]
                other += [] if same_samples(compared).same else [seed]
                if names := same_weights(compared).different:
                    different[seed] = names
            if other:
                lines.append(f"{_seeds(other)}: {rows} did not see the same samples in the same order.")
            if different:
                names = next(iter(different.values()))
                count = counted(len(names), "parameter")
                lines.append(f"{_seeds(different)}: {rows}: {count} of the same name and shape began differently, as {names[0]}.")
        return lines

    def _scores(self) -> list[str]:
        key, lines = self.score.key, []
        for row, cells in self.by_row.items():
            seeing, blind = self.mean(row, key), self.mean(row, f"{key}_blind")
            if seeing and blind and self.score.better == "higher" and blind.value >= (1 - BLIND) * seeing.value:
                lines.append(
                    f"{row}: without images it scores {self.shown(blind.value)}, with them {self.shown(seeing.value)}: it does not use them."
                )
            if (late := late_gain(cells, key)) > STILL_RISING:
                lines.append(f"{row}: not converged: {format_percent(late)} of its gain came in the last fifth of its steps.")
        return lines

    def _seeds(self) -> list[str]:
        count = len(self.study.cfg.seeds)
        if smallest_p(count) <= 0.05:
            return []
        return [
            f"With {counted(count, 'seed')} the smallest p that the sign-flip test can give is {smallest_p(count):.4g}: by itself it can show nothing at"
            " 5 %. Six seeds or more can."
        ]


def _seeds(seeds: Iterable[int]) -> str:
    *before, last = map(str, seeds)
    return f"Seeds {', '.join(before)} and {last}" if before else f"Seed {last}"


def _pairs(pairs: list[list[str]]) -> str:
    return ", ".join(" and ".join(pair) for pair in pairs) or "all pairs"


def _at_an_end(tuned: Tuned) -> list[str]:
    """Chosen values that are the lowest or highest of all that were tried: a better one may lie beyond."""
    found = []
    for key, value in tuned.best.values.items() if tuned.best is not None else ():
        tried = [trial.values[key] for trial in tuned.trials]
        if len(set(tried)) > 2 and value in (min(tried), max(tried)):
            found.append(f"{key} = {value} is the {'lowest' if value == min(tried) else 'highest'}")
    return found


def late_gain(cells: Sequence[Result], key: str) -> float:
    """The share of the gain of ``key`` since the first evaluation, on average over ``cells``, that came in
    the last fifth of the steps; 0 where the evaluations do not tell.
    """
    gains = []
    for one in cells:
        points = [(spent.steps, scores[key]) for spent, scores in one.curve if key in scores]
        before = [value for step, value in points if step <= 0.8 * one.spent.steps]
        if len(before) >= 2:
            gains.append((points[-1][1] - before[0], points[-1][1] - before[-1]))
    if not gains:
        return 0.0
    whole, late = np.mean(gains, axis=0)
    return float(late / whole) if whole else 0.0


def find(study: Study) -> Findings:
    """Reads all cells of ``study``.

    Raises:
        InputError: one of them, or a trial, was run before the study was changed.
    """
    progress = look(study)
    refuse_changed([*progress.trials, *progress.cells])
    return Findings(study, progress, [read_result(cell) for cell in progress.cells])


def skills(findings: Findings) -> Mapping[str, dict[str, float]]:
    """Kind of question -> row -> mean over seeds, where the first score has kinds."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    prefix = f"{findings.score.key}/"
    for row, cells in findings.by_row.items():
        for key in sorted({key for one in cells for key in one.scores if key.startswith(prefix)}):
            found[key.removeprefix(prefix)][row] = float(np.mean([one.scores[key] for one in cells if key in one.scores]))
    return found
