"""Runs cells as processes of their own. What is known of a cell is what its directory says: a killed study
goes on where it was.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from kempnerforge.checkpoint.lock import holder
from kempnerforge.config import JobConfig, diff
from kempnerforge.study.cells import Cell, write_config
from kempnerforge.study.config import StudyConfig
from kempnerforge.training.complete import NAME as COMPLETE
from kempnerforge.training.complete import WITHOUT_EFFECT
from kempnerforge.util.errors import InputError
from kempnerforge.util.files import write_text
from kempnerforge.util.numbers import format_duration
from kempnerforge.util.process import LAUNCHER, STOPS
from kempnerforge.util.reading import read_object

LOG = logging.getLogger("kempnerforge")
LOOK_S = 0.1
FAILURE, OUTPUT = "failure.json", "log.txt"


class Stopped(Exception):
    """A signal has asked the study to stop; its cells are saved."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass(frozen=True)
class State:
    """Where a cell is.

    Attributes:
        name: "finished", "running", "failed", "started" (and not running) or "waiting".
        why: of a failed one the last line that it wrote; of a running one its pid.
        code: exit code of a failed one; negative: the signal that has ended it.
    """

    name: str
    why: str = ""
    code: int = 0

    @property
    def is_final(self) -> bool:
        """Whether it has failed and would fail again: its config is wrong, or the training has diverged."""
        return self.name == "failed" and self.code in (2, 3)


def state_of(cell: Cell) -> State:
    """What the directory of ``cell`` says."""
    if pid := holder(cell.dir):
        return State("running", f"pid {pid}")
    if is_finished(cell):
        return State("finished")
    try:
        failure = read_object(cell.dir / FAILURE)
        return State("failed", str(failure.get("said")), int(failure.get("code") or 1))
    except (OSError, InputError):
        started = any((cell.dir / name).exists() for name in ("checkpoints", "metrics.jsonl"))
        return State("started" if started else "waiting")


def is_finished(cell: Cell) -> bool:
    """Whether the run is complete and was trained and evaluated as the cell says. Its checkpoints may be
    gone.
    """
    try:
        record = read_object(cell.dir / COMPLETE)
    except (OSError, InputError):
        return False
    config = record.get("config")
    return isinstance(config, dict) and not [line for line in diff(config, cell.job) if not line.startswith(WITHOUT_EFFECT)]


def execute(cells: Sequence[Cell], cfg: StudyConfig, jobs: int) -> None:
    """Runs all of ``cells`` that are not finished, ``jobs`` at a time, in their order. One that fails does
    not stop the others.

    Raises:
        InputError: the directory of a cell holds another one.
        Stopped: a signal asked for it.
    """
    for cell in cells:
        write_config(cell)
    waiting = [cell for cell in cells if not is_finished(cell)]
    for cell in cells:
        if cell not in waiting:
            _tidy(cell, cfg.keep)
    running: dict[subprocess.Popen[bytes], Begun] = {}
    told: set[str] = set()
    with _signals() as asked:
        try:
            while (waiting or running) and not asked:
                for process in [process for process in running if process.poll() is not None]:
                    _ended(running.pop(process), process.returncode, cfg.keep)
                for cell in list(waiting):
                    if len(running) < jobs and _is_free(cell, told):
                        waiting.remove(cell)
                        running[_start(cell, cfg)] = Begun(cell, time.monotonic())
                time.sleep(LOOK_S)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
    if asked:
        raise Stopped(asked[0])


class Begun(NamedTuple):
    """A cell that runs, and since when."""

    cell: Cell
    since: float


def _is_free(cell: Cell, told: set[str]) -> bool:
    """Whether no process runs ``cell``: one of a study that was killed may still save, or somebody runs the
    cell by itself.
    """
    pid = holder(cell.dir)
    if pid and cell.name not in told:
        told.add(cell.name)
        LOG.info("%s: waits for pid %s, which runs it", cell.name, pid)
    return not pid


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that ask this process to stop, as they come."""
    asked: list[int] = []
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in STOPS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(cell: Cell, cfg: StudyConfig) -> subprocess.Popen[bytes]:
    """``kempnerforge train`` on the config of ``cell``. It is asked to stop when this process ends in
    whatever way.
    """
    argv = ["train", str(cell.config), *cell_options(cell.job, cfg)]
    (cell.dir / FAILURE).unlink(missing_ok=True)
    LOG.info("%s: %s", cell.name, "goes on" if (cell.dir / "checkpoints").is_dir() else "starts")
    with (cell.dir / OUTPUT).open("ab") as output:
        return spawn(argv, os.environ | cell_threads(cfg) | {LAUNCHER: str(os.getpid())}, output)


def cell_options(job: JobConfig, cfg: StudyConfig) -> list[str]:
    """Of ``kempnerforge train`` on the config of a cell."""
    options = ["--nproc", str(cfg.ranks)] if cfg.ranks > 1 else []
    return [*options, "--trust-plugins"] if job.plugins else options  # the study's own file names them


def cell_threads(cfg: StudyConfig) -> dict[str, str]:
    """What the environment of a cell says of its threads."""
    return {"OMP_NUM_THREADS": str(cfg.threads)} if cfg.threads else {}


def spawn(argv: Sequence[str], env: Mapping[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    """``kempnerforge ARGV`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "kempnerforge", *argv],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,  # a terminal sends Ctrl-C to the study alone, which hands it on
    )


def _ended(begun: Begun, code: int, keep: str) -> None:
    """Says how a cell has ended, and writes down a failure."""
    cell, seconds = begun.cell, time.monotonic() - begun.since
    if code == 0 and is_finished(cell):
        LOG.info("%s: finished in %s", cell.name, format_duration(seconds))
        _tidy(cell, keep)
        return
    lines = (cell.dir / OUTPUT).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    what = f"ended by {signal.Signals(-code).name}" if code < 0 else lines[-1] if lines else "said nothing"
    write_text(cell.dir / FAILURE, json.dumps({"code": code, "said": what[:500]}) + "\n")
    LOG.warning("%s: failed with exit code %s: %s; see %s", cell.name, code, what[:500], cell.dir / OUTPUT)


def _tidy(cell: Cell, keep: str) -> None:
    """Deletes the checkpoints of a finished cell where none are kept."""
    folder: Path = cell.dir / "checkpoints"
    if keep == "none" and folder.is_dir():
        shutil.rmtree(folder)
