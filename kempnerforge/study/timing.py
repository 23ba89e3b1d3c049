"""How long a step of a row takes on this machine, for budgets of time."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

from kempnerforge.config import JobConfig, to_toml
from kempnerforge.config.training import CheckpointConfig, EvalConfig, MetricsConfig
from kempnerforge.study.config import StudyConfig
from kempnerforge.study.run import command_of, spawn
from kempnerforge.util.digest import digest
from kempnerforge.util.errors import InputError
from kempnerforge.util.files import write_text
from kempnerforge.util.metrics import read_metrics
from kempnerforge.util.reading import read_object

WARM, TIMED = 5, 20
"""Steps of each stage that are trained and not counted, and those that are."""


def step_seconds(job: JobConfig, cfg: StudyConfig, folder: Path) -> list[float]:
    """Seconds of a step of each stage, the median of a few that are trained as cells are: as many processes
    and threads. Measured once, then read from ``folder``: a study that goes on has the plan it began with.

    Raises:
        InputError: the training fails.
    """
    steps = WARM + TIMED
    short = replace(job, stages=[replace(stage, steps=steps) for stage in job.stages])
    short = replace(
        short,
        train=replace(job.train, max_steps=0 if job.stages else steps, total_samples=0),
        metrics=MetricsConfig(interval=1, tensorboard=False),
        checkpoint=CheckpointConfig(interval=0),
        eval=EvalConfig(at_end=False),
        hooks=[],
    )
    path = folder / f"{digest(to_toml(short), str((cfg.ranks, cfg.threads)))}-seconds.json"
    if not path.is_file():
        write_text(path, json.dumps({"seconds": _time(short, cfg, steps)}) + "\n")
    return [float(value) for value in read_object(path)["seconds"]]


def _time(job: JobConfig, cfg: StudyConfig, steps: int) -> list[float]:
    with tempfile.TemporaryDirectory() as name:
        config, output = Path(name) / "config.toml", Path(name) / "log.txt"
        write_text(config, to_toml(replace(job, run=replace(job.run, dir=f"{name}/run"))))
        command = command_of(config, job, cfg)
        with output.open("wb") as file:
            code = spawn(command.argv, os.environ | command.env, file).wait()
        rows = list(read_metrics(Path(name) / "run" / "metrics.jsonl").rows.values())
        if code or len(rows) < steps:
            lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise InputError(f"quantity = 'wall_clock': {steps} steps could not be timed: {lines[-1] if lines else f'exit code {code}'}")
        taken = [row["train/step_s"] for row in rows]
    return [median(taken[at + WARM : at + steps]) for at in range(0, len(taken), steps)]
