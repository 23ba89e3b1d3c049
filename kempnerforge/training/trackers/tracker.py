"""The contract of a tracker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kempnerforge.config import JobConfig


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
        """At the very end, also after an error."""
