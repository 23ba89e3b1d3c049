"""The contract of a tracker."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kempnerforge.config import JobConfig
from kempnerforge.util.files import write_text


class Tracker(ABC):
    """Sends the numbers of a run somewhere. Only rank 0 calls it. Subclasses register with
    ``@registry.register_tracker("name")``.

    Args:
        cfg: its table in ``metrics.trackers``.
    """

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

    def start(self, job: JobConfig, run_dir: Path, step: int) -> None:  # noqa: B027
        """Before the first step of this process.

        Args:
            step: steps that are done. A run that continues from a checkpoint may have logged later ones,
                which come again.
        """

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a line of ``metrics.jsonl``; here they may be NaN."""

    def finish(self) -> None:  # noqa: B027
        """At the very end, also after an error. ``report.html`` is there if the run is complete."""


def kept_id(path: Path, new: str = "") -> str:
    """What the file ``path`` in a run directory holds, so that a run that continues has the same name
    elsewhere.

    Args:
        new: what is written where there is no such file; empty: something that no other run has.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, new or uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8").strip()
