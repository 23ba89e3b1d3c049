"""Cells as jobs of SLURM, or of this machine to try that, through submitit
(https://github.com/facebookincubator/submitit).

A job runs what a cell is otherwise run with, in the same directory. Its id is in a file there: a study that
was stopped or killed finds its jobs again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kempnerforge.checkpoint.lock import holder
from kempnerforge.study.cells import Cell
from kempnerforge.study.config import SlurmConfig, StudyConfig
from kempnerforge.study.run import FAILURE, LOOK_S, OUTPUT, SAVED, Begun, Command, command_of, start, state_of, write_failure
from kempnerforge.util.errors import InputError
from kempnerforge.util.files import write_text
from kempnerforge.util.paths import place_of
from kempnerforge.util.reading import read_object

LOG = logging.getLogger("kempnerforge")
RECORD = "job.json"
QUEUE_S = 30.0
"""Seconds between two looks at the queue of SLURM. How a cell has ended is seen earlier, in its directory."""


@dataclass
class Work:
    """What a job does.

    NOTE: submitit sends it to the job as a pickle, so there is nothing in it that a plugin defines.

    Attributes:
        directory: of the cell.
        process: while it runs.
    """

    directory: Path
    command: Command
    process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Runs the cell; writes down a failure, as the study may be gone by then."""
        while holder(self.directory):  # another process runs it
            time.sleep(LOOK_S)
        self.process = process = start(self.directory, self.command)
        signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))  # scancel
        try:
            while (code := process.poll()) is None:
                time.sleep(LOOK_S)
        finally:
            process.terminate()
        if code:
            write_failure(self.directory, code)

    def checkpoint(self) -> Any:
        """Called by submitit when the time of the job is over, or another one has to run first: the cell
        saves and ends. What is returned is queued again.
        """
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            self.process.terminate()
            with suppress(ChildProcessError):  # ``wait`` could wait for a lock of the code that the signal has interrupted
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Work(self.directory, self.command))


class Queue:
    """The jobs of this user that wait or run, as ``squeue`` says. (submitit asks ``sacct``, which not every
    cluster has.)
    """

    def __init__(self) -> None:
        self.asked = -math.inf
        self._ids: set[str] | None = None

    def holds(self, job: str) -> bool:
        """Whether ``job`` is one of them, or SLURM does not answer."""
        if time.monotonic() - self.asked > QUEUE_S:
            self.asked = time.monotonic()
            said = subprocess.run(["squeue", "--me", "--noheader", "--array", "--format=%i"], capture_output=True, text=True)
            self._ids = None if said.returncode else set(said.stdout.split())
            if said.returncode:
                LOG.warning("squeue: %s", said.stderr.strip())
        return self._ids is None or job in self._ids


class Job:
    """A job that was submitted.

    Args:
        job: submitit's.
        queue: of SLURM; None: it runs on this machine.
        earlier: another process has submitted it.
    """

    def __init__(self, job: Any, cell: Cell, queue: Queue | None, earlier: bool = False) -> None:
        self.job, self.cell, self.queue, self.earlier = job, cell, queue, earlier

    def lives(self) -> bool:
        """Whether it waits or runs."""
        if self.queue is not None:
            return self.queue.holds(self.job.job_id)
        if not self.earlier:
            return not self.job.done()
        try:  # submitit knows local jobs of this process alone
            return os.fsencode(self.job.paths.folder) in Path(f"/proc/{self.job.job_id}/cmdline").read_bytes()
        except OSError:
            return False

    def poll(self) -> int | None:
        """The exit code of its cell. A job that was lost has none: 1, and the log says why."""
        lives = self.lives()  # asked first: a job that is over has written what it has to say
        directory = self.cell.dir
        directory.chmod(directory.stat().st_mode)  # NFS then asks for what other machines have written
        state = state_of(self.cell)
        if state.name == "running" or (lives and state.name not in ("finished", "failed")):
            return None
        (directory / RECORD).unlink(missing_ok=True)
        if state.name in ("finished", "failed"):
            return state.code
        errors: Path = self.job.paths.stderr
        lines = errors.read_text(encoding="utf-8", errors="replace").split("\n") if errors.is_file() else []
        with (directory / OUTPUT).open("a", encoding="utf-8") as log:
            why = next((line for line in reversed(lines) if line.strip()), f"it said nothing in {errors}")
            log.write(f"job {self.job.job_id} has ended before its cell: {why}\n")
        return 1

    def terminate(self) -> None:
        """Ends a local job; one of SLURM goes on."""
        if self.queue is None and self.lives():
            os.kill(int(self.job.job_id), signal.SIGINT)

    def wait(self) -> None:
        while self.queue is None and (self.lives() or holder(self.cell.dir)):
            time.sleep(LOOK_S)


