"""Signals to a whole process group, data workers included, and processes that leave no others behind."""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.training.tiny import checkpoint_steps, environment, losses, make_job

OPTIONS = ("--data.num_workers=2", "--train.max_steps=5000", "--checkpoint.interval=0", "--eval.at_end=false")


def begun(argv: Sequence[str], run: Path) -> subprocess.Popen[str]:
    """``argv`` in a process group of its own, a few steps into the run."""
    path = run / "metrics.jsonl"
    steps = lambda: path.read_text().count('"train/loss"') if path.exists() else 0  # of a line that is being written, too
    done = steps()
    process = subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert wait_until(lambda: steps() >= done + 3 or process.poll() is not None) and process.poll() is None, process.communicate()
    return process


def wait_until(true: Callable[[], bool], seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while not (there := true()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return there


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pids: list[int]) -> bool:
    """Whether none of these runs any more."""
    stats = [Path(f"/proc/{pid}/stat") for pid in pids]
    return all(not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX" for stat in stats)


@pytest.mark.slow
def test_a_group_is_asked_to_stop_then_a_worker_and_then_the_run_are_killed(tmp_path: Path) -> None:
    """As ``timeout`` sends it: to the command, and to all of the group. As a terminal that closes does."""
    run = tmp_path / "run"
    argv = [sys.executable, "-m", "kempnerforge", "train", str(make_job(tmp_path)), *OPTIONS]
    process = begun(["timeout", "1000", *argv], run)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err and checkpoint_steps(run) == [len(losses(run))], err
    assert err.splitlines()[-1] == f"interrupted: step {len(losses(run))} is saved; the same command continues"

    process = begun(argv, run)
    os.killpg(process.pid, signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and checkpoint_steps(run)[-1] == len(losses(run)), err

    process = begun(argv, run)
    worker, other = children(process.pid)
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3 and "stopped: data worker " in err and "memory" in err and "Traceback" not in err, err
    assert wait_until(lambda: gone([other]), 3), "the other worker outlives the run"

    process = begun(argv, run)
    workers = children(process.pid)
    process.kill()
    process.communicate(timeout=60)
    assert len(workers) == 2 and wait_until(lambda: gone(workers), 3), "workers outlive the run"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(40))
def test_forty_signals_to_the_group(seed: int, tmp_path: Path) -> None:
    run, chance = tmp_path / "run", random.Random(seed)
    options = f"--data.num_workers={chance.choice((1, 2, 3))}", "--train.max_steps=5000", "--eval.at_end=false"
    every = f"--checkpoint.interval={chance.choice((0, 1, 7))}"
    process = begun([sys.executable, "-m", "kempnerforge", "train", str(make_job(tmp_path)), *options, every], run)
    workers = children(process.pid)
    time.sleep(chance.random())
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and checkpoint_steps(run)[-1] == len(losses(run)), err
    assert wait_until(lambda: gone(workers), 3)


def test_ctrl_c_ends_a_loop_of_the_shell(tmp_path: Path) -> None:
    """The terminal sends it to all of the group; the shell goes on unless the command *died* of it."""
    run = tmp_path / "run"
    command = shlex.join([sys.executable, "-m", "kempnerforge", "train", str(make_job(tmp_path)), *OPTIONS])
    shell = begun(["bash", "-c", f"for k in 1 2; do {command}; done; echo the loop went on"], run)
    os.killpg(shell.pid, signal.SIGINT)
    out, err = shell.communicate(timeout=60)
    assert shell.returncode == -signal.SIGINT and not out and "Traceback" not in err, (out, err)
    assert checkpoint_steps(run) == [len(losses(run))]


@pytest.mark.slow
def test_a_killed_rank_is_said_and_ranks_end_with_their_launcher(tmp_path: Path) -> None:
    """And a launcher that is asked to stop has its ranks save."""
    run = tmp_path / "run"
    argv = [sys.executable, "-m", "kempnerforge", "train", str(make_job(tmp_path)), "--nproc=2", *OPTIONS]
    process = begun(argv, run)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3 and "stopped: rank 1 was ended by SIGKILL; the system ends processes so when memory runs out" in err, err

    process = begun(argv, run)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.count("is saved") == 1 and "Traceback" not in err, err
    assert checkpoint_steps(run) == [len(losses(run))]

    process = begun(argv, run)
    ranks = children(process.pid)
    workers = [pid for rank in ranks for pid in children(rank)]
    process.kill()
    _, err = process.communicate(timeout=60)
    assert len(ranks) == 2 and len(workers) == 4 and wait_until(lambda: gone(ranks + workers), 20), "ranks outlive their launcher"
    assert checkpoint_steps(run)[-1] == len(losses(run)) and "Traceback" not in err, err
