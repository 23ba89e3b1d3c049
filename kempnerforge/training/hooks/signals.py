"""Signals that ask a run to stop: finish the step, or break an evaluation off; save; leave. A second SIGINT: leave at once."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

from kempnerforge.checkpoint.store import newest_step
from kempnerforge.training.trainer import Hook, Trainer
from kempnerforge.util.process import STOPS, die_of_interrupt, say

asked_by: set[int] = set()
"""The signals that have asked this process to stop."""


class Signals(Hook):
    """Asks the trainer to stop. The ranks vote in each step and at each token of an evaluation, so that all of them stop
    at the same place, whichever the signal has reached. The report after the last evaluation is finished.

    A second SIGINT ends a process that ``leaving`` says is this run's from within the handler: an exception in the middle of a save would come
    out as a damaged checkpoint. What is half written then is what a kill leaves, and is not taken for a checkpoint.

    Args:
        leaving: the process ends with this run. When it has been asked to stop, its handlers stay then: a signal that reaches this rank late
            must not change its exit code.
    """

    def __init__(self, run_dir: Path, leaving: bool = False) -> None:
        self.run_dir, self.leaving = run_dir, leaving
        self._before: dict[int, object] = {}
        self._trainer: Trainer | None = None

    def start(self, trainer: Trainer) -> None:
        self._trainer = trainer
        asked_by.clear()

        def ask(number: int, frame: FrameType | None) -> None:
            again = trainer.stop_requested and number == signal.SIGINT
            trainer.stop_requested = True
            asked_by.add(number)
            name = signal.Signals(number).name
            if again and self.leaving:
                say(f"{name} again: left at once, without saving; {self._newest()}")
                die_of_interrupt()
            if again:
                raise KeyboardInterrupt
            say(f"{name}: saving, then stopping; the run can be continued")

        for number in STOPS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup: it goes on without its terminal
                self._before[number] = signal.signal(number, ask)

    def _newest(self) -> str:
        step = newest_step(self.run_dir / "checkpoints")
        return f"the same command continues at step {step}" if step is not None else "there is no checkpoint yet"

    def close(self) -> None:
        if self.leaving and self._trainer is not None and self._trainer.stopping:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._before.clear()
