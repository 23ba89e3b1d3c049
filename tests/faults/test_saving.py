"""A disk that is full, files that may not grow, and checkpoints that were damaged."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.helpers import reseal
from tests.checkpoint.test_reader import Evil
from tests.checkpoint.test_store import damage_flip, shard
from tests.faults.conftest import Job, Observe
from tests.faults.ranks import STEPS, codes, newest
from tests.training.test_resume import assert_same_run
from tests.training.tiny import checkpoint_steps, environment

pytestmark = pytest.mark.dist

ON_TMPFS = """
set -e
mount -t tmpfs -o size=8m tmpfs "$RUN"
dd if=/dev/zero of="$RUN/ballast" bs=1k count=4500 2>/dev/null
code=0; "$@" 2> "$SEEN/full.err" || code=$?
echo "$code" > "$SEEN/full.code"
df "$RUN" > "$SEEN/df"
ls -A "$RUN/checkpoints" > "$SEEN/checkpoints"
rm "$RUN/ballast"
code=0; "$@" 2> "$SEEN/again.err" || code=$?
echo "$code" > "$SEEN/again.code"
cp -a "$RUN" "$SEEN/run"
"""
"""Fills a small disk of its own before the run, frees it, and runs the same command again. The mount is private and ends with the script."""

MAY_MOUNT = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not MAY_MOUNT, reason="no private tmpfs: user namespaces are off")
def test_a_full_disk(job: Job, tmp_path: Path, observe: Observe):
    run, seen = tmp_path / "run", tmp_path / "seen"
    run.mkdir()
    seen.mkdir()
    command = [sys.executable, "-m", "kempnerforge", "train", job.path, "--nproc", "2", "--checkpoint.keep_last_n=3", f"--run.dir={run}"]
    env = environment(RUN=str(run), SEEN=str(seen))
    subprocess.run(["unshare", "-rm", "bash", "-c", ON_TMPFS, "bash", *map(str, command)], env=env, check=True, timeout=200)
    assert (seen / "full.code").read_text() == "3\n", (seen / "full.err").read_text()
    assert "No space left on device" in (seen / "full.err").read_text()
    steps = [name for name in (seen / "checkpoints").read_text().split() if name.startswith("step-")]
    assert 1 <= len(steps) < STEPS / 2 and ".tmp" not in (seen / "checkpoints").read_text()
    assert (seen / "again.code").read_text() == "0\n", (seen / "again.err").read_text()
    assert f"continuing at step {int(max(steps)[5:])} of {STEPS}" in (seen / "again.err").read_text()
    assert_same_run(seen / "run", job.reference)
    observe(
        "disk full (a tmpfs of 8 MB)",
        f"exit 3, says so; {len(steps)} earlier checkpoints whole, no half one; continues when space is freed",
        True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True])
def test_a_disk_that_fills_in_the_tensors_or_in_the_manifest_and_a_file_limit(
    in_background: bool, job: Job, tmp_path: Path, observe: Observe
):
    """In the background it is said where the next checkpoint is due."""
    run = tmp_path / "run"
    limited = ({1: [("limit_files", 3, 1 << 14)]}, 4, "rank 1: [Errno 27] File too large")
    troubles = [
        *([limited] if not in_background else []),  # there the save of step 2 may still be going on
        ({1: [("no_space", 6, "tensors")]}, 6, "rank 1: [Errno 28] No space left on device"),
        ({0: [("no_space", 8, "manifest.json")]}, 8, "[Errno 28] No space left on device"),
    ]
    for faults, step, says in troubles:
        with job.ranks(run, f"--checkpoint.in_background={str(in_background).lower()}", faults=faults) as ranks:
            ended = ranks.wait()
        assert codes(ended) == [3, 3], ranks.err()
        for one in ended:
            assert f"cannot save {run}/checkpoints/step-{step:08d}: " in one.err and says in one.err, one.err
        assert checkpoint_steps(run) == list(range(2, step, 2))
        assert not list((run / "checkpoints").glob(".tmp*"))
    exact = job.finish(run)
    says = "both ranks end with 3 and name rank, path and errno; earlier checkpoints whole"
    if in_background:
        observe("ENOSPC, as below, in the background", says, exact)
        return
    observe("file-size limit (RLIMIT_FSIZE) on rank 1", says, exact)
    observe("ENOSPC in rank 1's tensors, in rank 0's manifest (raised by the test)", "the same", exact)


def missing(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": damage_flip,
    "a truncated shard": lambda path: os.truncate(path / "__1_0.distcp", 1000),
    "no shard of rank 1": missing("__1_0.distcp"),
    "no manifest": missing("manifest.json"),
    "an empty manifest": lambda path: (path / "manifest.json").write_bytes(b""),
    "no .metadata": missing(".metadata"),
    "an empty directory": lambda path: (shutil.rmtree(path), path.mkdir()),
    "a shard of zeros": lambda path: shard(path).write_bytes(bytes(shard(path).stat().st_size)),
}


def test_damaged_checkpoints_are_named_and_passed_over(job: Job, tmp_path: Path, observe: Observe):
    """The eight newest, each in another way; and a pointer and directories that a kill may leave behind."""
    run = job.until(STEPS - 2, tmp_path / "run")
    root, step = run / "checkpoints", STEPS - 2
    for damage in DAMAGES.values():
        damage(root / f"step-{step:08d}")
        step -= 2
    (root / "latest").write_text(f"step-{STEPS - 2:08d}\n")
    shutil.copytree(root / f"step-{step:08d}", root / f".tmp-{step + 2:08d}-0123abcd")
    (root / ".trash-0123abcd").mkdir()
    with job.ranks(run) as ranks:
        ended = ranks.wait()
    assert codes(ended) == [0, 0], ranks.err()
    assert ended[0].err.count("skipping a broken checkpoint: ") == len(DAMAGES), ended[0].err
    assert f"continuing at step {step} of {STEPS}" in ended[0].err
    assert_same_run(run, job.reference)
    assert not list(root.glob(".t*")) and (root / "latest").read_text() == f"step-{STEPS:08d}\n"
    observe(f"damaged checkpoint: {', '.join(DAMAGES)}", "each is named and passed over, the newest whole one is used", True)
    observe("stale `latest`, leftover `.tmp-*` and `.trash-*`", "not believed; removed by the next save", True)


def test_a_pickle_that_runs_code(job: Job, tmp_path: Path, observe: Observe):
    run = job.until(8, tmp_path / "run")
    evil, good = run / "checkpoints" / "step-00000008", job.reference / "checkpoints" / "step-00000008"
    (evil / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    reseal(evil)
    with job.ranks(run) as ranks:
        ended = ranks.wait()
    assert codes(ended) == [3, 3], ranks.err()
    assert all("refusing to unpickle posix.system" in one.err for one in ended), ranks.err()
    assert not (tmp_path / "owned").exists() and newest(run) == 8
    shutil.rmtree(evil)
    shutil.copytree(good, evil)
    exact = job.finish(run)
    observe("checkpoint with a pickle that runs a command, its checksums forged", "refused by both ranks, exit 3, nothing ran", exact)
