"""``metrics.diagnosis``: against norms computed by hand, FLOPs counted by torch, and a run without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kempnerforge.config import load_config
from kempnerforge.training.hooks.diagnosis import Diagnosis
from kempnerforge.training.trainer import Hook, StepResult, Trainer
from kempnerforge.vlm.parts import parts
from tests.training.tiny import a_trainer, assert_same_tensors, call, make_job, metrics, tensors, two_ranks, weights_of

ON = ("--metrics.diagnosis=true", "--metrics.peak_tflops=0.5", "--vlm.arch=cross_attention", "--vlm.cross_attention_every_n_layers=1")
TIMES = ("time/", "train/tflops_per_s", "train/mfu", "train/peak_memory_gib")


class Told(Hook):
    """Everything that is recorded, step by step, and the weights after it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.norms: list[float] = []

    def start(self, trainer: Trainer) -> None:
        self.weights.append(weights_of(trainer))

    def step(self, trainer: Trainer, result: StepResult) -> None:
        self.weights.append(weights_of(trainer))
        self.norms.append(result.grad_norm)

    def record(self, trainer: Trainer, values: dict[str, float]) -> None:
        self.rows.append(dict(values))


def test_norms_updates_and_gates_are_those_of_the_weights(tmp_path: Path) -> None:
    """Plain SGD would say it in one line; with AdamW the update is the difference of the weights, and the squares of the parts add up."""
    job = load_config(make_job(tmp_path), [*ON, "--train.max_steps=3", "--train.grad_clip_norm=0.1"])
    told = Told()
    with a_trainer(job, [Diagnosis(job.metrics), told]) as trainer:
        trainer.fit()
        by_part = parts(trainer.names)
    assert len(told.rows) == 3 and "transformer.layers.*.cross_attention" in by_part
    for step, row in enumerate(told.rows):
        assert sum(row[f"grad_norm/{part}"] ** 2 for part in by_part) == pytest.approx(told.norms[step] ** 2, rel=1e-5)
        for part, names in by_part.items():
            old, new = (torch.cat([told.weights[step + k][name].flatten() for name in names]) for k in (0, 1))
            assert row[f"update_ratio/{part}"] == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-4)
        gates = {key.removeprefix("gate/"): value for key, value in row.items() if key.startswith("gate/")}
        assert len(gates) >= 2 and all(value == float(told.weights[step + 1][name]) for name, value in gates.items())
    assert any(value for key, value in told.rows[-1].items() if key.startswith("gate/")), "they have moved"


def test_speed_is_flops_over_time(tmp_path: Path) -> None:
    """FLOPs by torch's counter around the step itself, vision tower included; the phases make up the step."""
    job = load_config(make_job(tmp_path), [*ON, "--train.max_steps=2"])
    told, seconds = Told(), []
    with a_trainer(job, [Diagnosis(job.metrics), told]) as trainer:
        for hook in trainer.hooks:
            hook.start(trainer)
        trainer.apply_freeze()
        with FlopCounterMode(display=False) as counter:
            seconds.append((result := trainer.train_step()).seconds)
        trainer.step += 1
        for hook in trainer.hooks:
            hook.step(trainer, result)
            hook.close()
    (row,) = told.rows
    assert row["train/tflops_per_s"] == pytest.approx(counter.get_total_flops() / seconds[0] / 1e12)
    assert row["train/mfu"] == pytest.approx(row["train/tflops_per_s"] / 0.5)
    phases = [row[f"time/{phase}_s"] for phase in ("data", "forward", "backward", "optimizer")]
    assert sum(phases) == pytest.approx(seconds[0]) and all(phase > 0 for phase in phases) and row["time/hooks_s"] == 0
    assert 0.05 < row["train/peak_memory_gib"] < 100


def test_nothing_that_is_trained_changes(tmp_path: Path) -> None:
    """Bitwise, with evaluations on the way; two ranks say what one says."""
    found = {}
    for name, words, train in (("off", ON[2:], call), ("on", ON, call), ("two", ON, two_ranks)):
        ended = train("train", make_job(tmp_path / name), *words, "--train.max_steps=4", "--eval.interval=2", "--metrics.interval=2")
        assert ended.code == 0, ended
        found[name] = tensors(tmp_path / name / "run")
    assert_same_tensors(found["off"], found["on"])
    off, on, two = (metrics(tmp_path / name / "run") for name in found)
    extra = [row for row in on if "time/forward_s" in row]
    assert [row for row in on if row not in extra] == off and [row["step"] for row in extra] == [2, 4]
    assert all(row["time/hooks_s"] > 0 for row in extra)
    others = [row for row in two if "time/forward_s" in row]
    for one, other in zip(extra, others, strict=True):
        told = [key for key in one if not key.startswith(TIMES)]
        assert len(told) > 8 and {key: other[key] for key in told} == pytest.approx({key: one[key] for key in told}, rel=1e-3, abs=1e-7)


def test_a_peak_without_diagnosis_is_refused(tmp_path: Path) -> None:
    ended = call("check", make_job(tmp_path), "--metrics.peak_tflops=1.0")
    assert ended.code == 2 and "peak_tflops = 1.0: only diagnosis = true reads it" in ended.err, ended.err
