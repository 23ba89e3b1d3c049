from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kempnerforge.checkpoint import CheckpointError, RunLock
from tests.dist import ROOT, run_ranks

TRY = "import sys; from pathlib import Path; from kempnerforge.checkpoint.lock import RunLock; RunLock(Path(sys.argv[1]))"
HOLD_AND_FORK = TRY + "; import os, time; p = os.fork(); print(p, flush=True) if p else None; time.sleep(60)"


def test_second_process_is_refused_and_told_who(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with RunLock(run):
        (second,) = run_ranks(TRY, 1, run)
        assert second.returncode != 0
        assert f"{run} is in use by another job (pid {os.getpid()})" in second.stderr
    RunLock(run).release()


def test_released_at_the_end_of_with_and_only_once(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        with pytest.raises(CheckpointError, match="in use"):
            RunLock(tmp_path)
        lock.release()
        second = RunLock(tmp_path)
    with pytest.raises(CheckpointError, match="in use"):
        RunLock(tmp_path)
    second.release()
    RunLock(tmp_path).release()


def test_dies_with_its_process_even_when_a_forked_child_lives_on(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD_AND_FORK, tmp_path], stdout=subprocess.PIPE, cwd=ROOT)
    child = 0
    try:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        with pytest.raises(CheckpointError, match=f"pid {holder.pid}"):
            RunLock(tmp_path)
        holder.kill()
        holder.wait()
        os.kill(child, 0)
        time.sleep(0.05)
        RunLock(tmp_path).release()
    finally:
        holder.kill()
        holder.wait()
        if child:
            os.kill(child, signal.SIGKILL)