class Cluster:
    """Cells as arrays of jobs.

    Args:
        jobs: of an array, at the same time.

    Raises:
        InputError: submitit is not installed, or there is no SLURM.
    """

    def __init__(self, cfg: SlurmConfig, study: StudyConfig, jobs: int) -> None:
        try:
            import submitit
        except ImportError:
            raise InputError("[study.slurm] needs the package submitit: pip install 'kempnerforge[slurm]'") from None
        self.cfg, self.study, self.folder = cfg, study, place_of(study.dir) / "slurm"
        self.room, self.look_s = (jobs, 1.0) if cfg.executor == "local" else (sys.maxsize, 5.0)
        try:
            self._executor = submitit.AutoExecutor(self.folder, cluster=cfg.executor)
        except RuntimeError as error:
            raise InputError(f"[study.slurm] executor = {cfg.executor!r}: {error} 'local' runs the jobs on this machine") from None
        self._executor.update_parameters(**parameters(cfg, study.name, jobs))
        self._kinds: dict[str, Any] = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}
        self._queue = Queue()

    def left(self, cells: Sequence[Cell]) -> list[Begun]:
        jobs = []
        for cell in cells:
            with suppress(OSError, InputError, KeyError):
                record = read_object(cell.dir / RECORD)
                job = self._kinds[record["executor"]](self.folder, str(record["job"]))
                jobs.append(Job(job, cell, self._queue if record["executor"] == "slurm" else None, earlier=True))
        found = [job for job in jobs if job.lives()]
        for job in found:
            LOG.info("%s: waits for job %s, which was submitted before (%s)", job.cell.name, job.job.job_id, job.cell.dir / RECORD)
        return [Begun(job, job.cell, None) for job in found]

    def start(self, cells: Sequence[Cell]) -> Iterator[Begun]:
        for cell in cells:
            (cell.dir / FAILURE).unlink(missing_ok=True)
        try:
            jobs = self._executor.submit_array([Work(cell.dir, command_of(cell.config, cell.job, self.study)) for cell in cells])
        except (RuntimeError, OSError) as error:
            raise InputError(f"[study.slurm]: the jobs could not be submitted: {error}") from None
        for cell, job in zip(cells, jobs, strict=True):
            write_text(cell.dir / RECORD, json.dumps({"executor": self.cfg.executor, "job": job.job_id}) + "\n")
        self._queue.asked = -math.inf
        for cell, job in zip(cells, jobs, strict=True):
            LOG.info("%s: job %s", cell.name, job.job_id)
            yield Begun(Job(job, cell, self._queue if self.cfg.executor == "slurm" else None), cell, None)

    def stopped(self, running: Sequence[Begun]) -> str:
        left = [begun.process.job.job_id for begun in running if isinstance(begun.process, Job) and begun.process.queue]
        if not left:
            return SAVED
        return f"stopped; SLURM goes on with jobs {', '.join(left)}: the same command waits for them, scancel ends them"


def parameters(cfg: SlurmConfig, name: str, jobs: int) -> dict[str, Any]:
    """What submitit is asked for; it leaves out what is None."""
    return {
        "name": name,
        "timeout_min": cfg.time,
        "gpus_per_node": cfg.gpus_per_node or None,
        "cpus_per_task": cfg.cpus_per_task or None,
        "mem_gb": cfg.mem_gb or None,
        "slurm_partition": cfg.partition or None,
        "slurm_account": cfg.account or None,
        "slurm_array_parallelism": jobs,
        "slurm_setup": cfg.setup or None,
        "slurm_srun_args": [f"--cpus-per-task={cfg.cpus_per_task}"] if cfg.cpus_per_task else None,  # srun does not take it from sbatch
        "slurm_additional_parameters": {key.replace("-", "_"): value for key, value in cfg.options.items()} or None,
    }
