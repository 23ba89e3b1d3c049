"""Runs with ``train.float8``: beside a run without, on two ranks, stopped and continued."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kempnerforge.config import ConfigError, DistributedConfig, JobConfig, ModelConfig, TrainConfig, VLMConfig
from tests.training.tiny import assert_same_tensors, call, losses, make_job, tensors, two_ranks

ON = ("--train.mixed_precision=bf16", "--train.float8=tensorwise")
JOB = JobConfig(model=ModelConfig(), train=TrainConfig(max_steps=2, float8="rowwise"))


@pytest.fixture(scope="module")
def torchao() -> None:
    pytest.importorskip("torchao.float8", reason="the extra float8")


def test_a_run_without_the_package_stops_before_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    ended = call("train", make_job(tmp_path), *ON)
    assert ended.code == 2 and "train.float8 = 'tensorwise': needs the package torchao: pip install 'kempnerforge[float8]'" in ended.err


@pytest.mark.parametrize(
    ("job", "says"),
    [
        (replace(JOB, train=replace(JOB.train, mixed_precision="fp32")), "float8 = 'rowwise': not with mixed_precision = 'fp32'"),
        (replace(JOB, train=replace(JOB.train, batch_size="auto", rows_per_step=8)), "not with batch_size = 'auto'"),
        (replace(JOB, distributed=DistributedConfig(tensor_parallel=2)), "not with distributed.tensor_parallel = 2"),
        (replace(JOB, vlm=VLMConfig.for_arch("hf", path="somewhere")), "vlm.arch = 'hf' has the layers of transformers"),
    ],
)
def test_what_it_does_not_go_with_is_said_when_a_job_is_loaded(job: JobConfig, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        job.validate()
    assert [line for line in error.value.problems if line.startswith("[train] float8") and says in line], error.value.problems


def test_check_says_which_layer_does_not_fit(tmp_path: Path) -> None:
    """Without torchao, too: a plan is often made on another machine."""
    ended = call("check", make_job(tmp_path), *ON, "--model.ffn_dim=40")
    assert ended.code == 2 and "transformer.layers.0.mlp.up_proj has 32 inputs and 40 outputs" in ended.err


def test_recipes_are_named() -> None:
    with pytest.raises(ValueError, match=r"float8 = 'e4m3'.*tensorwise"):
        TrainConfig(float8="e4m3")


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.usefixtures("torchao")
def test_it_learns_as_in_bf16_resumes_bitwise_and_can_be_left(tmp_path: Path) -> None:
    """Losses of 6 steps within 1 % of bf16's; of two ranks those of one process that takes the same micro-batches (another split has other
    scales, as a scale is of a whole micro-batch); bitwise with activation checkpointing and after a stop.
    """
    job = make_job(tmp_path)

    def run(name: str, *argv: str, ranks: bool = False) -> Path:
        ended = (two_ranks if ranks else call)("train", job, f"--run.dir={tmp_path}/{name}", *argv)
        assert ended.code == 0, ended
        return tmp_path / name

    plain, whole = losses(run("bf16", ON[0])), run("float8", *ON)
    assert losses(whole) != plain and losses(whole) == pytest.approx(plain, rel=0.01)

    stopped = run("stopped", *ON, "--train.max_steps=4", "--scheduler.name=constant")
    unbroken = run("unbroken", *ON, "--scheduler.name=constant")
    run("stopped", *ON, "--scheduler.name=constant")
    assert losses(stopped) == losses(unbroken)
    assert_same_tensors(tensors(stopped), tensors(unbroken))

    assert losses(run("two", *ON, ranks=True)) == pytest.approx(losses(run("micro", *ON, "--train.grad_accum_steps=2")), rel=1e-6)
    again = run("again", *ON, "--train.activation_checkpointing=true", "--train.activation_checkpointing_keeps=products")
    assert losses(again) == losses(whole)

    assert "train.float8" in call("train", job, f"--run.dir={whole}", ON[0], "--train.max_steps=8").err
    left = call("train", job, f"--run.dir={whole}", ON[0], "--train.max_steps=8", "--allow-change=train", "--allow-change=scheduler")
    assert left.code == 0 and len(losses(whole)) == 8, left
    assert tensors(whole).keys() == tensors(tmp_path / "bf16").keys()
