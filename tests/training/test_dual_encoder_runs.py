"""Runs of the contrastive dual encoder: what its loss is a mean of, on one process and two, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kempnerforge.config import load_config
from tests.training.tiny import a_trainer, call, losses, make_job, metrics, two_ranks

SECTIONS = """
[eval]
tasks = ["retrieval", "zero_shot"]
"""
KEYS = ("--vlm.arch=dual_encoder", "--vlm.embed_dim=16")


@pytest.mark.parametrize("weight", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_two_processes_are_one(weight: float, tmp_path: Path) -> None:
    """The negatives of a pair are those of all processes: the same losses step by step, and the same scores."""
    argv = ("train", make_job(tmp_path, extra=SECTIONS), *KEYS, f"--vlm.caption_weight={weight}")
    runs = {"one": call, "two": two_ranks}
    for name, command in runs.items():
        ended = command(*argv, f"--run.dir={tmp_path}/{name}")
        assert ended.code == 0, ended.err
    one, two = (metrics(tmp_path / name) for name in runs)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-4)
    assert len({round(loss, 3) for loss in losses(tmp_path / "one")}) > 3
    assert one[-1] == pytest.approx(two[-1], rel=1e-3)
    assert {"eval/retrieval", "eval/zero_shot", "eval/zero_shot_blind"} <= one[-1].keys()
    assert ("eval/exact_match" in one[-1]) == ("train/pair_loss" in one[0]) == bool(weight)
    page = (tmp_path / "one" / "report.html").read_text(encoding="utf-8")
    assert "Zero-shot classification" in page and "Text of an image, R@1" in page


def test_the_loss_is_a_mean_over_the_pairs_of_all_micro_batches(tmp_path: Path) -> None:
    """One micro-batch has two pairs, the other four."""
    job = load_config(make_job(tmp_path), [*KEYS, "--train.grad_accum_steps=2"])
    with a_trainer(job) as trainer:
        two, other = trainer.next_batches()
        four = next(trainer.assembly.data.batches(replace(trainer.stage, train=replace(trainer.stage.train, grad_accum_steps=1)), 1))
        assert (two.num_pairs, other.num_pairs, four.num_pairs) == (2, 2, 4)
        with torch.no_grad():
            sums = [float(trainer.model(batch).pair_loss) for batch in (two, four)]
        trainer._ahead = trainer._count([two, four])
        assert trainer.train_step().loss == pytest.approx(sum(sums) / 6, rel=1e-5)


def test_what_it_cannot_do_is_said(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    ended = call("train", job, *KEYS, '--eval.tasks=["anls"]')
    assert ended.code == 2 and "'anls' needs words of the model, which gives embeddings" in ended.err
    ended = call("train", job, *KEYS, "--train.batch_size=1")
    assert ended.code == 2 and "exactly one image in a micro-batch of all ranks together: 1; two are needed" in ended.err
    ended = call("check", job, *KEYS)
    assert ended.code == 0 and "writes no text" in ended.out + ended.err
