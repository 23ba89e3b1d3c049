"""kill -9: in the middle of a step, at every point of a save, at random."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from kempnerforge.checkpoint import resolve, verify
from kempnerforge.checkpoint.manifest import METADATA, NAME
from tests.faults.conftest import Job, Observe
from tests.faults.ranks import STEPS, Faults, Ranks, codes, lines, newest
from tests.interop.tiny_vlms import save
from tests.training.tiny import Ended, call, make_job

pytestmark = pytest.mark.dist

KILLED, FAULT = -signal.SIGKILL, 3
LOST = "stopped: the connection to another process of this job is lost"

IN_A_SAVE: list[tuple[tuple[int, ...], str, bool]] = [
    ((0,), "before the tensors", False),
    ((1,), "before the tensors", False),
    ((0,), "after the tensors", False),
    ((1,), "after the tensors", False),
    ((0, 1), "after the tensors", False),
    ((0,), "before the manifest", False),
    ((0,), "before the rename", False),
    ((0,), "after the rename", True),
    ((0,), "after latest", True),
    ((0,), "while pruning", True),
]
"""Which ranks die, where, and whether the step is saved by then."""


IN_A_SAVE_OF_FOUR = [
    ((3,), "before the tensors", False),
    ((1,), "after the tensors", False),
    ((2,), "after the tensors", False),
    ((0,), "before the rename", False),
    ((0,), "after the rename", True),
]


def killed(job: Job, run: Path, faults: Faults, *argv: str) -> None:
    """A part of a run in which the ranks of ``faults`` are killed. The others end by themselves, for a restart, and say why."""
    with job.ranks(run, "--checkpoint.keep_last_n=3", *argv, faults=faults) as ranks:
        for rank in faults:
            ranks.processes[rank].join(60)
        ended = ranks.wait(30)
    assert codes(ended) == [KILLED if rank in faults else FAULT for rank in range(job.world)], ranks.err()
    others_say_why(ended)


def others_say_why(ended: Sequence[Ended]) -> None:
    """Those that end with 3."""
    for one in ended:
        if one.code == FAULT:
            assert one.err.splitlines()[-1].startswith(LOST) and "Traceback" not in one.err, one.err


def killed_in_saves(job: Job, run: Path, points: Sequence[tuple[tuple[int, ...], str, bool]], *argv: str) -> bool:
    """A run that is killed at each of ``points``; what is found afterwards is the step that was complete."""
    for ranks, where, saved in points:
        before = newest(run)
        step = 8 if where == "while pruning" else before + 2
        killed(job, run, {rank: [("kill_in_save", step, where)] for rank in ranks}, *argv)
        assert newest(run) == (step if saved else step - 2), where
    exact = job.finish(run, "--checkpoint.keep_last_n=3", *argv)
    assert not [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith((".", "step-00000002"))]
    return exact


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True])
def test_at_every_point_of_a_save(in_background: bool, job: Job, tmp_path: Path, observe: Observe):
    exact = killed_in_saves(job, tmp_path / "run", IN_A_SAVE, f"--checkpoint.in_background={str(in_background).lower()}")
    points = ", ".join(sorted({where for _, where, _ in IN_A_SAVE}))
    observe(
        f"kill -9 in a save{' in the background' * in_background}: rank 0, rank 1 or both; {points}",
        f"{len(IN_A_SAVE)} of {len(IN_A_SAVE)} continue at the newest complete step, nothing half is left; the other rank ends with 3",
        exact,
    )


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True])
def test_one_of_four_that_share_layers_and_rows(in_background: bool, shared_job: Job, tmp_path: Path, observe: Observe):
    """In a step, each rank once, then in saves."""
    run, background = tmp_path / "run", f"--checkpoint.in_background={str(in_background).lower()}"
    for rank in range(4):
        killed(shared_job, run, {rank: [("die", rank + 3)]}, background)
    assert newest(run) in (4, 6) if in_background else newest(run) == 6
    exact = killed_in_saves(shared_job, run, IN_A_SAVE_OF_FOUR, background)
    fault = f"kill -9 of one of four ranks that share layers and rows, in a step and in a save{' in the background' * in_background}"
    observe(fault, "the others end with 3 and say that they have lost a process; continues at the newest complete step", exact)


@pytest.mark.slow
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
    observe("killed between a line of metrics.jsonl and its checkpoint, and after the checkpoint", "no line twice, none missing", exact)


def kill_at_random(job: Job, run: Path, kills: int, rng: random.Random, *argv: str, fresh: float = 0.0) -> list[str]:
    """Kills ``run`` at ``kills`` random moments, from the start of a process to the final evaluation, then lets it finish.

    Args:
        fresh: how often the command that is killed says ``--fresh``.

    Returns:
        What was killed, as "ranks at line n of metrics.jsonl".
    """
    notes = []
    for kill in range(kills):
        victims = rng.choice([(0,), (1,), (0, 1)] if job.world == 2 else [(rank,) for rank in range(job.world)])
        left = STEPS - newest(run)
        moment = lines(run) + rng.randint(0, max(1, left // (kills - kill)))  # in lines; a few of them are evaluations
        anew = ["--fresh"] if rng.random() < fresh else []
        with job.ranks(run, "--checkpoint.keep_last_n=3", "--distributed.timeout_s=20", *argv, *anew) as ranks:
            ranks.wait_for(lambda moment=moment, anew=anew: bool(anew) or lines(run) >= moment or (run / "report.html").exists())
            time.sleep(rng.random() * (0.15 if lines(run) else 2.0))
            for rank in victims:
                ranks.send(rank, signal.SIGKILL)
            ended = ranks.wait(60)
        # the others: 3, at once or, where the ranks had not met, after timeout_s; 0 at the very end
        allowed = [{KILLED} if rank in victims else {FAULT, 0} for rank in range(job.world)]
        over = (run / "report.html").exists()
        assert over or all(code in those for code, those in zip(codes(ended), allowed, strict=True)), ranks.err()
        notes.append(f"{victims} at line {lines(run)}, checkpoint {newest(run)}{', too late' if over else ''}")
    job.finish(run, "--checkpoint.keep_last_n=3", *argv)
    return notes


@pytest.mark.slow
@pytest.mark.parametrize("which", ["job", "shared_job"])
def test_at_random(which: str, tmp_path: Path, observe: Observe, request: pytest.FixtureRequest):
    job: Job = request.getfixturevalue(which)
    notes = kill_at_random(job, tmp_path / "run", 4, random.Random(0))
    hit = sum("too late" not in note for note in notes)
    assert hit >= 3, notes
    observe(f"kill -9 at random moments, 1 run by {job.world} ranks {' '.join(job.argv)}", f"{hit} kills", True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_at_random(job: Job, tmp_path: Path, observe: Observe, request: pytest.FixtureRequest):
    """``pytest tests/faults/test_kills.py -m slow --kills 60 --kill-runs 15``."""
    kills, runs = (int(request.config.getoption(name, default=n) or n) for name, n in (("--kills", 60), ("--kill-runs", 15)))
    begin, hit, number = time.monotonic(), 0, 0
    while number < runs or hit < kills:
        want, run = (kills - hit) // max(1, runs - number), tmp_path / f"run{number}"
        caches = (f"--data.images.cache_dir={run}.images",) if number % 3 == 1 else ()
        notes = kill_at_random(job, run, want, random.Random(number), *caches, fresh=0.5 if number % 3 == 2 else 0.0)
        number, hit = number + 1, hit + sum("too late" not in note for note in notes)
        print(f"run {number}, {time.monotonic() - begin:.0f} s: bitwise equal after", "; ".join(notes), flush=True)
    observe(
        f"kill -9 at random moments over {number} runs with four stages and dropout, a third of them with an image cache, a third"
        " with --fresh half of the time",
        f"{hit} kills",
        True,
    )


def files(folder: Path) -> dict[str, bytes]:
    """But for those of a checkpoint that have a random id or the checksum of one, with which it is verified."""
    if (folder / "checkpoints").is_dir():
        verify(resolve(folder))
    found = [path for path in folder.rglob("*") if path.is_file() and path.name not in (METADATA, NAME)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", ["export", "import"])
def test_a_conversion_at_random(command: str, tmp_path: Path, observe: Observe, request: pytest.FixtureRequest):
    """Half of ``--kills`` in both together: the directory is not there, or is whole, and the next command makes it."""
    kills, out, rng = int(request.config.getoption("--kills", default=60) or 60) // 4, tmp_path / "out", random.Random(command)
    if command == "import":
        save("llava", tmp_path / "theirs")
        argv = ("import", tmp_path / "theirs", out)
    else:
        assert call("train", make_job(tmp_path), "--train.max_steps=1", "--eval.at_end=false").code == 0
        argv = ("export", tmp_path / "run", out, "--format=kempnerforge")

    def convert(seconds: float | None) -> float:
        begin = time.monotonic()
        with Ranks(tmp_path / "logs", *argv, world=1) as ranks:
            if seconds is not None:
                time.sleep(seconds)
                with suppress(ProcessLookupError):  # it was sooner
                    ranks.send(0, signal.SIGKILL)
            (ended,) = ranks.wait()
        assert ended.code in ((0, KILLED) if seconds is not None else (0,)), ranks.err()
        return time.monotonic() - begin

    convert(None)
    whole, hit = files(out), 0
    shutil.rmtree(out)
    took = convert(None)  # the first one reads more from the disk
    shutil.rmtree(out)
    for _ in range(kills):
        convert(rng.random() * took)
        assert not out.exists() or files(out) == whole
        hit += not out.exists()
        if out.exists():
            shutil.rmtree(out)
    convert(None)
    assert files(out) == whole and not list(tmp_path.glob(".out.part-*"))
    observe(f"kill -9 at random moments of an {command}", f"{hit} kills leave no directory; the next {command} makes it", "the same files")
