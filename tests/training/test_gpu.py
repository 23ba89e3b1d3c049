"""The same jobs on CUDA: same curve as on the CPU, and checkpoints go from one to the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.tiny import checkpoint_steps, losses, make_job, spawn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
CPU = {"CUDA_VISIBLE_DEVICES": ""}


def test_a_gpu_learns_what_a_cpu_learns(tmp_path: Path) -> None:
    curves = []
    for name, env in (("gpu", {}), ("cpu", CPU)):
        ended = spawn("train", make_job(tmp_path / name), "--optimizer.name=adamw", **env)
        assert ended.code == 0, ended.err
        curves.append(losses(tmp_path / name / "run"))
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bf16_trains_and_stays_finite(optimizer: str, tmp_path: Path) -> None:
    job = make_job(tmp_path)
    ended = spawn("train", job, "--train.mixed_precision=bf16", "--train.max_steps=30", f"--optimizer.name={optimizer}")
    assert ended.code == 0, ended.err
    curve = losses(tmp_path / "run")
    assert curve[-1] < curve[0]


def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu(tmp_path: Path) -> None:
    argv = ("train", make_job(tmp_path), "--scheduler.name=constant")
    assert spawn(*argv, "--train.max_steps=4").code == 0
    ended = spawn(*argv, **CPU)
    assert ended.code == 0, ended.err
    assert checkpoint_steps(tmp_path / "run")[-1] == 6
    assert spawn("generate", tmp_path / "run", tmp_path / "0.png", "--prompt", "what is on the left?", **CPU).code == 0
