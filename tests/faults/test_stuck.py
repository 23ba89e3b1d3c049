"""A rank that hangs, dies or raises."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Job, Observe
from tests.faults.ranks import codes, newest
from tests.params import quick
from tests.training.tiny import spawn

pytestmark = pytest.mark.dist

SHORT = "--distributed.timeout_s=3"


@pytest.mark.slow
def test_a_hung_rank_under_the_launcher(job: Job, tmp_path: Path, observe: Observe):
    run, begin = tmp_path / "run", time.monotonic()
    ended = spawn("train", job.path, "--nproc", 2, f"--run.dir={run}", SHORT, FAULTS='{"1": [["hang", 7]]}')
    seconds = time.monotonic() - begin
    assert ended.code == 3, ended.err
    for rank, frame in ((0, "self.world.sum("), (1, "in train_step"), (1, "time.sleep(1000)")):
        assert re.search(rf"^\[rank {rank}\] .*{re.escape(frame)}", ended.err, re.M), ended.err
    assert "[rank 1] stacks of rank 1, because rank 0 gave up: " in ended.err and "Timed out waiting 3000ms" in ended.err
    assert newest(run) == 6 and seconds < 60
    exact = job.finish(run)
    observe(
        "hung rank (timeout_s = 3), under `--nproc 2`", f"the stacks of both ranks on stderr, exit 3, after {seconds:.0f} s in all", exact
    )


@pytest.mark.slow
def test_the_rank_that_keeps_the_store_hangs(job: Job, tmp_path: Path, observe: Observe):
    run = tmp_path / "run"
    with job.ranks(run, SHORT, faults={0: [("hang", 5)]}) as ranks:
        ended = ranks.wait(60)
    assert codes(ended) == [3, 3], ranks.err()
    assert "because rank 1 gave up: " in ended[0].err and "time.sleep(1000)" in ended[0].err and "self.world.sum(" in ended[1].err
    observe("hung rank 0", "the same, both ranks end by themselves", job.finish(run))


@pytest.mark.slow
def test_a_rank_that_holds_the_interpreter(job: Job, tmp_path: Path, observe: Observe):
    """No thread of it can run; ``faulthandler`` still can."""
    run = tmp_path / "run"
    with job.ranks(run, SHORT, faults={1: [("hang_holding_the_interpreter", 5)]}) as ranks:
        ranks.processes[0].join(60)
        time.sleep(2)
        ranks.send(1, signal.SIGKILL)  # as the launcher does
        ended = ranks.wait()
    assert codes(ended) == [3, -signal.SIGKILL], ranks.err()
    assert re.search(r"Timeout \(.*\)!\n", ended[1].err) and "in train_step" in ended[1].err, ended[1].err
    assert "because rank 0 gave up: " in ended[0].err
    observe(
        "rank that hangs in C code and holds the interpreter",
        "both stacks on stderr; it ends by the launcher's kill, the other with 3",
        job.finish(run),
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", quick([0, 1], 1))
def test_a_rank_that_never_comes(rank: int, job: Job, tmp_path: Path, observe: Observe):
    run = tmp_path / "run"
    with job.ranks(run, SHORT, faults={rank: [("never_come",)]}) as ranks:
        ended = ranks.wait(30)
    assert ended[1 - rank].code == 3 and "Traceback" not in ended[1 - rank].err, ranks.err()
    observe(f"rank {rank} is killed before the ranks have met", "the other ends with 3 when timeout_s has passed")


def test_a_rank_that_dies_or_raises(job: Job, tmp_path: Path, observe: Observe):
    run = tmp_path / "run"
    slowest = 0.0
    for faults, code in (({0: [("leave", 3, 13)]}, [13, 3]), ({1: [("leave", 5, 13)]}, [3, 13])):
        with job.ranks(run, faults=faults) as ranks:
            begin = time.monotonic()
            ended = ranks.wait(60)
            slowest = max(slowest, time.monotonic() - begin)
        assert codes(ended) == code and slowest < 30, ranks.err()
    with job.ranks(run, faults={1: [("raise_in_forward", 7)]}) as ranks:
        ended = ranks.wait(60)
    assert codes(ended) == [3, 1] and "RuntimeError: a broken layer" in ended[1].err, ranks.err()
    exact = job.finish(run)
    observe(
        "dead rank (exit 13): rank 0, rank 1", f"the other ends with 3 by itself, {slowest:.0f} s after the start (timeout_s = 60)", exact
    )
    observe("exception in the forward pass of one rank", "its traceback, exit 1 there, the other ends with 3", exact)
