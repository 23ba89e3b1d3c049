"""``metrics.diagnosis``: against norms computed by hand, FLOPs counted by torch, and a run without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kempnerforge.config import load_config
from kempnerforge.data.batching.batch import Batch, Kind
from kempnerforge.model.transformer import Block, Context
from kempnerforge.training.hooks.attention_share import AttentionShare
from kempnerforge.training.hooks.diagnosis import Diagnosis
from kempnerforge.training.trainer import Hook, StepResult, Trainer
from kempnerforge.vlm.parts import parts
from tests.training.tiny import (
    Recorder,
    a_trainer,
    assert_same_tensors,
    call,
    make_job,
    metrics,
    rows_of,
    tensors,
    two_ranks,
    weights_of,
    write_rows,
)

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


def shares(folder: Path, *words: str) -> dict[str, float]:
    """What the first step of a run with packed rows records of attention; in some rows the image is among the words."""
    path = make_job(folder)
    rows = [{**row, "prompt": f"here <image> {row['prompt']}"} if k % 3 else row for k, row in enumerate(rows_of(folder))]
    write_rows(folder / "train.jsonl", rows)
    job = load_config(
        path,
        [
            "--metrics.diagnosis=true",
            "--train.max_steps=1",
            "--data.batching=pack",
            "--train.seq_len=128",
            "--model.max_seq_len=128",
            *words,
        ],
    )
    told = Told()
    with a_trainer(job, [Recorder(lambda trainer: trainer.model.warm_start()), Diagnosis(job.metrics), told]) as trainer:
        trainer.fit()
        assert not any("attend" in vars(layer) for layer in trainer.model.transformer.layers), "layers are as they were"
    return {key: value for key, value in told.rows[0].items() if key.startswith("attention_on_images/")}


@pytest.mark.parametrize("mask", ["causal", "prefix"])
def test_the_share_of_attention_on_images_is_the_sum_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: str) -> None:
    """Of the first layer, written out; ``mot`` with towers that are copies, whose stream is sorted by modality, says the same."""
    by_hand: list[float] = []

    def look(block: Block, inputs: tuple[torch.Tensor, Context]) -> None:
        model, batch = now
        q, k, _ = block.pre(inputs[0], block.rope(inputs[1]))
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~model.segments(batch).visible(), float("-inf"))
        on_images = (scores.softmax(-1) * (batch.kinds == Kind.IMAGE)[:, None, None]).sum(-1).mean(1)  # (B, S)
        by_hand.append(float(on_images.detach().flatten()[batch.targets].mean()))

    watch = AttentionShare.watch

    def watched(self: AttentionShare, batch: Batch | None) -> None:
        if batch is not None:
            now[:] = [self._model, batch]
            self._model.transformer.layers[0].register_forward_pre_hook(look)
        watch(self, batch)

    now: list[Any] = []
    heads = (f"--vlm.attention_mask={mask}", "--model.n_kv_heads=1")
    with monkeypatch.context() as patched:
        patched.setattr(AttentionShare, "watch", watched)
        joint = shares(tmp_path / "joint", *heads)
    assert list(joint) == ["attention_on_images/0", "attention_on_images/1"] and 0.02 < joint["attention_on_images/0"] < 0.9
    assert joint["attention_on_images/0"] == pytest.approx(by_hand[0], rel=1e-5)
    mot = shares(tmp_path / "mot", *heads, "--vlm.arch=mot", "--vlm.mot_warm_start_from_text=true")
    assert mot == pytest.approx(joint, rel=1e-4)


def test_a_stream_of_words_alone_has_no_share(tmp_path: Path) -> None:
    assert shares(tmp_path, *ON[2:]) == {}


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
