from __future__ import annotations

import logging
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from kempnerforge.checkpoint import CheckpointError, find, load, resolve, save, tensor_info, verify
from tests.checkpoint.helpers import blank, differing, some_tensors
from tests.dist import run_ranks


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Steps 10, 20 and 30 in ``checkpoints`` of a run directory."""
    root = tmp_path / "run" / "checkpoints"
    for step in (10, 20, 30):
        save(root, step, some_tensors(step), {"step": step}, {"config.toml": b"x = 1\n", "tokenizer/tokenizer.json": b"{}"}, keep=3)
    return root


def shard(path: Path) -> Path:
    return path / "__0_0.distcp"


def test_round_trip(tmp_path: Path) -> None:
    tensors = some_tensors()
    state = {"stage": "questions", "loss": 0.1 + 0.2, "big": 2**70, "list": [1, None, {"x": "é\ud800"}]}
    path = save(tmp_path / "a" / "checkpoints", 12, tensors, state, {"config.toml": b"\x00\xff", "tokenizer/t.json": b"{}"}, keep=2)
    assert path == tmp_path / "a" / "checkpoints" / "step-00000012"
    assert (path / "config.toml").read_bytes() == b"\x00\xff"
    manifest = verify(path)
    assert (manifest.step, manifest["step"], manifest.world_size, manifest.state) == (12, 12, 1, state)
    assert set(manifest.files) == {".metadata", "__0_0.distcp", "config.toml", "tokenizer/t.json"}
    assert tensor_info(path) == {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()}
    loaded = blank(tensors)
    pointers = {key: t.data_ptr() for key, t in loaded.items()}
    load(path, loaded)
    assert not differing(loaded, tensors)
    assert {key: t.data_ptr() for key, t in loaded.items()} == pointers


def test_saves_a_view_alone(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {"row": torch.zeros(1000, 1000)[3]}, {}, {}, keep=1)
    assert shard(path).stat().st_size < 20_000


def test_keep_and_latest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, {"w": torch.ones(1)}, {}, {}, keep=2)
    assert names(tmp_path) == ["latest", "step-00000003", "step-00000004"]
    assert (tmp_path / "latest").read_text().strip() == "step-00000004"


def test_a_step_is_replaced(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        save(tmp_path, 5, {"w": torch.full((3,), value)}, {"value": value}, {}, keep=1)
    assert names(tmp_path) == ["latest", "step-00000005"]
    loaded = {"w": torch.zeros(3)}
    load(tmp_path / "step-00000005", loaded)
    assert loaded["w"][0] == 2 and verify(tmp_path / "step-00000005").state == {"value": 2.0}


def test_found_while_being_replaced(three: Path) -> None:
    (three / "step-00000030").rename(three / ".old-step-00000030")
    found = find(three)
    assert found is not None and found[1].step == 30
    save(three, 30, some_tensors(), {"new": True}, {}, keep=3)
    assert names(three) == ["latest", "step-00000010", "step-00000020", "step-00000030"]
    assert verify(three / "step-00000030").state == {"new": True}


def test_pruning_never_takes_the_step_just_saved(three: Path) -> None:
    shard(three / "step-00000030").unlink()
    save(three, 25, some_tensors(), {}, {}, keep=1)
    assert names(three) == ["latest", "step-00000025", "step-00000030"]
    found = find(three)
    assert found is not None and found[1].step == 25


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step, {"w": torch.ones(1)}, {}, {}, keep=2)
    found = find(tmp_path)
    assert found is not None and found[1].step == 100_000_000


def test_leftovers_of_a_killed_save_go(three: Path) -> None:
    (three / ".tmp-00000040-abc").mkdir()
    (three / ".tmp-00000040-abc" / "__0_0.distcp").write_bytes(b"half")
    shutil.copytree(three / "step-00000010", three / ".trash-xyz")
    save(three, 40, some_tensors(), {}, {}, keep=1)
    assert names(three) == ["latest", "step-00000040"]


def test_nothing_there(tmp_path: Path) -> None:
    assert find(tmp_path) is None and find(tmp_path / "none") is None


def damage_flip(path: Path) -> None:
    data = bytearray(shard(path).read_bytes())
    data[len(data) // 2] ^= 1
    shard(path).write_bytes(data)


def damage_link(path: Path) -> None:
    shutil.move(path / "config.toml", path.parent / "elsewhere")
    (path / "config.toml").symlink_to(path.parent / "elsewhere")


def replace_in_manifest(path: Path, old: bytes, new: bytes) -> None:
    data = (path / "manifest.json").read_bytes()
    assert old in data
    (path / "manifest.json").write_bytes(data.replace(old, new))


DAMAGES = {
    "flipped bit": (damage_flip, "__0_0.distcp is corrupt"),
    "truncated": (lambda p: os.truncate(shard(p), 100), r"__0_0.distcp has 100 bytes instead of \d+"),
    "missing shard": (lambda p: shard(p).unlink(), "__0_0.distcp is missing"),
    "missing manifest": (lambda p: (p / "manifest.json").unlink(), "no manifest.json; the checkpoint was not finished"),
    "empty manifest": (lambda p: (p / "manifest.json").write_bytes(b""), r"manifest.json is not a manifest \(0 bytes\)"),
    "manifest is a list": (lambda p: (p / "manifest.json").write_bytes(b"[]"), "not a manifest"),
    "altered manifest": (lambda p: replace_in_manifest(p, b'"step": 30', b'"step": 31'), "manifest.json is corrupt"),
    "other format": (lambda p: replace_in_manifest(p, b'"format": 1', b'"format": 2'), "format 2; this version reads format 1"),
    "missing metadata": (lambda p: (p / ".metadata").unlink(), ".metadata is missing"),
    "empty metadata": (lambda p: (p / ".metadata").write_bytes(b""), ".metadata has 0 bytes"),
    "missing file": (lambda p: (p / "tokenizer" / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "link to the outside": (damage_link, "config.toml is a link to the outside"),
    "empty directory": (lambda p: (shutil.rmtree(p), p.mkdir()), "not finished"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_broken_checkpoint_is_named_and_passed_over(three: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    damage, message = DAMAGES[kind]
    newest = three / "step-00000030"
    damage(newest)
    with pytest.raises(CheckpointError, match=message) as error:
        verify(newest)
    assert str(newest) in str(error.value)
    with caplog.at_level(logging.WARNING, "kempnerforge"):
        found = find(three)
    assert found is not None and found[0] == three / "step-00000020"
    assert "step-00000030" in caplog.text
    with pytest.raises(CheckpointError):
        resolve(newest)
    assert resolve(three) == three / "step-00000020"


def test_renamed_to_another_step(three: Path) -> None:
    (three / "step-00000030").rename(three / "step-00000050")
    with pytest.raises(CheckpointError, match="holds step 30"):
        verify(three / "step-00000050")


def test_all_broken(three: Path) -> None:
    for path in three.glob("step-*"):
        shard(path).unlink()
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints in .*; the newest: .*step-00000030"):
        find(three)


@pytest.mark.parametrize("hint", [None, b"", b"step-00000010", b"../../etc/passwd", b"\xff\x00"])
def test_latest_is_a_hint(three: Path, hint: bytes | None) -> None:
    (three / "latest").unlink()
    if hint is not None:
        (three / "latest").write_bytes(hint)
    found = find(three)
    assert found is not None and found[1].step == 30


def test_resolve(three: Path) -> None:
    newest = three / "step-00000030"
    assert resolve(three.parent) == resolve(three) == resolve(newest) == newest
    newest.rename(three.parent / "best")
    assert resolve(three.parent / "best") == three.parent / "best"
    with pytest.raises(CheckpointError, match="no such directory"):
        resolve(three / "gone")
    with pytest.raises(CheckpointError, match="step-00000030: no such directory"):
        resolve(three / "latest")
    (three / "file").touch()
    with pytest.raises(CheckpointError, match="not a directory"):
        resolve(three / "file")
    (three / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint here; give a step-"):
        resolve(three / "empty")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tensors": {"w": 3}}, "'w' is a int; only tensors"),
        ({"state": {"x": math.nan}}, "state is not plain JSON"),
        ({"state": {"x": (1, 2)}}, "state is not plain JSON: keys must be strings and sequences lists"),
        ({"state": {"x": torch.zeros(1)}}, "state is not plain JSON"),
        ({"files": {"../x": b""}}, "must be relative and stay inside"),
        ({"files": {"/x": b""}}, "must be relative and stay inside"),
        ({"files": {"manifest.json": b""}}, "is a name that the checkpoint itself uses"),
    ],
)
def test_what_cannot_be_saved_leaves_nothing(tmp_path: Path, changed: dict, message: str) -> None:
    arguments = {"tensors": {"w": torch.zeros(1)}, "state": {}, "files": {}} | changed
    with pytest.raises(CheckpointError, match=message) as error:
        save(tmp_path / "c", 3, **arguments, keep=1)
    assert str(tmp_path / "c" / "step-00000003") in str(error.value)
    assert names(tmp_path / "c") == []


def test_unwritable_root(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot save .*file/checkpoints/step-00000001: .*Not a directory"):
        save(tmp_path / "file" / "checkpoints", 1, {}, {}, {}, keep=1)


def test_disk_full(tmp_path: Path) -> None:
    (result,) = run_ranks("tests.checkpoint.workers:full_disk", 1, tmp_path)
    assert result.returncode == 0, result.stderr
    first, after_first, second, after_second = result.stdout.splitlines()
    for line in (first, second):
        assert re.fullmatch(rf"cannot save {tmp_path}/step-00000002: \[Errno 27\] File too large.*", line)
    assert after_first == after_second == "['latest', 'step-00000001']"
    assert verify(tmp_path / "step-00000001") and verify(tmp_path / "step-00000002")


def test_killed_while_saving(tmp_path: Path) -> None:
    (result,) = run_ranks("tests.checkpoint.workers:killed_while_saving", 1, tmp_path, 8, 0)
    assert result.returncode == 0, result.stderr + result.stdout
    assert len(result.stdout.splitlines()) == 8
