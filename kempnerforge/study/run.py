"""Runs cells, here as processes of their own. What is known of a cell is what its directory says: a killed
study goes on where it was.
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
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from kempnerforge.checkpoint.lock import holder
from kempnerforge.config import JobConfig, diff
from kempnerforge.study.cells import Cell, write_config
from kempnerforge.study.config import StudyConfig
from kempnerforge.training.batch_size import remembered
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
SAVED = "stopped: the cells are saved; the same command goes on"


class Stopped(Exception):
    """A signal has asked the study to stop.

    Attributes:
        number: of the signal.
        said: what has become of the cells that ran.
    """

    def __init__(self, number: int, said: str) -> None:
        super().__init__(said)
        self.number, self.said = number, said


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
    if not isinstance(config, dict):
        return False
    return not [line for line in diff(config, remembered(cell.job, config)) if not line.startswith(WITHOUT_EFFECT)]


class Process(Protocol):
    """What runs a cell: ``subprocess.Popen``, say."""

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        ...

    def terminate(self) -> None:
        """Asks it to save and end, where it ends with this process."""
        ...

    def wait(self) -> object:
        """Until that is done."""
        ...


class Begun(NamedTuple):
    """A cell that runs, and since when; None: unknown, or it may have waited."""

    process: Process
    cell: Cell
    since: float | None


class Executor(Protocol):
    """Where cells run.

    Attributes:
        room: cells that it takes at the same time.
        look_s: seconds between two looks at them.
    """

    room: int
    look_s: float

    def left(self, cells: Sequence[Cell]) -> list[Begun]:
        """Those that it still runs for a study that was stopped or killed."""
        ...

    def start(self, cells: Sequence[Cell]) -> Iterator[Begun]:
        """Begins them all."""
        ...

    def stopped(self, running: Sequence[Begun]) -> str:
        """What has become of them, after a stop."""
        ...


def execute(cells: Sequence[Cell], keep: str, executor: Executor) -> None:
    """Runs all of ``cells`` that are not finished, in their order. One that fails does not stop the others.

    Args:
        keep: as of ``StudyConfig``.

    Raises:
        InputError: the directory of a cell holds another one.
        Stopped: a signal asked for it.
    """
    for cell in cells:
        write_config(cell)
    waiting = [cell for cell in cells if not is_finished(cell)]
    for cell in cells:
        if cell not in waiting:
            _tidy(cell, keep)
    running = executor.left(waiting)
    waiting = [cell for cell in waiting if all(cell is not begun.cell for begun in running)]
    told: set[str] = set()
    with _signals() as asked:
        try:
            while (waiting or running) and not asked:
                for begun in list(running):
                    if (code := begun.process.poll()) is not None:
                        running.remove(begun)
                        _ended(begun, code, keep)
                free = (cell for cell in waiting if _is_free(cell, told))
                if ready := list(islice(free, max(0, executor.room - len(running)))):
                    waiting = [cell for cell in waiting if cell not in ready]
                    running.extend(executor.start(ready))
                time.sleep(executor.look_s)
        finally:
            for begun in running:
                begun.process.terminate()
            for begun in running:
                begun.process.wait()
    if asked:
        raise Stopped(asked[0], executor.stopped(running))


def _is_free(cell: Cell, told: set[str]) -> bool:
    """Whether no process runs ``cell``: one of a study that was killed may still save, or another command
    runs the cell.
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


class Here:
    """Cells as processes of this machine. When this process ends, killed or not, they save and end.

    Args:
        jobs: at the same time.
    """

    look_s = LOOK_S

    def __init__(self, cfg: StudyConfig, jobs: int) -> None:
        self.cfg, self.room = cfg, jobs

    def left(self, cells: Sequence[Cell]) -> list[Begun]:
        return []

    def start(self, cells: Sequence[Cell]) -> Iterator[Begun]:
        for cell in cells:
            command = command_of(cell.config, cell.job, self.cfg)
            (cell.dir / FAILURE).unlink(missing_ok=True)
            LOG.info("%s: %s", cell.name, "goes on" if (cell.dir / "checkpoints").is_dir() else "starts")
            yield Begun(start(cell.dir, command), cell, time.monotonic())

    def stopped(self, running: Sequence[Begun]) -> str:
        return SAVED


@dataclass(frozen=True)
class Command:
    """``kempnerforge ARGV``, with variables of the environment."""

    argv: list[str]
    env: dict[str, str]


def command_of(config: Path, job: JobConfig, cfg: StudyConfig) -> Command:
    """``kempnerforge train`` on the file ``config`` of ``job``, as a cell."""
    argv = ["train", str(config)]
    argv += ["--nproc", str(cfg.ranks)] if cfg.ranks > 1 else []
    argv += ["--trust-plugins"] if job.plugins else []  # the study's own file names them
    return Command(argv, {"OMP_NUM_THREADS": str(cfg.threads)} if cfg.threads else {})


def start(directory: Path, command: Command) -> subprocess.Popen[bytes]:
    """Starts ``command``, with its output in the log of ``directory``. When this process ends, killed or not,
    it saves and ends.
    """
    with (directory / OUTPUT).open("ab") as output:
        return spawn(command.argv, os.environ | command.env | {LAUNCHER: str(os.getpid())}, output)


def spawn(argv: Sequence[str], env: Mapping[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    """``kempnerforge ARGV`` in a new process."""
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
    cell = begun.cell
    if code == 0 and is_finished(cell):
        took = "" if begun.since is None else f" in {format_duration(time.monotonic() - begun.since)}"
        LOG.info("%s: finished%s", cell.name, took)
        _tidy(cell, keep)
        return
    LOG.warning("%s: failed with exit code %s: %s; see %s", cell.name, code, write_failure(cell.dir, code), cell.dir / OUTPUT)


def write_failure(directory: Path, code: int) -> str:
    """Writes down that the cell in ``directory`` has failed; returns why: what its log says at the end."""
    lines = (directory / OUTPUT).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    what = f"ended by {signal.Signals(-code).name}" if code < 0 else lines[-1][:500] if lines else "said nothing"
    write_text(directory / FAILURE, json.dumps({"code": code, "said": what}) + "\n")
    return what


def _tidy(cell: Cell, keep: str) -> None:
    """Deletes the checkpoints of a finished cell where none are kept."""
    folder: Path = cell.dir / "checkpoints"
    if keep == "none" and folder.is_dir():
        shutil.rmtree(folder)
