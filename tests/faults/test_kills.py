"""kill -9: in the middle of a step, at every point of a save, at random."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Job, Observe
from tests.faults.ranks import STEPS, Faults, codes, lines, newest

pytestmark = pytest.mark.dist

KILLED, FAULT = -signal.SIGKILL, 3

IN_A_SAVE: list[tuple[tuple[int, ...], str, bool]] = [
    ((0,), "before the tensors", False),
    ((1,), "before the tensors", False),
    ((0,), "behind the tensors", False),
    ((1,), "behind the tensors", False),
    ((0, 1), "behind the tensors", False),
    ((0,), "before the manifest", False),
    ((0,), "before the rename", False),
    ((0,), "behind the rename", True),
    ((0,), "behind latest", True),
    ((0,), "while pruning", True),
]
"""Which ranks die, where, and whether the step is saved by then."""


def killed(job: Job, run: Path, faults: Faults) -> None:
    """A part of a run in which the ranks of ``faults`` are killed. The other one ends by itself, for a restart."""
    with job.ranks(run, "--checkpoint.keep_last_n=3", faults=faults) as ranks:
        ended = ranks.wait(30)
    assert codes(ended) == [KILLED if rank in faults else FAULT for rank in (0, 1)], ranks.err()


def test_at_every_point_of_a_save(job: Job, tmp_path: Path, observe: Observe):
    """One run, killed ten times; what is found afterwards is the step that was complete."""
    run = tmp_path / "run"
    for ranks, where, saved in IN_A_SAVE:
        before = newest(run)
        step = 8 if where == "while pruning" else before + 2
        killed(job, run, {rank: [("kill_in_save", step, where)] for rank in ranks})
        assert newest(run) == (step if saved else step - 2), where
    exact = job.finish(run, "--checkpoint.keep_last_n=3")
    assert not [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith((".", "step-00000002"))]
    points = ", ".join(sorted({where for _, where, _ in IN_A_SAVE}))
    observe(
        f"kill -9 in a save: rank 0, rank 1 or both; {points}",
        f"{len(IN_A_SAVE)} of {len(IN_A_SAVE)} continue at the newest complete step, nothing half is left; the other rank ends with 3",
        exact,
    )


def test_in_a_step_and_around_the_line_of_metrics(job: Job, tmp_path: Path, observe: Observe):
    run = tmp_path / "run"
    for ranks, step in (((0,), 3), ((1,), 7), ((0, 1), 13)):
        killed(job, run, {rank: [("die", step)] for rank in ranks})
        assert newest(run) == step - 1 and lines(run) >= step
    killed(job, run, {0: [("die_behind_the_metrics", 16)]})
    assert newest(run) == 14
    killed(job, run, {0: [("die_behind_the_checkpoint", 20)]})
    assert newest(run) == 20
    exact = job.finish(run, "--checkpoint.keep_last_n=3")
    observe("kill -9 in a step: rank 0, rank 1, both", "continues at the newest checkpoint; the other rank ends with 3", exact)
    observe("killed between a line of metrics.jsonl and its checkpoint, and behind the checkpoint", "no line twice, none missing", exact)


def kill_at_random(job: Job, run: Path, kills: int, rng: random.Random) -> list[str]:
    """Kills ``run`` at ``kills`` random moments, from the start of a process to the final evaluation, then lets it finish.

    Returns:
        What was killed, as "ranks at line n of metrics.jsonl".
    """
    notes = []
    for kill in range(kills):
        victims = rng.choice([(0,), (1,), (0, 1)])
        left = STEPS - newest(run)
        moment = lines(run) + rng.randint(0, max(1, left // (kills - kill)))  # in lines; a few of them are evaluations
        with job.ranks(run, "--checkpoint.keep_last_n=3", "--distributed.timeout_s=20") as ranks:
            ranks.wait_for(lambda moment=moment: lines(run) >= moment or (run / "report.html").exists())
            time.sleep(rng.random() * (0.15 if lines(run) else 2.0))
            for rank in victims:
                ranks.send(rank, signal.SIGKILL)
            ended = ranks.wait(60)
        # the other rank: 3, at once or, where the ranks had not met, after timeout_s; 0 at the very end
        allowed = [{KILLED} if rank in victims else {FAULT, 0} for rank in (0, 1)]
        over = (run / "report.html").exists()
        assert over or all(code in those for code, those in zip(codes(ended), allowed, strict=True)), ranks.err()
        notes.append(f"{victims} at line {lines(run)}, checkpoint {newest(run)}{', too late' if over else ''}")
    job.finish(run, "--checkpoint.keep_last_n=3")
    return notes


def test_at_random(job: Job, tmp_path: Path, observe: Observe):
    notes = kill_at_random(job, tmp_path / "run", 4, random.Random(0))
    hit = sum("too late" not in note for note in notes)
    assert hit >= 3, notes
    observe("kill -9 at random moments, 1 run", f"{hit} kills", True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_at_random(job: Job, tmp_path: Path, observe: Observe, request: pytest.FixtureRequest):
    """``pytest tests/faults/test_kills.py -m slow --kills 60 --kill-runs 15``."""
    kills, runs = (int(request.config.getoption(name, default=n) or n) for name, n in (("--kills", 60), ("--kill-runs", 15)))
    begin, hit, number = time.monotonic(), 0, 0
    while number < runs or hit < kills:
        want = (kills - hit) // max(1, runs - number)
        notes = kill_at_random(job, tmp_path / f"run{number}", want, random.Random(number))
        number, hit = number + 1, hit + sum("too late" not in note for note in notes)
        print(f"run {number}, {time.monotonic() - begin:.0f} s: bitwise equal after", "; ".join(notes), flush=True)
    observe(f"kill -9 at random moments over {number} runs with four stages and dropout", f"{hit} kills", True)
