"""Starting a few gloo ranks from a test."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Result(NamedTuple):
    """How one rank ended; ``returncode`` is negative when a signal ended it (-9: also when it ran past the timeout)."""

    returncode: int
    stdout: str
    stderr: str


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(target: str, world: int, *args: object, timeout: float = 120) -> list[Result]:
    """Runs ``target`` in ``world`` new processes with the environment that ``torchrun`` gives, and waits for them. Asserts nothing.

    Args:
        target: "package.module:function", called with ``args`` as strings, or Python source, which finds them in ``sys.argv[1:]``.
            It initialises the process group itself; ending with ``os._exit(0)`` avoids gloo's aborts at interpreter exit.
        world: number of ranks.
        timeout: seconds for all of them together; those still running are killed.

    Returns:
        One result per rank.
    """
    if re.fullmatch(r"[\w.]+:\w+", target):
        module, function = target.split(":")
        source = f"import importlib, sys; importlib.import_module({module!r}).{function}(*sys.argv[1:])"
    else:
        source = target
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])  # a plugin is found as it is here
    env = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", source, *map(str, args)]
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        logs = [(Path(folder) / f"{rank}.out", Path(folder) / f"{rank}.err") for rank in range(world)]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank, (out, err) in enumerate(logs):
                rank_env = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                with out.open("wb") as stdout, err.open("wb") as stderr:
                    processes.append(subprocess.Popen(command, env=rank_env, cwd=ROOT, stdout=stdout, stderr=stderr))
            for process in processes:
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        return [
            Result(p.returncode, o.read_text(errors="replace"), e.read_text(errors="replace"))
            for p, (o, e) in zip(processes, logs, strict=True)
        ]
