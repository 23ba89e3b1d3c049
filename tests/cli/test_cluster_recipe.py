"""``recipes/cluster/train.sbatch`` with made-up ``srun`` and ``scontrol``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.dist import ROOT

SRUN = """#!{python}
import os, signal, subprocess, sys
command = [word for word in sys.argv[1:] if not word.startswith(("--kill-on-bad-exit=0", "--wait", "--cpus-per-task=8"))]
env = {{"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}}
task = subprocess.Popen(command, env={{**os.environ, **env}})
signal.signal(signal.SIGUSR1, lambda *_: task.send_signal(signal.SIGUSR1))
sys.exit(task.wait())
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then printf 'n7\\nn8\\n'; else echo "$@" >> requeued; fi
"""
SQUEUE = """#!/bin/sh
echo $STATE
"""
TRAIN = """#!/bin/sh
echo "$RANK of $WORLD_SIZE, local $LOCAL_RANK, $MASTER_ADDR:$MASTER_PORT: $*" > command
trap 'exit 130' USR1
[ -z "$WAITS" ] || while :; do sleep 0.05; done
exit $CODE
"""


def start(folder: Path, *argv: str, **env: str) -> subprocess.Popen[str]:
    (folder / "bin").mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL), ("squeue", SQUEUE), ("kempnerforge", TRAIN)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "20042",
        "SLURM_JOB_NODELIST": "n[7-8]",
        "SLURM_CPUS_PER_TASK": "8",
        "STATE": "RUNNING",
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
    }
    command = ["bash", str(ROOT / "recipes/cluster/train.sbatch"), *argv]
    return subprocess.Popen(command, cwd=folder, env={**os.environ, **slurm, **env}, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("code", "faults", "requeued", "left"),
    [(0, 2, False, 0), (2, 0, False, 0), (127, 0, False, 0), (130, 9, True, 0), (3, 0, True, 1), (137, 4, True, 5), (3, 5, False, 0)],
)
def test_is_queued_again_by_exit_code(code: int, faults: int, requeued: bool, left: int, tmp_path: Path) -> None:
    """Faults count, not starts, and those in a row."""
    count = tmp_path / "slurm-20042.faults"
    count.write_text("3\n" * faults)
    process = start(tmp_path, "my job.toml", "--run.dir=a b", CODE=str(code), SLURM_RESTART_COUNT="40")
    process.communicate(timeout=30)
    assert process.returncode == code
    assert (tmp_path / "command").read_text() == "1 of 2, local 1, n7:20042: train my job.toml --run.dir=a b\n"
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 20042\n"
    assert len(count.read_text().splitlines() if count.exists() else []) == left


@pytest.mark.parametrize("code", [130, 137])
def test_a_cancelled_job_is_not_queued_again(code: int, tmp_path: Path) -> None:
    """SLURM would queue it again, although it is cancelled."""
    process = start(tmp_path, "job.toml", CODE=str(code), STATE="COMPLETING")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == code and not (tmp_path / "requeued").exists() and "not queued again" in out


def test_waits_for_its_tasks_when_signals_come(tmp_path: Path) -> None:
    process = start(tmp_path, "job.toml", CODE="0", WAITS="1")
    deadline = time.monotonic() + 20
    while not (tmp_path / "command").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # to the script itself
        process.send_signal(number)
        time.sleep(0.2)
    assert process.poll() is None
    srun = next(path for path in Path("/proc").glob("[0-9]*") if f"{tmp_path}/bin/srun" in _command(path))
    os.kill(int(srun.name), signal.SIGUSR1)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and "saved; queued again" in out and (tmp_path / "requeued").exists()


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""
