"""Weights & Biases (https://wandb.ai)."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kempnerforge.config import JobConfig, TrackerConfig, registry, to_dict
from kempnerforge.config.checks import one_of
from kempnerforge.training.trackers.tracker import Tracker, kept_id
from kempnerforge.util.errors import InputError


@registry.register_tracker_config
@dataclass
class WandbConfig(TrackerConfig):
    """Weights & Biases; needs the extra ``wandb``.

    Attributes:
        project: that the run is in.
        entity: user or team; empty: the default of the account.
        name: of the run; empty: the name of its directory.
        mode: "online", or "offline": files in ``wandb/`` of the run directory, for ``wandb sync``.
    """

    type: str = "wandb"
    project: str = "kempnerforge"
    entity: str = ""
    name: str = ""
    mode: str = "online"

    def __post_init__(self) -> None:
        one_of(self, "mode", ("online", "offline"))
        if importlib.util.find_spec("wandb") is None:
            raise InputError("type = 'wandb' needs the package wandb: pip install 'kempnerforge[wandb]'")


@registry.register_tracker("wandb")
class Wandb(Tracker):
    """A run that continues is the same one there: its id is kept in ``wandb/id``. Steps that come again are
    left out by W&B.
    """

    def start(self, job: JobConfig, run_dir: Path, step: int) -> None:
        cfg: WandbConfig = self.cfg
        self._wandb: Any = importlib.import_module("wandb")
        self._report = run_dir / "report.html"
        self._run = self._wandb.init(
            project=cfg.project,
            entity=cfg.entity or None,
            name=cfg.name or run_dir.resolve().name,
            id=kept_id(run_dir / "wandb" / "id"),
            resume="allow",
            dir=str(run_dir),
            mode=cfg.mode,
            config=to_dict(job),
            settings=self._wandb.Settings(console="off", silent=True),
        )
        self._run.summary["checkpoints"] = str(run_dir.resolve() / "checkpoints")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self) -> None:
        if self._report.is_file():
            self._run.log({"report": self._wandb.Html(self._report.read_text(encoding="utf-8"), inject=False)})
        self._run.finish()
