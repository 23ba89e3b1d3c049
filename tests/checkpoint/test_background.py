"""Checkpoints that are written while tensors change."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from kempnerforge.checkpoint import BackgroundSave, CheckpointError, find, load, store
from tests.checkpoint.helpers import blank, differing, snapshot, some_tensors
from tests.dist import run_ranks


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before it is set."""
    event, write = threading.Event(), store._write
    monkeypatch.setattr(store, "_write", lambda *args: (event.wait(30), write(*args))[1])
    return event


def test_what_is_saved_are_the_values_at_the_call(tmp_path: Path, held: threading.Event) -> None:
    writer, tensors = BackgroundSave(60), some_tensors()
    for step in (1, 2):  # the second one fills the copies of the first
        want = snapshot(tensors)
        writer.save(tmp_path, step, tensors, {"step": step}, {"config.toml": b"x = 1\n"}, 1)
        for tensor in tensors.values():
            tensor.add_(1)
        assert find(tmp_path) is None or step == 2
        held.set()
        writer.wait()
        found = find(tmp_path)
        assert found is not None and found[1].step == step and found[1].state == {"step": step}
        loaded = blank(tensors)
        load(found[0], loaded)
        assert differing(loaded, want) == []
        held.clear()


def test_the_next_save_waits_for_the_last(tmp_path: Path, held: threading.Event) -> None:
    writer, tensors = BackgroundSave(60), {"w": torch.zeros(4)}
    writer.save(tmp_path, 1, tensors, {}, {}, 2)
    threading.Timer(0.2, held.set).start()
    tensors["w"] += 1
    writer.save(tmp_path, 2, tensors, {}, {}, 2)
    assert (tmp_path / "step-00000001").exists()
    writer.wait()
    for step in (1, 2):
        loaded = {"w": torch.full((4,), 9.0)}
        load(tmp_path / f"step-{step:08d}", loaded)
        assert loaded["w"].tolist() == [step - 1.0] * 4


def test_a_failure_is_raised_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    writer = BackgroundSave(60)
    writer.save(tmp_path / "file", 1, {"w": torch.zeros(1)}, {}, {}, 1)
    with pytest.raises(CheckpointError, match="cannot save .*step-00000001"):
        writer.save(tmp_path, 2, {"w": torch.zeros(1)}, {}, {}, 1)
    writer.wait()
    writer.save(tmp_path, 3, {"w": torch.zeros(1)}, {}, {}, 1)
    writer.wait()
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000003"]


@pytest.mark.dist
def test_ranks_that_wait_for_one_that_has_lost_another_learn_of_it(tmp_path: Path) -> None:
    ended = run_ranks("tests.checkpoint.workers:lost_in_background", 4, tmp_path / "run", tmp_path / "told")
    assert [one.returncode for one in ended] == [0, 0, 0, 9], ended
    assert find(tmp_path / "run") is None
