"""MLflow (https://mlflow.org)."""

from __future__ import annotations

import importlib
import importlib.util
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kempnerforge.config import JobConfig, TrackerConfig, registry, to_dict
from kempnerforge.training.trackers.tracker import Tracker, kept_id
from kempnerforge.util.errors import InputError

LONGEST = 500
"""Characters of a parameter."""


@registry.register_tracker_config
@dataclass
class MLflowConfig(TrackerConfig):
    """MLflow; needs the extra ``mlflow``.

    Attributes:
        uri: of the tracking server or database; empty: ``mlflow.db`` in the run directory.
        experiment: that the run is in.
        name: of the run; empty: the name of its directory.
    """

    type: str = "mlflow"
    uri: str = ""
    experiment: str = "kempnerforge"
    name: str = ""

    def __post_init__(self) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise InputError("type = 'mlflow' needs the package mlflow: pip install 'kempnerforge[mlflow]'")


@registry.register_tracker("mlflow")
class MLflow(Tracker):
    """A run that continues is the same one there: its id is kept in ``mlflow-id``. Steps that come again are
    logged again.
    """

    def start(self, job: JobConfig, run_dir: Path, step: int) -> None:
        mlflow: Any = importlib.import_module("mlflow")
        cfg: MLflowConfig = self.cfg
        run_dir = run_dir.resolve()
        self._report = run_dir / "report.html"
        self._entities, self._client = mlflow.entities, mlflow.MlflowClient(cfg.uri or f"sqlite:///{run_dir / 'mlflow.db'}")
        found = self._client.get_experiment_by_name(cfg.experiment)
        where = None if cfg.uri else (run_dir / "mlflow").as_uri()  # of files
        experiment = found.experiment_id if found else self._client.create_experiment(cfg.experiment, where)
        file = run_dir / "mlflow-id"
        new = "" if file.is_file() else self._client.create_run(experiment, run_name=cfg.name or run_dir.name).info.run_id
        self._id = kept_id(file, new)
        if new:
            params = [self._entities.Param(key, value[:LONGEST]) for key, value in flat(to_dict(job)) if value]
            for begin in range(0, len(params), 100):  # as many as a server takes
                self._client.log_batch(self._id, params=params[begin : begin + 100])
        self._client.update_run(self._id, status="RUNNING")
        self._client.set_tag(self._id, "checkpoints", str(run_dir / "checkpoints"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(re.sub(r"[^\w\-. :/]", "_", key), value, now, step) for key, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self) -> None:
        complete = self._report.is_file()
        if complete:
            self._client.log_artifact(self._id, str(self._report))
        self._client.set_terminated(self._id, "FINISHED" if complete else "KILLED")


def flat(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """The values of nested tables as texts, by their keys with dots between."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", str(value)
