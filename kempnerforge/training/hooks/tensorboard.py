"""TensorBoard event files with the same numbers as ``metrics.jsonl``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kempnerforge.training.trainer import Hook, Trainer

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


class TensorBoard(Hook):
    """Writes to ``directory``; TensorBoard is imported only here."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._writer: SummaryWriter | None = None

    def start(self, trainer: Trainer) -> None:
        if trainer.world.is_main:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writer = SummaryWriter(str(self.directory), purge_step=trainer.step + 1)

    def record(self, trainer: Trainer, values: dict[str, float]) -> None:
        if self._writer is not None:
            for key, value in values.items():
                self._writer.add_scalar(key, value, trainer.step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
