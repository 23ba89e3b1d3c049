"""SIGTERM and SIGINT: finish the step, save, leave. A second SIGINT leaves at once."""

from __future__ import annotations

import os
import signal
from types import FrameType

from kempnerforge.training.trainer import Hook, Trainer

asked_by: set[int] = set()
"""The signals that have asked this process to stop."""


class Signals(Hook):
    """Asks the trainer to stop. The ranks vote at the end of each step, so that all of them stop at the same one.

    Args:
        leaving: the process ends with this run. When it has been asked to stop, its handlers stay then: a signal that reaches this rank late
            must not change its exit code.
    """

    def __init__(self, leaving: bool = False) -> None:
        self.leaving = leaving
        self._before: dict[int, object] = {}
        self._trainer: Trainer | None = None

    def start(self, trainer: Trainer) -> None:
        self._trainer = trainer
        asked_by.clear()

        def ask(number: int, frame: FrameType | None) -> None:
            if trainer.stop_requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            trainer.stop_requested = True
            asked_by.add(number)
            # past Python's buffers: a handler that finds one half written would raise
            os.write(2, f"{signal.Signals(number).name}: stopping after this step; the run can be continued\n".encode())

        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, ask)

    def close(self) -> None:
        if self.leaving and self._trainer is not None and self._trainer.stopping:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._before.clear()
