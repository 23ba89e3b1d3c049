"""SIGTERM and SIGINT that do not reach both ranks at the same time, or come twice, or during a save."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.conftest import Job, Observe
from tests.faults.ranks import STEPS, Faults, codes, last_line, newest
from tests.params import quick
from tests.training.tiny import metrics

pytestmark = pytest.mark.dist

TERM, INT = signal.SIGTERM, signal.SIGINT


def interrupted(job: Job, run: Path, faults: Faults) -> tuple[int, str]:
    """Both ranks end with 130 at one step, which is saved. Returns it, and what rank 0 said."""
    with job.ranks(run, faults=faults) as ranks:
        ended = ranks.wait()
    assert codes(ended) == [130, 130], ranks.err()
    assert newest(run) == last_line(run) and "Traceback" not in ended[0].err + ended[1].err, ranks.err()
    assert ended[0].err.splitlines()[-1] == f"interrupted: step {newest(run)} is saved; the same command continues"
    assert "is saved" not in ended[1].err
    return newest(run), ended[0].err


@pytest.mark.slow
def test_skew(job: Job, tmp_path: Path, observe: Observe):
    run, found = tmp_path / "run", []
    for first, skew_ms in ((0, 0), (1, 30), (0, 100), (1, 100)):
        step = newest(run) + 1
        faults = {first: [("signals", step, TERM)], 1 - first: [("signal_later", step, TERM, skew_ms / 1000)]}
        done, _ = interrupted(job, run, faults)
        assert done == step + 1
        found.append(f"{skew_ms} ms: step {done}")
    observe(
        "SIGTERM to both ranks, 0 to 100 ms apart",
        f"the step is finished and saved once, by both, exit 130 ({'; '.join(found)})",
        job.finish(run),
    )


@pytest.mark.slow
def test_one_rank_alone_and_both_kinds(job: Job, tmp_path: Path, observe: Observe):
    run = tmp_path / "run"
    assert interrupted(job, run, {1: [("signals", 3, TERM)]})[0] == 4
    assert interrupted(job, run, {0: [("signals", 5, INT)]})[0] == 6
    assert interrupted(job, run, {0: [("signals", 7, TERM, TERM)], 1: [("signals", 7, TERM, TERM)]})[0] == 8
    done, _ = interrupted(job, run, {rank: [("signal_in_save", 10, TERM)] for rank in (0, 1)})
    assert done == 11
    assert interrupted(job, run, {0: [("signals", 12, TERM)], 1: [("signal_behind_the_run", TERM)]})[0] == 13
    exact = job.finish(run)
    observe("SIGTERM to one rank alone; SIGINT; SIGTERM twice", "both finish the step and save it, exit 130", exact)
    observe("SIGTERM during a save", "the save is finished; the run stops one step later, saved, exit 130", exact)
    observe("SIGTERM to one rank, to the other when all is saved", "saved, exit 130 on both", exact)


def test_what_batch_systems_and_terminals_send(job: Job, tmp_path: Path, observe: Observe):
    run = tmp_path / "run"
    for step, number in ((3, signal.SIGUSR1), (5, signal.SIGUSR2), (7, signal.SIGHUP)):
        assert interrupted(job, run, {rank: [("signals", step, number)] for rank in (0, 1)})[0] == step + 1
    observe("SIGUSR1, SIGUSR2, SIGHUP", "as SIGTERM: the step is finished and saved, exit 130", job.finish(run))


@pytest.mark.parametrize("where", quick(["signals", "signal_in_save"]))
def test_a_second_interrupt(where: str, job: Job, tmp_path: Path, observe: Observe):
    """Leaves at once: in a step, and in the middle of a save, which is then as a kill leaves it."""
    run = tmp_path / "run"
    with job.ranks(run, faults={rank: [(where, 8, INT, INT)] for rank in (0, 1)}) as ranks:
        ended = ranks.wait()
    assert set(codes(ended)) <= {130, 3} and 130 in codes(ended), ranks.err()
    last = "SIGINT again: left at once, without saving; the same command continues at step "
    assert any(one.err.splitlines()[-1].startswith(last) for one in ended) and "Traceback" not in ended[0].err + ended[1].err, ranks.err()
    saved = newest(run)
    assert saved == (8 if where == "signals" else 6)
    place = {"signals": "a step", "signal_in_save": "a save"}[where]
    observe(
        f"a second SIGINT in {place}",
        f"a plain line, without saving, exit codes {codes(ended)}; continues at step {saved}",
        job.finish(run),
    )


@pytest.mark.slow
def test_one_rank_alone_in_a_save(job: Job, tmp_path: Path, observe: Observe):
    run = tmp_path / "run"
    assert interrupted(job, run, {1: [("signal_in_save", 4, TERM)]})[0] == 5
    assert interrupted(job, run, {0: [("signal_in_save", 8, TERM)]})[0] == 9
    done, _ = interrupted(job, run, {1: [("signal_in_save", STEPS, TERM)]})
    assert done == STEPS and "eval/exact_match" not in metrics(run)[-1]
    observe("SIGTERM to one rank alone in a save, in the last one too", "the save is whole; both exit 130", job.finish(run))


@pytest.mark.slow
@pytest.mark.parametrize("number", quick([TERM, INT], INT))
def test_in_an_evaluation(number: signal.Signals, job: Job, tmp_path: Path, observe: Observe):
    """Of step 6, of step 12, and that one again as it is repeated: broken off at a token, saved, made on resume."""
    run = tmp_path / "run"
    evaluated = lambda: [row["step"] for row in metrics(run) if "eval/exact_match" in row]
    for step, faults in ((6, {1: [("signal_in_evaluation", 6, number, 2)]}), (12, {0: [("signal_in_evaluation", 12, number, 1)]})):
        assert interrupted(job, run, faults)[0] == step
        assert step not in evaluated()
    assert evaluated() == [6]
    assert interrupted(job, run, {1: [("signal_in_evaluation", 12, number, 2)]})[0] == 12
    assert evaluated() == [6]
    with job.ranks(run, faults={0: [("die_behind_the_checkpoint", 12)]}) as ranks:  # the evaluation is made, and not yet in a checkpoint
        ranks.wait()
    assert evaluated() == [6, 12]
    observe(
        f"{number.name} to one rank in an evaluation between steps", "it is broken off; saved, exit 130; it is made again", job.finish(run)
    )


@pytest.mark.slow
def test_behind_the_last_step(job: Job, tmp_path: Path, observe: Observe):
    """In the last save, then in the last evaluation, of both ranks and of one: all is saved by then, and what was left
    out is done by the same command. While the report is written it is finished.
    """
    run = tmp_path / "run"
    done, _ = interrupted(job, run, {rank: [("signal_in_save", STEPS, TERM)] for rank in (0, 1)})
    assert done == STEPS and "eval/exact_match" not in metrics(run)[-1]
    for ranks in ((0, 1), (0,), (1,)):
        assert interrupted(job, run, {rank: [("signal_in_evaluation", STEPS, TERM, 2)] for rank in ranks})[0] == STEPS
        assert not (run / "report.html").exists() and "eval/exact_match" not in metrics(run)[-1]
    exact = job.finish(run)
    assert (run / "report.html").exists()
    observe("SIGTERM in the last save, in the last evaluation, to both ranks or one", "exit 130 at once; the same command makes it", exact)
    (run / "report.html").unlink()
    with job.ranks(run, faults={0: [("signal_in_report", TERM)]}) as ranks:
        ended = ranks.wait()
    assert codes(ended) == [0, 0] and (run / "report.html").exists(), ranks.err()
    observe("SIGTERM while the report is written", "it is finished; exit 0", job.finish(run))
