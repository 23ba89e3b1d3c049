"""Starting a few gloo ranks from a test."""

from __future__ import annotations

import importlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests.processes import Forked

ROOT = Path(__file__).resolve().parents[1]


class Result(NamedTuple):
    """How one rank ended; ``returncode`` is negative when a signal ended it (-9: also when it ran past the timeout)."""

    returncode: int
    stdout: str
    stderr: str


def free_port() -> int:
    """A TCP port of this machine that no one listens on."""
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
    env = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    words = list(map(str, args))
    deadline = time.monotonic() + timeout
    processes = [Forked(_run_rank, (target, words), {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)]
    results = []
    for process in processes:
        process.listen()
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
        out, err = process.communicate()
        results.append(Result(process.wait(), out, err))
    return results


def ranks_pass(target: str, world: int, *args: object, timeout: float = 120) -> None:
    """As ``run_ranks``, and fails with what each rank has said that did not end well: the first is seldom the one with the cause."""
    ended = run_ranks(target, world, *args, timeout=timeout)
    said = [f"rank {rank} ended with {one.returncode}:\n{one.stderr[-3000:]}" for rank, one in enumerate(ended) if one.returncode]
    assert not said, "\n\n".join(said)


def _run_rank(target: str, words: list[str]) -> None:
    sys.argv = ["-c", *words]
    if re.fullmatch(r"[\w.]+:\w+", target):
        module, function = target.split(":")
        getattr(importlib.import_module(module), function)(*words)
    else:
        exec(compile(target, "<test>", "exec"), {"__name__": "__main__"})
