"""trackio (https://github.com/gradio-app/trackio): a local dashboard with the interface of W&B."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kempnerforge.config import JobConfig, TrackerConfig, registry, to_dict
from kempnerforge.training.trackers.tracker import Tracker, kept_id
from kempnerforge.util.errors import InputError


@registry.register_tracker_config
@dataclass
class TrackioConfig(TrackerConfig):
    """trackio, in its own directory (``TRACKIO_DIR``), shown by ``trackio show``; needs the package
    ``trackio``.

    Attributes:
        project: that the run is in.
        name: of the run; empty: the name of its directory. A few letters are added to make it unique.
    """

    type: str = "trackio"
    project: str = "kempnerforge"
    name: str = ""

    def __post_init__(self) -> None:
        if importlib.util.find_spec("trackio") is None:
            raise InputError("type = 'trackio' needs the package trackio: pip install 'kempnerforge[trackio]'")


@registry.register_tracker("trackio")
class Trackio(Tracker):
    """A run that continues is the same one there: an id in its name is kept in ``trackio-id``. Steps that
    come again are logged again.
    """

    def start(self, job: JobConfig, run_dir: Path, step: int) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        cfg: TrackioConfig = self.cfg
        name = f"{cfg.name or run_dir.resolve().name}-{kept_id(run_dir / 'trackio-id')[:6]}"
        config = {**to_dict(job), "checkpoints": str(run_dir.resolve() / "checkpoints")}
        with contextlib.redirect_stdout(sys.stderr):  # it greets
            self._run = self._trackio.init(project=cfg.project, name=name, config=config, resume="allow", embed=False)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._trackio.finish()
