"""A terminal, a pipe or a log file that takes no more lines does not stop training."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kempnerforge.checkpoint import resolve
from tests.training.tiny import environment, losses, make_job

STEPS = 30


def begin(folder: Path, name: str, **streams: int) -> subprocess.Popen[bytes]:
    options = f"--run.dir={folder}/{name}", f"--train.max_steps={STEPS}", "--checkpoint.interval=10", "--eval.at_end=false"
    command = [sys.executable, "-m", "kempnerforge", "train", str(folder / "job.toml"), *options]
    if not streams:  # closed; a file that is opened next would have the number of one of them
        command = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", *command]
    return subprocess.Popen(command, env=environment(), start_new_session=True, **streams)


@pytest.mark.slow
def test_nothing_reads_it(tmp_path: Path) -> None:
    """A full disk; a pipe without a reader, as after ``| head``; streams that are closed; a terminal that is gone, with a progress bar on it."""
    make_job(tmp_path)
    full = os.open("/dev/full", os.O_WRONLY)
    read, pipe = os.pipe()
    terminal, screen = pty.openpty()
    runs = {
        "full": begin(tmp_path, "full", stdout=full, stderr=full),
        "pipe": begin(tmp_path, "pipe", stdout=pipe, stderr=pipe),
        "closed": begin(tmp_path, "closed"),
        "screen": begin(tmp_path, "screen", stdin=screen, stdout=screen, stderr=screen),
    }
    os.close(read)
    os.close(screen)
    deadline = time.monotonic() + 120
    while not (tmp_path / "screen" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.close(terminal)
    codes = {name: process.wait(120) for name, process in runs.items()}
    os.close(full)
    os.close(pipe)
    assert codes == dict.fromkeys(runs, 0)
    for name in runs:
        assert len(losses(tmp_path / name)) == STEPS and (tmp_path / name / "report.html").exists(), name
        assert resolve(tmp_path / name).name == f"step-{STEPS:08d}"
        written = [path for path in (tmp_path / name).rglob("*") if path.suffix in (".jsonl", ".toml") and b"tokens/s" in path.read_bytes()]
        assert not written, "messages went into a file of the run"
