"""Averages of the weights: what they are, that evaluation sees them, and that training does not notice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kempnerforge.checkpoint import load_weights, resolve
from kempnerforge.config import JobConfig, load_config
from kempnerforge.training.ema import Ema
from kempnerforge.training.setup import assemble
from kempnerforge.training.trainer import Trainer
from tests.training.tiny import (
    Recorder,
    a_trainer,
    assert_same_tensors,
    call,
    make_job,
    plain,
    tensors,
    weights_of,
)

STAGED = """
[[stages]]
name = "align"
steps = 3
freeze = [{ module = "vision_encoder" }, { module = "transformer" }]

[[stages]]
name = "finetune"
steps = 3
freeze = [{ module = "adapter" }, { module = "vision_encoder.norm.*" }]
"""
EMA = "--train.ema_decay=0.6"
SCHEDULE_FREE = "--optimizer.name=schedule_free_adamw"
COMMON = ("--train.max_steps=0", "--checkpoint.interval=0")


def job_of(folder: Path, *overrides: str) -> JobConfig:
    return load_config(make_job(folder, extra=STAGED), [*COMMON, *overrides])


def test_ema_by_its_formula():
    """From the first step on, whatever happens to the parameter afterwards."""
    moving, resting, late = (nn.Parameter(torch.full((3,), v)) for v in (1.0, 2.0, 3.0))
    ema, expected = Ema(0.9), {moving: 1.0, late: 3.0}
    for step in range(30):
        moving.grad = torch.ones(3) if step < 20 else None
        late.grad = torch.ones(3) if step >= 10 else None
        ema.begin([moving, resting, late])
        with torch.no_grad():
            moving += moving.grad if moving.grad is not None else 0
            late -= 0.5 if late.grad is not None else 0
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for p in expected:
            expected[p] = decay * expected[p] + (1 - decay) * float(p.detach()[0])
        averages = ema.average()
        assert set(averages) == ({moving, late} if step >= 10 else {moving})
        for p, average in averages.items():
            torch.testing.assert_close(average, torch.full((3,), expected[p]), rtol=1e-5, atol=0)
    assert 0.05 < 21.0 - expected[moving] < 1.0


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_a_decay_that_is_none_is_refused(value: float, tmp_path: Path):
    with pytest.raises(ValueError, match=rf"ema_decay = {value}: must lie in \[0, 1\)"):
        job_of(tmp_path, f"--train.ema_decay={value}")


def test_two_averages_are_refused(tmp_path: Path):
    ended = call("train", make_job(tmp_path, extra=STAGED), *COMMON, EMA, SCHEDULE_FREE)
    assert ended.code == 2 and "'schedule_free_adamw' keeps an average itself" in ended.err, ended


def test_averages_of_a_run(tmp_path: Path):
    """Against the weights after every step; a parameter that never trains has none."""
    recorder = Recorder()
    with a_trainer(job_of(tmp_path, EMA), [recorder]) as trainer:
        trainer.fit()
        averages = {name: plain(value) for name, value in trainer.optimizers.averages().items()}
    assert set(trainer.names) - set(averages) == {"vision_encoder.norm.weight", "vision_encoder.norm.bias"}
    expected = {name: recorder.weights[0][name].double() for name in averages}
    for step, weights in enumerate(recorder.weights[1:]):
        decay = min(0.6, (1 + step) / (10 + step))
        expected = {name: decay * value + (1 - decay) * weights[name] for name, value in expected.items()}
    for name, value in averages.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7, msg=name)


def predictions(trainer: Trainer) -> Tensor:
    """The loss of a batch, as an evaluation would see it."""
    batch = next(trainer.assembly.data.batches(trainer.stages[0], 0))
    with torch.no_grad():
        return trainer.model(batch).loss.clone()


@pytest.mark.parametrize("average", [EMA, SCHEDULE_FREE])
def test_inside_the_model_is_the_average_and_afterwards_what_it_was(average: str, tmp_path: Path):
    job = job_of(tmp_path, average)
    with a_trainer(job) as trainer:
        trainer.apply_freeze()
        for _ in range(3):
            trainer.train_step()
            trainer.step += 1
        before, outside = weights_of(trainer), predictions(trainer)
        averages = {name: plain(value).clone() for name, value in trainer.optimizers.averages().items()}
        assert averages and any(not torch.equal(value, before[name]) for name, value in averages.items())
        with pytest.raises(RuntimeError, match="in the middle"), trainer.optimizers.averaged():
            assert_same_tensors(weights_of(trainer), before | averages)
            inside = predictions(trainer)
            raise RuntimeError("in the middle")
        assert_same_tensors(weights_of(trainer), before)
        assert torch.equal(predictions(trainer), outside) and not torch.equal(inside, outside)
    model = assemble(job).model
    model.load_state_dict({**model.state_dict(), **before, **averages})
    batch = next(trainer.assembly.data.batches(trainer.stages[0], 0))
    with torch.no_grad():
        torch.testing.assert_close(model(batch).loss, inside, rtol=1e-6, atol=0)


def test_without_an_average_evaluation_sees_the_weights(tmp_path: Path):
    with a_trainer(job_of(tmp_path)) as trainer:
        before = weights_of(trainer)
        assert trainer.optimizers.averages() == {}
        with trainer.optimizers.averaged():
            assert_same_tensors(weights_of(trainer), before)


@pytest.mark.parametrize("average", [EMA, SCHEDULE_FREE])
def test_evaluations_and_interruptions_change_nothing(average: str, tmp_path: Path):
    argv = ("train", make_job(tmp_path, extra=STAGED), *COMMON, average)
    assert call(*argv, "--eval.at_end=false", f"--run.dir={tmp_path}/unseen").code == 0
    for cut in (2, 3, 4, 6):
        assert call(*argv, "--eval.interval=1", "--eval.samples=1", "--eval.blind=false", f"--train.max_steps={cut}").code == 0
    stored = tensors(tmp_path / "unseen")
    assert any(name.startswith("averaged.") for name in stored)
    assert_same_tensors(tensors(tmp_path / "run"), stored)


@pytest.mark.parametrize("average", [EMA, SCHEDULE_FREE])
def test_whoever_uses_the_checkpoint_gets_the_averages(average: str, tmp_path: Path):
    job = make_job(tmp_path, extra=STAGED)
    assert call("train", job, *COMMON, average, "--eval.at_end=false").code == 0
    stored = tensors(tmp_path / "run")
    averages = {name.removeprefix("averaged."): value for name, value in stored.items() if name.startswith("averaged.")}
    trained = {name.removeprefix("model."): value for name, value in stored.items() if name.startswith("model.")}
    assert any(not torch.equal(value, trained[name]) for name, value in averages.items())
    model = assemble(load_config(job, [*COMMON, average])).model
    load_weights(resolve(tmp_path / "run"), model)
    assert_same_tensors({name: p.detach() for name, p in model.named_parameters()}, trained | averages)
    assert (
        call("train", job, "--train.max_steps=1", f"--run.init_from={tmp_path}/run", f"--run.dir={tmp_path}/next", "--optimizer.lr=0").code
        == 0
    )
    begun = {name: value for name, value in tensors(tmp_path / "next").items() if name.startswith("model.")}
    assert_same_tensors(begun, {f"model.{name}": value for name, value in (trained | averages).items()})
