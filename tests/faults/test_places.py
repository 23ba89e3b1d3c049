"""Where a run lives: links, a home directory, folders that cannot be written to; and a checkpoint that is removed while it is read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import kempnerforge.util.files
from kempnerforge.checkpoint import resolve, store
from kempnerforge.config import load_config
from kempnerforge.inference import model as restoring
from kempnerforge.inference.model import TrainedModel
from kempnerforge.interop import weights
from kempnerforge.training.run import train
from tests.training.tiny import Ended, call, checkpoint_steps, make_job

STEPS = ("--train.max_steps=2", "--checkpoint.interval=1", "--checkpoint.keep_last_n=9", "--eval.at_end=false")


def trained(folder: Path, *argv: object) -> Ended:
    return call("train", make_job(folder), *STEPS, *argv)


def test_fresh_keeps_a_link_and_the_disk_that_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
    assert trained(tmp_path).code == 0
    assert trained(tmp_path, "--fresh").code == 0
    assert (tmp_path / "run").is_symlink() and checkpoint_steps(tmp_path / "disk" / "run") == [1, 2]
    (aside,) = (path for path in (tmp_path / "disk").iterdir() if path.name != "run")
    assert checkpoint_steps(aside) == [1, 2] and not list(tmp_path.glob("run.*"))


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("nowhere")
    ended = trained(tmp_path)
    assert ended.code == 2 and "it is a link to 'nowhere', which is not there" in ended.err, ended


def test_home_is_no_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a program, too, which may make its config without a file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    job = load_config(make_job(tmp_path), STEPS)
    job.run.dir = "~/mine"
    assert train(job) and checkpoint_steps(tmp_path / "mine") == [1, 2] and not (tmp_path / "~").exists()


@pytest.mark.parametrize("name", ["checkpoints", "events"])
def test_folders_that_cannot_be_written_to_are_found_at_the_start(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for make in (lambda: (run / name).write_text(""), lambda: (run / name).symlink_to("nowhere")):
        make()
        ended = trained(tmp_path)
        assert ended.code == 2 and f"{run / name} is not a directory" in ended.err and os.listdir(run) == [name], ended
        (run / name).unlink()
    (run / name).mkdir()
    access = os.access
    monkeypatch.setattr(kempnerforge.util.files.os, "access", lambda path, mode: Path(path) != run / name and access(path, mode))
    ended = trained(tmp_path)  # root may write anywhere but on a disk that is read-only
    assert ended.code == 2 and f"{run / name} cannot be written to" in ended.err and os.listdir(run) == [name], ended


def test_fresh_where_nothing_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trained(tmp_path).code == 0
    run = tmp_path / "run"
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == run)
    ended = trained(tmp_path, "--fresh")
    assert ended.code == 2 and "is where a disk is mounted: it cannot be moved aside" in ended.err, ended
    assert checkpoint_steps(run) == [1, 2]


# ---- a checkpoint that is pruned meanwhile ------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose first checkpoint is the newest until something looks at it: then the next is saved and the first is removed."""
    assert trained(tmp_path).code == 0
    root = tmp_path / "run" / "checkpoints"
    (root / "step-00000002").rename(root / "later")
    return tmp_path / "run"


def prune(run: Path) -> None:
    root = run / "checkpoints"
    if (root / "later").exists():
        (root / "later").rename(root / "step-00000002")
        shutil.rmtree(root / "step-00000001")


@pytest.mark.parametrize(
    ("owner", "name"),
    [(store, "verify"), (restoring, "load_config"), (restoring, "saved_tokenizer"), (restoring, "load_weights")],
)
def test_a_run_is_asked_while_it_prunes(owner: object, name: str, two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: (prune(two), original(*args, **kwargs))[1])
    assert TrainedModel.restore(two).path == two / "checkpoints" / "step-00000002"
    with pytest.raises(store.CheckpointError, match="no such directory"):
        TrainedModel.restore(two / "checkpoints" / "step-00000001")  # that one alone was asked for


def test_weights_are_taken_from_a_run_that_prunes(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = weights.load
    monkeypatch.setattr(weights, "load", lambda *args, **kwargs: (prune(two), original(*args, **kwargs))[1])
    cfg = load_config(two / "config.toml").model
    assert weights.read_weights(two, cfg).keys() == weights.read_weights(resolve(two), cfg).keys() and checkpoint_steps(two) == [2]
