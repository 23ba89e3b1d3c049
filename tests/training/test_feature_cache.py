"""Features of a frozen encoder that are kept: the encoder rests, and nothing depends on when it worked."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from kempnerforge.config import ConfigError, load_config
from tests.training.tiny import a_trainer, assert_same_tensors, call, losses, make_job, rows_of, spawn, tensors, weights_of, write_rows

FROZEN = """
[[stages]]
name = "frozen"
steps = 9
freeze = [{ module = "vision_encoder" }]
"""
COMMON = ("--train.max_steps=0", "--eval.at_end=false", "--checkpoint.interval=0")


@contextmanager
def counted(model: torch.nn.Module) -> Iterator[list[int]]:
    """How many images the encoder was given, call by call."""
    calls: list[int] = []
    handle = model.vision_encoder.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    yield calls
    handle.remove()


def encoded(folder: Path, *overrides: str) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Images encoded in each of nine steps of four samples (sixteen there are), and the weights behind them."""
    with a_trainer(load_config(folder / "job.toml", [*COMMON, *overrides])) as trainer:
        with counted(trainer.model) as calls:
            trainer.apply_freeze()
            per_step = []
            while not trainer.done:
                before = len(calls)
                trainer.train_step()
                trainer.step += 1
                per_step.append(sum(calls[before:]))
        return per_step, weights_of(trainer)


def test_each_image_is_encoded_once(tmp_path: Path) -> None:
    make_job(tmp_path, extra=FROZEN)
    plain, uncached = encoded(tmp_path)
    assert plain == [4] * 9
    cache = f"--train.feature_cache={tmp_path}/features"
    calls, first = encoded(tmp_path, cache)
    assert calls == [4] * 4 + [0] * 5, "sixteen images, then all are known"
    again, second = encoded(tmp_path, cache)
    assert again == [0] * 9
    assert_same_tensors(first, second)
    assert all(torch.allclose(first[name], uncached[name], atol=1e-5) for name in first)
    damaged = sorted((tmp_path / "features").rglob("*.safetensors"))
    assert len(damaged) == 16
    damaged[0].write_bytes(b"")
    calls, third = encoded(tmp_path, cache)
    assert sum(calls) == 4, "the batch of the one that is lost"
    assert all(torch.allclose(first[name], third[name], atol=1e-5) for name in first)


def test_an_encoder_that_has_learned_has_other_features(tmp_path: Path) -> None:
    stage = FROZEN.replace("steps = 9", "steps = 4")
    make_job(tmp_path, extra=stage + '[[stages]]\nname = "all"\nsteps = 2\n' + stage.replace('"frozen"', '"again"'))
    cache = tmp_path / "features"
    assert call("train", tmp_path / "job.toml", *COMMON, f"--train.feature_cache={cache}").code == 0
    folders = [folder for folder in cache.iterdir() if any(folder.iterdir())]
    assert len(folders) == 2, "one for the weights before it trained, one for those after"
    argv = ("train", tmp_path / "job.toml", *COMMON, f"--train.feature_cache={tmp_path}/other", f"--run.dir={tmp_path}/cut")
    for step in (2, 5, 7, 10):
        assert call(*argv, f"--train.max_steps={step}").code == 0
    assert_same_tensors(tensors(tmp_path / "cut"), tensors(tmp_path / "run"))


@pytest.mark.dist
def test_two_ranks_of_which_one_knows_more(tmp_path: Path) -> None:
    """Rank 1 finds an image that is lost, rank 0 none, and some batches have no image: both call the encoder, or neither."""
    config = make_job(tmp_path, extra=FROZEN)
    rows = rows_of(tmp_path)
    write_rows(tmp_path / "train.jsonl", [row if k % 3 else {**row, "image": None} for k, row in enumerate(rows)])
    argv = ("train", config, *COMMON, f"--train.feature_cache={tmp_path}/features", "--nproc", 2)
    assert spawn(*argv).code == 0
    for lost in sorted((tmp_path / "features").rglob("*.safetensors"))[:3]:
        lost.unlink()
    shutil.move(tmp_path / "run", tmp_path / "first")
    ended = spawn(*argv)
    assert ended.code == 0, ended
    assert all(abs(a - b) < 1e-4 for a, b in zip(losses(tmp_path / "run"), losses(tmp_path / "first"), strict=True))


def test_images_that_change_are_not_kept(tmp_path: Path) -> None:
    config = make_job(tmp_path)
    with pytest.raises(ConfigError, match=r"feature_cache = 'x': data.images.augment changes the images"):
        load_config(config, ["--train.feature_cache=x", "--data.images.augment.flip=0.5"])


def test_another_encoder_with_the_same_weights_has_other_features(tmp_path: Path) -> None:
    make_job(tmp_path, extra=FROZEN)
    cache = f"--train.feature_cache={tmp_path}/features"
    assert sum(encoded(tmp_path, cache)[0]) == 16
    assert sum(encoded(tmp_path, cache, "--vision_encoder.n_heads=4")[0]) == 16
    assert sum(encoded(tmp_path, cache)[0]) == 0
