"""``--nproc``: several processes of this command on one machine, with the variables of ``torchrun``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from kempnerforge.util.process import INTERRUPTED, LAUNCHER, STOPS

FAULT = 3
LOOK_S = 0.05
GRACE_S = 30.0
"""Seconds for the other ranks to end after one has failed."""


def launch(argv: Sequence[str], processes: int) -> int:
    """Runs ``python -m kempnerforge ARGV`` in ``processes`` processes, which end when this one does. Signals
    that ask to stop are passed on.

    Args:
        argv: the command line of this process, ``--nproc`` included: it is ignored where ``RANK`` is set.

    Returns:
        0, or the exit code of the first rank that failed; 3, with a message, if the system ended it.

    Raises:
        KeyboardInterrupt: SIGINT has stopped the ranks.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a free port, which this store keeps
    env = {"OMP_NUM_THREADS": "1"} | os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), LAUNCHER: str(os.getpid())}
    env |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    asked: list[int] = []
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in STOPS}
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in map(str, range(processes)):  # in separate sessions: Ctrl-C reaches this process alone
            command = [sys.executable, "-m", "kempnerforge", *argv]
            ranks.append(subprocess.Popen(command, env=env | {"RANK": rank, "LOCAL_RANK": rank}, start_new_session=True))
        code = _wait(ranks, asked)
    finally:
        for process in ranks:
            process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    if code and signal.SIGINT in asked:
        raise KeyboardInterrupt("")  # the ranks have printed the message
    return code


def _wait(ranks: Sequence[subprocess.Popen[bytes]], asked: Sequence[int]) -> int:
    """Waits until all ranks have ended; returns the exit code.

    Args:
        asked: signals to pass on; the list grows meanwhile.
    """
    passed_on, first, deadline = 0, 0, float("inf")
    running = dict(enumerate(ranks))
    while running:
        time.sleep(LOOK_S)
        for number in asked[passed_on:]:
            passed_on += 1
            for process in running.values():
                process.send_signal(number)
        ended = {rank: process.returncode for rank, process in running.items() if process.poll() is not None}
        for rank, code in ended.items():
            del running[rank]
            if code < 0 and not first and not asked:
                _say_what_ended(rank, -code)
        failed = [code if code > 0 else INTERRUPTED if -code in asked else FAULT for code in ended.values() if code]
        if failed and not first:
            first = next((code for code in failed if code != FAULT), FAULT)  # others may fail because of it
            deadline = time.monotonic() + GRACE_S
            for process in running.values():
                process.terminate()
        if time.monotonic() > deadline:
            for process in running.values():
                process.kill()
    return first


def _say_what_ended(rank: int, number: int) -> None:
    likely = "; the system ends processes so when memory runs out" if number == signal.SIGKILL else ""
    print(f"stopped: rank {rank} was ended by {signal.Signals(number).name}{likely}", file=sys.stderr)
