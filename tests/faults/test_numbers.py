"""Losses and gradients that are not finite, micro-batches without a target, a rank without images: on one rank of two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kempnerforge.training.optimizer import Optimizers
from tests.faults.conftest import Job, Observe
from tests.faults.ranks import Faults, Ranks, codes, newest
from tests.training import test_ranks
from tests.training.tiny import assert_same_tensors, call, checkpoint_steps, make_job, metrics, plain, tensors

pytestmark = pytest.mark.dist

BOUNDARY = 6
"""The first step of the second stage."""


def moved(run: Path, since: int, until: int) -> set[str]:
    """The names, weights and optimizer state, that differ between two checkpoints."""
    a, b = (tensors(run / "checkpoints" / f"step-{step:08d}") for step in (since, until))
    return {name for name in a.keys() | b.keys() if name not in a or name not in b or not torch.equal(a[name], b[name])}


def weights(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("model.")}


def frozen(run: Path, step: int) -> list[str]:
    manifest = json.loads((run / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
    return manifest["state"]["frozen"]


def ended_well(job: Job, run: Path, faults: Faults) -> Path:
    with job.ranks(run, faults=faults) as ranks:
        ended = ranks.wait()
    assert codes(ended) == [0, 0], ranks.err()
    return run


@pytest.mark.slow
def test_a_step_that_is_not_finite_on_one_rank(job: Job, tmp_path: Path, observe: Observe):
    """In the gradient of rank 1 or in the loss of rank 0: the same steps are skipped, by both, and nothing else differs."""
    bad = (3, BOUNDARY, 7, 20)
    a = ended_well(job, tmp_path / "a", {1: [("nan_gradient", *bad)]})
    b = ended_well(job, tmp_path / "b", {0: [("nan_loss", *bad)]})
    assert_same_tensors(tensors(a), tensors(b))
    for run in (a, b):
        rows = [row for row in metrics(run) if "train/loss" in row]
        assert [row["step"] - 1 for row in rows if row["train/skipped_steps"]] == list(bad)
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert checkpoint_steps(a)[:4] == [2, 5, 6, 9], "none is made of a skipped step: 4 and 8 wait for the next one"
    assert all(t.isfinite().all() for t in tensors(a).values())
    observe(
        "NaN in the gradient of rank 1; in the loss of rank 0",
        "both ranks skip the same steps; no weight, no moment moves; counted",
        "bitwise the same in both cases",
    )
    assert weights(moved(a, 9, 10)) == weights(moved(job.reference, 8, 10)) != weights(moved(job.reference, 2, 4))
    assert all(frozen(a, step + (step == 8)) == frozen(job.reference, step) for step in (6, 8, 12, 18))
    observe("NaN exactly at the first step of a stage", "the stage comes into force all the same: exactly its parameters move afterwards")


@pytest.mark.slow
def test_policies(job: Job, tmp_path: Path, observe: Observe):
    run = tmp_path / "stop"
    with job.ranks(run, "--train.on_nonfinite=stop", faults={1: [("nan_gradient", 9)]}) as ranks:
        ended = ranks.wait()
    assert codes(ended) == [3, 3] and newest(run) == 8, ranks.err()
    assert all("step 9: loss " in one.err and 'train.on_nonfinite = "stop"' in one.err for one in ended), ranks.err()
    exact = job.finish(run, "--train.on_nonfinite=stop")
    observe('train.on_nonfinite = "stop", NaN on rank 1', "both ranks end with 3 before anything moves; a restart repeats the step", exact)
    run = tmp_path / "bound"
    with job.ranks(run, "--train.max_skipped_steps=2", faults={1: [("nan_gradient", *range(8, 99))]}) as ranks:
        ended = ranks.wait()
    assert codes(ended) == [3, 3] and newest(run) == 8, ranks.err()
    assert all("for more than train.max_skipped_steps = 2 steps in a row" in one.err for one in ended), ranks.err()
    assert all(value.isfinite().all() for value in tensors(run).values())
    observe("NaN in every step from one on, train.max_skipped_steps = 2", "both ranks end with 3 at the third; every checkpoint is finite")


@pytest.mark.parametrize(
    ("what", "step", "told"),
    [
        # saved right after it
        pytest.param("weight", 9, "tensors hold values that are not finite, such as 'model.", marks=pytest.mark.slow),
        # seen by the step after it
        pytest.param("weight", 8, " holds values that are not finite: an earlier update was too large", marks=pytest.mark.slow),
        # seen by no step
        pytest.param("moment", 8, "tensors hold values that are not finite, such as 'optim.", marks=pytest.mark.slow),
    ],
)
def test_an_update_that_overflows(what: str, step: int, told: str, job: Job, tmp_path: Path, observe: Observe):
    """The job's checkpoints are those of even steps."""
    run = tmp_path / "run"
    with job.ranks(run, "--checkpoint.keep_last_n=1", faults={1: [("spoil", step, what)]}) as ranks:
        ended = ranks.wait()
    assert codes(ended) == [3, 3] and newest(run) == 8, ranks.err()
    assert all(told in one.err and "lower optimizer.lr" in one.err for one in ended), ranks.err()
    exact = job.finish(run, "--checkpoint.keep_last_n=20")
    observe(f"an update leaves a {what} that is not finite", "ends with 3 at the next step or save; the last good checkpoint stays", exact)


