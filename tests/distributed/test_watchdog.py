"""What a rank says when the ranks do not come together any more. ``tests/faults/test_stuck.py`` has it in real jobs."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from kempnerforge.distributed.watchdog import Watchdog, stacks
from tests.dist import run_ranks

ALARMED = """
import os, sys, threading, time
import torch.distributed as dist
from kempnerforge.distributed.watchdog import Watchdog
rank = int(os.environ["RANK"])
store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 3, rank == 0)
watchdog = Watchdog(store, rank, 3, 2)
def waits_here():
    time.sleep(60)
if rank == 0:
    time.sleep(1)
    try:
        raise RuntimeError("Timed out waiting 2000ms for recv operation to complete")
    except RuntimeError as error:
        begin = time.monotonic()
        watchdog.close(error)
        os._exit(7 if time.monotonic() - begin < 4 else 8)
if rank == 1:
    waits_here()
try:
    while store.add("ticks", 1): time.sleep(0.05)
finally:
    os._exit(9)
"""


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))


@pytest.mark.dist
def test_the_stacks_of_all_ranks() -> None:
    """The rank that gave up waits for the others' stacks; they end with 3, whatever they were doing."""
    first, second, third = run_ranks(ALARMED, 3, timeout=60)
    assert [first.returncode, second.returncode, third.returncode] == [7, 3, 3], first.stderr + second.stderr + third.stderr
    assert "[rank 0] RuntimeError: Timed out waiting" in first.stderr
    for rank, result in ((1, second), (2, third)):
        assert result.stderr.startswith(f"[rank {rank}] stacks of rank {rank}, because rank 0 gave up: Timed out waiting 2000ms"), (
            result.stderr
        )
        assert f"[rank {rank}] thread MainThread:" in result.stderr and "thread watchdog" not in result.stderr
    assert "in waits_here" in second.stderr and "in waits_here" not in third.stderr


def test_other_ends_say_nothing(store: dist.Store, capfd: pytest.CaptureFixture[str]) -> None:
    for error in (None, ValueError("lr = nan"), RuntimeError("Connection reset by peer")):
        begin = time.monotonic()
        Watchdog(store, 0, 2, 1).close(error)
        assert time.monotonic() - begin < 1
    assert capfd.readouterr().err == ""
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_a_timeout_that_lies_behind_another_error(store: dist.Store, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        try:
            raise RuntimeError("Timed out waiting")
        except RuntimeError as cause:
            raise OSError("cannot save") from cause
    except OSError as error:
        Watchdog(store, 0, 1, 1).close(error)
    said = capfd.readouterr().err
    assert said.startswith("[rank 0] stacks of rank 0, because rank 0 gave up: Timed out waiting\n") and "cannot save" in said
    assert all(line.startswith("[rank 0] ") for line in said.splitlines())


def test_stacks_of_threads() -> None:
    go = threading.Event()
    thread = threading.Thread(target=go.wait, name="a loader", daemon=True)
    thread.start()
    said, without = stacks(), stacks(but=thread.ident or 0)
    go.set()
    thread.join()
    assert said.startswith("thread MainThread:\n") and "thread a loader:\n" in said and "in test_stacks_of_threads" in said
    assert without.startswith("thread MainThread:\n") and "thread a loader:\n" not in without
