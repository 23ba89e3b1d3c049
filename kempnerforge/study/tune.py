"""``[study.tune]``: the same number of trials for each row, scored on a validation split; their results are
what their directories say.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kempnerforge.study.budget import plan_row
from kempnerforge.study.cells import Cell, Row, cell_of, override
from kempnerforge.study.config import RangeConfig, Study, TuneConfig
from kempnerforge.study.run import State, state_of
from kempnerforge.util.errors import InputError
from kempnerforge.util.metrics import read_metrics


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        values: of the tuned keys.
        score: on the validation split; NaN where it has failed; None where it is not over.
    """

    number: int
    values: dict[str, Any]
    cell: Cell
    state: State
    score: float | None

    @property
    def is_over(self) -> bool:
        """Whether its result is known. What a signal has ended may end otherwise the next time; what has
        diverged does not.
        """
        return self.score is not None


@dataclass(frozen=True)
class Tuned:
    """The trials of a row, as far as they are known: those whose values depend on no trial that is still to
    end.
    """

    row: Row
    trials: list[Trial]
    best: Trial | None

    @property
    def overrides(self) -> list[str]:
        """What was chosen."""
        return [] if self.best is None else [override(key, value) for key, value in self.best.values.items()]


def trials_of(study: Study, row: Row, asked: float | None) -> Tuned:
    """The trials of ``row``. With "qmc" all are known at once; with "tpe" each when those before it are over.

    Args:
        asked: the budget of all rows; see ``plan_row``.
    """
    tune = _settings(study)
    proposer = Proposer(tune, higher=study.cfg.scores[0].better == "higher")
    found: list[Trial] = []
    for number in range(tune.trials):
        values = proposer.next()
        trial = _trial(study, row, number, values, asked)
        found.append(trial)
        if tune.sampler == "tpe" and not trial.is_over:
            break
        proposer.tell(trial.score)
    over = len(found) == tune.trials and all(trial.is_over for trial in found)
    return Tuned(row, found, _best(found, study.cfg.scores[0].better) if over else None)


def _settings(study: Study) -> TuneConfig:
    assert study.cfg.tune is not None, "the study is tuned"
    return study.cfg.tune


def _trial(study: Study, row: Row, number: int, values: Mapping[str, Any], asked: float | None) -> Trial:
    tune, key = _settings(study), study.cfg.scores[0].key
    more = [override(key, value) for key, value in values.items()]
    job = plan_row(study, row, asked, more).job
    job = replace(job, data=replace(job.data, validation=tune.validation))
    cell = cell_of(study, row, job, tune.seed, study.dir / "tune" / row.name / f"trial-{number:02d}", f"{row.name}/trial-{number:02d}")
    state = state_of(cell)
    if state.name != "finished":
        return Trial(number, dict(values), cell, state, math.nan if state.is_final else None)
    return Trial(number, dict(values), cell, state, score_of(cell, key))


def score_of(cell: Cell, key: str) -> float:
    """What the evaluation at the end of a finished trial has found; NaN: no finite number.

    Raises:
        InputError: it has no ``key``.
    """
    found = read_metrics(cell.dir / "metrics.jsonl").evaluation_at(cell.job.total_steps())
    if key not in found:
        raise InputError(f"{cell.dir}: has no {key}, which [study] scores names; it has {', '.join(sorted(found)) or 'no score'}")
    return found[key]


def _best(trials: Sequence[Trial], better: str) -> Trial | None:
    """The first of those with the best score; None: all have failed."""
    scored = [trial for trial in trials if trial.score is not None and math.isfinite(trial.score)]
    sign = 1 if better == "higher" else -1
    return max(scored, key=lambda trial: sign * (trial.score or 0.0), default=None)


class Proposer:
    """optuna's sampler, from the first trial on each time: what it proposes depends on the seed and the
    scores alone.

    NOTE: ``optuna`` is imported here, as only studies that tune need it.
    """

    def __init__(self, cfg: TuneConfig, higher: bool) -> None:
        try:
            import optuna
        except ImportError:
            raise InputError('[study.tune] needs the package optuna: pip install "kempnerforge[study]"') from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._even = cfg.sampler == "qmc"
        if self._even:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                sampler = optuna.samplers.QMCSampler(qmc_type="halton", scramble=True, seed=cfg.seed, warn_independent_sampling=False)
        else:
            sampler = optuna.samplers.TPESampler(seed=cfg.seed)
        self._study = optuna.create_study(sampler=sampler, direction="maximize" if higher else "minimize")
        self._space = {key: _distribution(entry) for key, entry in cfg.keys.items()}
        self._failed = optuna.trial.TrialState.FAIL
        self._waiting: Any = None

    def next(self) -> dict[str, Any]:
        """The values of the next trial, in three digits."""
        self._waiting = self._study.ask(self._space)
        return {key: float(f"{value:.3g}") if type(value) is float else value for key, value in self._waiting.params.items()}

    def tell(self, score: float | None) -> None:
        """The score of the trial that ``next`` has proposed; NaN: there is none."""
        if self._even:
            self._study.tell(self._waiting, 0.0)  # the next one does not depend on it
        elif score is None or not math.isfinite(score):
            self._study.tell(self._waiting, state=self._failed)
        else:
            self._study.tell(self._waiting, score)


def _distribution(cfg: RangeConfig) -> Any:
    from optuna.distributions import FloatDistribution, IntDistribution

    if type(cfg.low) is int and type(cfg.high) is int:
        return IntDistribution(cfg.low, cfg.high, log=cfg.log)
    return FloatDistribution(float(cfg.low), float(cfg.high), log=cfg.log)