def test_a_short_run_that_overflows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One step, and no step after it that would see it."""

    def overflow(optimizers: Optimizers) -> None:
        plain(optimizers.all[0].param_groups[0]["params"][0].detach()).view(-1)[0] = torch.inf

    monkeypatch.setattr(Optimizers, "zero_grad", overflow)
    ended = call("train", make_job(tmp_path), "--train.max_steps=1", "--eval.at_end=false")
    assert ended.code == 3 and "cannot save step 1" in ended.err, ended
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*")) and not (tmp_path / "run" / "complete.json").exists()


def test_a_micro_batch_without_targets(job: Job, tmp_path: Path, observe: Observe):
    """On rank 1, against one process that accumulates the same two micro-batches, one of them without targets."""
    common = (
        "train",
        job.path,
        "--train.max_steps=8",
        "--model.dropout=0",
        "--train.grad_clip_norm=0",
        "--eval.interval=0",
        "--eval.at_end=false",
    )
    steps = [1, BOUNDARY]
    with Ranks(tmp_path / "logs", *common, f"--run.dir={tmp_path}/two", faults={1: [("mask", steps, 0)]}) as ranks:
        ended = ranks.wait()
    assert codes(ended) == [0, 0], ranks.err()
    one = ("--train.grad_accum_steps=2", f"--run.dir={tmp_path}/one")
    with Ranks(tmp_path / "logs1", *common, *one, faults={0: [("mask", steps, 1)]}, world=1) as ranks:
        ended = ranks.wait()
    assert codes(ended) == [0], ranks.err()
    assert_same_tensors(tensors(tmp_path / "two"), tensors(tmp_path / "one"))
    observe(
        "all labels masked in rank 1's micro-batch",
        "loss and gradient are those of the other micro-batch",
        "bitwise those of one process with both micro-batches",
    )
    with Ranks(tmp_path / "logs", *common, f"--run.dir={tmp_path}/none", faults={r: [("mask", [3], 0)] for r in (0, 1)}) as ranks:
        ended = ranks.wait()
    assert codes(ended) == [2, 2] and "step 3: no token is trained in samples" in ended[0].err, ranks.err()
    observe("all labels masked on all ranks", "refused, naming the samples, exit 2")


def test_a_rank_that_sees_only_text(tmp_path: Path, observe: Observe):
    test_ranks.test_a_rank_that_sees_only_text_stays_in_step("joint_decoder", tmp_path)
    observe(
        "a rank that sees only text (all archs: tests/training/test_ranks.py)",
        "stays in step",
        "bitwise those of one process with both micro-batches",
    )
