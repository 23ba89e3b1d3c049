"""A study as it is: the budget of each row, the trials and cells that are known, and where they are."""

from __future__ import annotations

import json
from dataclasses import dataclass

from kempnerforge.checkpoint.lock import RunLock
from kempnerforge.study.budget import Planned, plan_row, plan_rows
from kempnerforge.study.cells import Cell, cell_of, rows_of
from kempnerforge.study.config import Study
from kempnerforge.study.run import Here, execute, is_finished
from kempnerforge.study.slurm import Cluster
from kempnerforge.study.tune import Tuned, trials_of
from kempnerforge.util.files import write_text
from kempnerforge.util.reading import read_object

PAIRS = "pairs.json"


@dataclass(frozen=True)
class Progress:
    """What is known of a study now.

    Attributes:
        planned: every row with its budget, and what was chosen for it if it is tuned.
        tuned: the trials of each row; empty where nothing is tuned.
        cells: seed by seed, of the rows whose trials are over.
    """

    planned: list[Planned]
    tuned: list[Tuned]
    cells: list[Cell]

    @property
    def trials(self) -> list[Cell]:
        return [trial.cell for tuned in self.tuned for trial in tuned.trials]


def look(study: Study) -> Progress:
    """What the directory of ``study`` says.

    Raises:
        InputError: a row is wrong, or cannot get the budget.
    """
    planned = plan_rows(study, rows_of(study))
    if study.cfg.tune is None:
        return Progress(planned, [], _cells(study, planned))
    tuned = [trials_of(study, one.row, one.asked) for one in planned]
    chosen = [plan_row(study, one.row, one.asked, found.overrides) for one, found in zip(planned, tuned, strict=True)]
    known = [one for one, found in zip(chosen, tuned, strict=True) if found.best is not None]
    return Progress(chosen, tuned, _cells(study, known))


def _cells(study: Study, planned: list[Planned]) -> list[Cell]:
    folder = study.dir / "cells"
    return [
        cell_of(study, one.row, one.job, seed, folder / one.row.name / f"seed-{seed}", f"{one.row.name}/seed-{seed}")
        for seed in study.cfg.seeds
        for one in planned
    ]


def asked_first(study: Study) -> list[list[str]] | None:
    """``study.pairs`` as it was before the first cell was run; None: no cell was run.

    NOTE: pairs that are chosen when the scores are known show differences that are none.
    """
    if not (study.dir / PAIRS).exists():
        return [] if (study.dir / "cells").exists() else None
    return read_object(study.dir / PAIRS).get("pairs")


def run_study(study: Study, jobs: int) -> bool:
    """Runs what is not finished yet: trials, then cells.

    Args:
        jobs: at the same time.

    Returns:
        Whether every cell is finished.

    Raises:
        InputError: the study is wrong, or its directory holds another one.
        CheckpointError: another process runs it.
        Stopped: a signal asked for it.
    """
    cfg = study.cfg
    executor = Here(cfg, jobs) if cfg.slurm is None else Cluster(cfg.slurm, cfg, jobs)
    with RunLock(study.dir):
        tried: set[str] = set()
        while True:
            progress = look(study)
            due = [t.cell for tuned in progress.tuned for t in tuned.trials if not t.is_over and t.cell.name not in tried]
            if not due:
                break
            tried |= {cell.name for cell in due}
            execute(due, cfg.keep, executor)
        if asked_first(study) is None and not (study.dir / "cells").exists():
            write_text(study.dir / PAIRS, json.dumps({"pairs": cfg.pairs}) + "\n")
        execute(progress.cells, cfg.keep, executor)
        wanted = len(progress.planned) * len(cfg.seeds)
        return len(progress.cells) == wanted and all(map(is_finished, progress.cells))
