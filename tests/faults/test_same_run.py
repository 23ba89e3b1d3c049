"""Two jobs on one run, and a run that is continued with another config."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.conftest import Job, Observe
from tests.faults.ranks import codes, lines, newest
from tests.training.test_resume import assert_same_run

pytestmark = pytest.mark.dist


def test_two_jobs(job: Job, tmp_path: Path, observe: Observe):
    run, go = tmp_path / "run", tmp_path / "go"
    with job.ranks(run, faults={1: [("wait_for", 3, str(go))]}) as first:
        first.wait_for(lambda: lines(run) >= 3)
        with job.ranks(run) as second:
            ended = second.wait()
        go.touch()
        assert codes(ended) == [3, 3], second.err()
        assert all(f"is in use by another job (pid {first.pid(0)})" in one.err for one in ended), second.err()
        assert codes(first.wait()) == [0, 0], first.err()
    assert_same_run(run, job.reference)
    observe(
        "two jobs on one run directory", "the second is refused on both ranks and told the first's pid, exit 3; the first goes on", True
    )


@pytest.mark.slow
def test_another_config(job: Job, tmp_path: Path, observe: Observe):
    """Arch, schedule and data, all at once; the difference is shown, key by key. What is meant to change may."""
    run = job.until(8, tmp_path / "run")
    text = job.path.read_text().replace('freeze = [{ module = "vision_encoder" }]', "freeze = []")
    changed = job.folder / "changed.toml"
    changed.write_text(text.replace('name = "all"\nsteps = 6', 'name = "all"\nsteps = 8'))
    other = type(job)(job.folder, changed, job.reference)
    (job.folder / "other.jsonl").write_text((job.folder / "train.jsonl").read_text())
    overrides = ("--vlm.arch=mot", f"--data.path={job.folder}/other.jsonl", "--optimizer.lr=1e-3")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with other.ranks(run, *overrides) as ranks:
        ended = ranks.wait()
    assert codes(ended) == [2, 2], ranks.err()
    said = ended[0].err.splitlines()
    for key in ("vlm.arch: 'joint_decoder' -> 'mot'", "optimizer.lr: 0.002 -> 0.001", "data.path: "):
        assert any(line.startswith(f"  {key}") for line in said), ended[0].err
    assert any(line.startswith("  stages") for line in said), ended[0].err
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    exact = job.finish(run)
    observe(
        "continued with another arch, freeze schedule, learning rate, data", "refused with the difference, exit 2, nothing touched", exact
    )

    run = job.until(8, tmp_path / "allowed")
    with job.ranks(run, "--optimizer.lr=1e-3", "--allow-change=optimizer.lr") as ranks:
        ended = ranks.wait()
    assert codes(ended) == [0, 0], ranks.err()
    assert "changed, as it is meant to be: optimizer.lr: 0.002 -> 0.001" in ended[0].err
    assert newest(run) == newest(job.reference)
    observe("the same with --allow-change=optimizer.lr", "continues, and says what changed")
