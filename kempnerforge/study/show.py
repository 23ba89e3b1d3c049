"""Plan and status of a study as tables and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from kempnerforge.study.budget import TOLERANCE, Planned
from kempnerforge.study.cells import refuse_changed
from kempnerforge.study.config import Study
from kempnerforge.study.progress import look
from kempnerforge.study.run import state_of
from kempnerforge.util.numbers import format_number


def plan_table(study: Study) -> dict[str, Any]:
    """What would be run, as plain values."""
    progress, tune = look(study), study.cfg.tune
    return {
        "name": study.cfg.name,
        "dir": str(study.dir),
        "seeds": study.cfg.seeds,
        "cells": len(progress.planned) * len(study.cfg.seeds),
        "trials": len(progress.planned) * tune.trials if tune else 0,
        "rows": [_planned(one) for one in progress.planned],
    }


def _planned(one: Planned) -> dict[str, Any]:
    budget, job = one.budget, one.job
    return {
        "row": one.row.name,
        "asked": one.asked,
        "steps": budget.steps,
        "batch_size": job.train.step_rows,
        "samples": budget.samples,
        "trained_tokens": budget.trained_tokens,
        "train_flops": budget.train_flops,
        "params": budget.params,
        "trainable": budget.trainable,
        "miss": one.miss,
    }


def plan_lines(study: Study, table: dict[str, Any]) -> list[str]:
    """The table of ``plan_table`` as text."""
    match = study.cfg.match
    lines = [f"{table['name']}: {len(table['rows'])} rows x {len(table['seeds'])} seeds = {table['cells']} cells, in {table['dir']}"]
    lines += [f"tuned: {study.cfg.tune.trials} trials a row, {table['trials']} in all"] if study.cfg.tune else ["untuned: no [study.tune]"]
    lines += [f"matched: {match.quantity}, by {match.by}"] if match else ["nothing is matched: no [study.match]"]
    columns = ["row", "asked", "steps", "samples", "trained_tokens", "train_flops", "params", "trainable"]
    cells = [[row["row"], *(_number(row[name]) for name in columns[1:])] for row in table["rows"]]
    lines += ["", *aligned([name.replace("_", " ") for name in columns], cells)]
    for row in table["rows"]:
        if abs(row["miss"]) > TOLERANCE:
            lines.append(
                f"warning: {row['row']} is {100 * row['miss']:+.1f} % from what is asked: {match.by if match else ''} moves in whole steps"
            )
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else format_number(value) if value >= 1e5 else f"{value:,.0f}"


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first one to the left, numbers to the right."""
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    return ["  ".join([row[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(row[1:], widths[1:], strict=True))]) for row in [head, *rows]]


def status_table(study: Study) -> dict[str, Any]:
    """Where all trials and cells are, as plain values; errors as of ``find``."""
    progress = look(study)
    refuse_changed([*progress.trials, *progress.cells])
    states = {cell.name: state_of(cell) for cell in progress.cells}
    trials = {trial.cell.name: trial.state for tuned in progress.tuned for trial in tuned.trials}
    unknown = len(progress.planned) * len(study.cfg.seeds) - len(states)
    wanted = len(progress.planned) * study.cfg.tune.trials - len(trials) if study.cfg.tune else 0
    return {
        "name": study.cfg.name,
        "trials": dict(Counter(state.name for state in trials.values()) + Counter(waiting=wanted)),
        "cells": dict(Counter(state.name for state in states.values()) + Counter(waiting=unknown)),
        "failed": {name: state.why for name, state in (trials | states).items() if state.name == "failed"},
        "running": [name for name, state in (trials | states).items() if state.name == "running"],
        "chosen": {tuned.row.name: tuned.best.values for tuned in progress.tuned if tuned.best is not None},
    }


def status_lines(table: dict[str, Any]) -> list[str]:
    """The table of ``status_table`` as text."""
    lines = []
    for what in ("trials", "cells"):
        counts = ", ".join(f"{count} {name}" for name, count in sorted(table[what].items()))
        lines += [f"{what}: {counts}"] if counts else []
    lines += [
        f"chosen for {row}: {', '.join(f'{key} = {value}' for key, value in values.items())}" for row, values in table["chosen"].items()
    ]
    lines += [f"running: {name}" for name in table["running"]]
    return lines + [f"failed: {name}: {why}" for name, why in table["failed"].items()]
