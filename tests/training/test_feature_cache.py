"""Features of a frozen encoder that are kept: the encoder rests, and nothing depends on when it worked."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from kempnerforge.config import ConfigError, load_config
from kempnerforge.training.ema import swapped
from tests.training.tiny import (
    a_trainer,
    assert_same_tensors,
    call,
    losses,
    make_job,
    rows_of,
    tensors,
    two_ranks,
    weights_of,
    write_config,
    write_rows,
)

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


def test_images_of_any_shape_and_inner_layers_are_kept(tmp_path: Path) -> None:
    """Two gray images are the same pixels in their square, and not the same image."""
    make_job(tmp_path, extra=FROZEN)
    for number in range(16):
        with Image.open(tmp_path / f"{number}.png") as picture:
            picture.resize((16, 8) if number % 3 else (8, 16)).save(tmp_path / f"{number}.png")
    for number, size in enumerate([(8, 8), (16, 8)]):
        Image.new("RGB", size, (127, 127, 127)).save(tmp_path / f"{number}.png")
    keys = ("--data.images.fit=native", "--vision_encoder.deepstack_layers=[-2]", "--model.rope_sections=[4,2,2]")
    plain, uncached = encoded(tmp_path, *keys)
    calls, first = encoded(tmp_path, *keys, f"--train.feature_cache={tmp_path}/features")
    assert (plain, calls) == ([4] * 9, [4] * 4 + [0] * 5)
    assert all(torch.allclose(first[name], uncached[name], atol=1e-5) for name in first)


def test_a_damaged_swapped_or_foreign_entry_is_named_and_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each image is asked for in its first step; nothing but the batches of those that are wrong is encoded."""
    make_job(tmp_path, extra=FROZEN)
    cache = f"--train.feature_cache={tmp_path}/features"
    _, first = encoded(tmp_path, cache)
    entries = sorted(path for path in (tmp_path / "features").rglob("*") if path.is_file())
    assert len(entries) == 16
    good = [path.read_bytes() for path in entries]
    for bad in (
        {0: b""},
        {1: good[1][:-3] + bytes([good[1][-3] ^ 1]) + good[1][-2:]},  # one bit of a feature: it was believed
        {2: good[3], 3: good[2]},  # of two images: they were believed
    ):
        for k, data in bad.items():
            entries[k].write_bytes(data)
        caplog.clear()
        calls, again = encoded(tmp_path, cache)
        assert sum(calls) in (4, 8) and len(caplog.records) == len(bad)
        assert all(str(entries[k]) in caplog.text for k in bad)
        assert all(torch.allclose(first[name], again[name], atol=1e-5) for name in first)
        assert sum(encoded(tmp_path, cache)[0]) == 0, "they are whole again"


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
    config = make_job(tmp_path, extra=FROZEN + '[[stages]]\nname = "all"\nsteps = 1\n')  # the encoder is random, so it must train some day
    rows = rows_of(tmp_path)
    write_rows(tmp_path / "train.jsonl", [row if k % 3 else {**row, "image": None} for k, row in enumerate(rows)])
    argv = ("train", config, *COMMON, "--train.max_steps=9", f"--train.feature_cache={tmp_path}/features")
    assert two_ranks(*argv).code == 0
    for lost in sorted((tmp_path / "features").rglob("*.entry"))[:3]:
        lost.unlink()
    shutil.move(tmp_path / "run", tmp_path / "first")
    ended = two_ranks(*argv)
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


def test_the_key_follows_the_weights_that_encode(tmp_path: Path) -> None:
    """Whoever writes to them: a schedule-free optimizer that goes on from its average, an average in their place, a plain copy."""
    job = load_config(
        write_config(make_job(tmp_path).parent, "two.toml", extra='[[stages]]\nname = "all"\nsteps = 3\n' + FROZEN),
        [*COMMON, "--optimizer.name=schedule_free_adamw", "--scheduler.name=constant", f"--train.feature_cache={tmp_path}/features"],
    )
    with a_trainer(job) as trainer:
        features = trainer.features
        assert features is not None

        def folder() -> Path | None:
            opened = features._open()
            return opened and opened.directory

        trainer.apply_freeze()
        for _ in range(3):
            assert folder() is None
            trainer.train_step()
            trainer.step += 1
        trainer.apply_freeze()
        first = folder()
        assert first is not None and folder() == first
        trainer.optimizers.reset()
        second = folder()
        assert second not in (None, first)
        trainer.train_step()
        trainer.step += 1
        assert folder() == second, "frozen"
        weight = next(iter(features._weights.values()))
        with swapped(trainer.model, {weight: weight.detach() + 1}):
            assert folder() not in (None, first, second)
        assert folder() == second, "bitwise as it was"


def test_features_of_an_earlier_run_are_those_of_its_weights(tmp_path: Path) -> None:
    """Two runs whose frozen encoders differ by what a reset wrote, with one cache: each is as it is without any."""
    config = make_job(tmp_path, extra='[[stages]]\nname = "all"\nsteps = 4\n' + FROZEN.replace("9", "3"))
    argv = ("train", config, *COMMON, "--optimizer.name=schedule_free_adamw", "--scheduler.name=constant", "--optimizer.lr=2e-2")
    cache = f"--train.feature_cache={tmp_path}/features"
    (reset := tmp_path / "reset.toml").write_text(config.read_text().replace('"frozen"\n', '"frozen"\noptimizer.moments = "reset"\n'))
    assert call(*argv, f"--run.dir={tmp_path}/alone").code == 0
    assert call("train", reset, *argv[2:], cache, f"--run.dir={tmp_path}/reset").code == 0
    assert call(*argv, cache, f"--run.dir={tmp_path}/shared").code == 0
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
    assert losses(tmp_path / "reset") != pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_moved(tmp_path: Path) -> None:
    make_job(tmp_path)
    assert call("train", tmp_path / "job.toml", "--train.max_steps=1").code == 0
    before = sorted(tmp_path.rglob("*"))
    refused = call("train", tmp_path / "job.toml", "--fresh", f"--train.feature_cache={tmp_path}/job.toml/deep")
    assert refused.code == 2 and "train.feature_cache = " in refused.err and "job.toml is not a directory" in refused.err
    assert sorted(tmp_path.rglob("*")) == before
