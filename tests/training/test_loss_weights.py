"""Weights of trained tokens by the part of the mixture that they are from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from kempnerforge.config import load_config
from kempnerforge.data.batching.batch import IGNORE, Batch
from kempnerforge.data.batching.collate import collate
from kempnerforge.data.batching.pack import join
from kempnerforge.data.sample import Sample
from tests.training.tiny import CONFIG, a_trainer, assert_same_tensors, call, make_job, metrics, tensors, two_ranks
from tests.vlm.tiny import INTERLEAVED, NO_IMAGE, ONE, THREE, TWICE, Tiny, all_logits, gradients, tiny

MIXTURE = """
weights = [0.5, 0.5]
loss_weights = [0.2, 1.0]

[[data.parts]]
source = "jsonl"
path = "{folder}/train.jsonl"
prompt_column = "prompt"

[[data.parts]]
source = "jsonl"
path = "{folder}/train.jsonl"
eval_path = "{folder}/test.jsonl"
prompt_column = "prompt"
answer_template = "it is {answer}"

[train]
"""
ONE_SOURCE = """source = "jsonl"
path = "{folder}/train.jsonl"
eval_path = "{folder}/test.jsonl"
prompt_column = "prompt"
"""
MIXED = CONFIG.replace(ONE_SOURCE, 'source = "mixture"\n').replace("\n[train]\n", MIXTURE)


def packed(it: Tiny, rows: Sequence[Sequence[tuple[Sample, int]]]) -> Batch:
    """Rows of samples, each with the number of its part."""
    joined = [join([replace(it.encode(sample), part=part) for sample, part in row]) for row in rows]
    return collate(joined, it.encoder.tokenizer.pad_id, None)


ROWS = (((THREE, 0), (ONE, 1), (NO_IMAGE, 0)), ((TWICE, 1), (INTERLEAVED, 2)))
WEIGHTS = [0.25, 1.0, 3.0]


@pytest.mark.parametrize("arch", ["joint_decoder", "cross_attention", "mot", "hf"])
def test_the_loss_is_the_weighted_mean_of_each_sample_alone(arch: str) -> None:
    it = tiny(arch)
    batch = packed(it, ROWS).weighted(WEIGHTS)
    each = [(it.batch(sample), WEIGHTS[part]) for row in ROWS for sample, part in row]
    weight = sum(weight * alone.num_targets for alone, weight in each)
    assert batch.weight == weight
    output = it.model(batch)
    output.mean(batch.weight, 0).backward()
    got = {name: p.grad.clone() for name, p in it.model.named_parameters() if p.grad is not None}
    it.model.zero_grad()
    want = torch.stack([factor * it.model(alone).loss for alone, factor in each]).sum() / weight
    want.backward()
    torch.testing.assert_close(output.mean(batch.weight, 0), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(got, {name: p.grad for name, p in it.model.named_parameters() if p.grad is not None}, rtol=1e-4, atol=1e-5)
    plain = sum(it.model(alone).loss.item() for alone, _ in each)
    assert float(output.loss) == pytest.approx(plain, rel=1e-5) and not output.loss.requires_grad, "for the record: all alike"


def test_by_hand() -> None:
    """Every trained position with its label and its sample."""
    it = tiny("joint_decoder")
    batch = packed(it, ROWS).weighted(WEIGHTS)
    losses = -all_logits(it.model, packed(it, ROWS)).log_softmax(-1)
    total = norm = 0.0
    for row, samples in enumerate(ROWS):
        for column in range(batch.labels.shape[1]):
            if (label := int(batch.labels[row, column])) != IGNORE:
                weight = WEIGHTS[samples[int(batch.sample_ids[row, column])][1]]
                total, norm = total + weight * float(losses[row, column, label]), norm + weight
    assert it.model(batch).mean(batch.weight, 0).item() == pytest.approx(total / norm, rel=1e-5)
    assert packed(it, ROWS).weighted([]).target_weights is None


class Auxiliary(nn.Linear):
    """A layer with a loss of 2 for each target."""

    aux_loss: torch.Tensor | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.aux_loss = 2 + 0 * self.weight.sum()
        return super().forward(input)


def test_auxiliary_losses_keep_their_size() -> None:
    it = tiny("joint_decoder")
    it.model.adapter.proj.fc1.__class__ = Auxiliary
    batch = packed(it, ROWS).weighted(WEIGHTS)
    output = it.model(batch)
    assert output.aux_loss is not None and output.weighted_loss is not None
    without = output.weighted_loss.item() / batch.weight
    assert output.mean(batch.weight, 0).item() == pytest.approx(without + 2, rel=1e-5)


def test_equal_weights_are_bitwise_none(tmp_path: Path) -> None:
    job = make_job(tmp_path, config=MIXED)
    for name, weights in (("none", "[]"), ("ones", "[1.0, 1.0]"), ("other", "[0.2, 1.0]")):
        argv = ("train", job, f"--data.loss_weights={weights}", f"--run.dir={tmp_path}/{name}", "--train.max_steps=3")
        assert call(*argv, "--eval.at_end=false").code == 0
    assert_same_tensors(tensors(tmp_path / "ones"), tensors(tmp_path / "none"))
    found = {name: [row for row in metrics(tmp_path / name) if "train/loss" in row] for name in ("none", "ones", "other")}
    assert found["none"] == found["ones"] and not any("train/weighted_loss" in row for row in found["none"])
    assert found["other"][0]["train/loss"] == pytest.approx(found["none"][0]["train/loss"], rel=1e-6), "counts all tokens alike"
    assert all(row["train/weighted_loss"] != row["train/loss"] for row in found["other"])
    assert found["other"][-1]["train/loss"] != found["none"][-1]["train/loss"]


def test_a_step_is_the_weighted_mean_over_its_micro_batches(tmp_path: Path) -> None:
    job = load_config(make_job(tmp_path, config=MIXED), ["--train.grad_accum_steps=2", "--train.grad_clip_norm=0", "--data.batching=pack"])
    with a_trainer(job) as trainer:
        trainer.apply_freeze()
        trainer.look_ahead()
        assert trainer._ahead is not None
        batches, model = trainer._ahead.batches, trainer.model
        assert {part for batch in batches for part in batch.parts} == {0, 1}
        weight = sum(batch.weight for batch in batches)
        parts = [model(batch).weighted_loss for batch in batches]
        assert all(part is not None for part in parts)
        want = sum(part.item() for part in parts if part is not None) / weight
        _, grads = gradients(model, *batches)
        scale = sum(batch.num_targets for batch in batches) / weight  # ``gradients`` divides by targets
        norm = torch.stack([(scale * grad).square().sum() for grad in grads.values()]).sum().sqrt()
        model.zero_grad()
        result = trainer.train_step()
        assert result.weighted_loss == pytest.approx(want, rel=1e-5) and result.grad_norm == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.dist
def test_two_ranks_equal_one_process_that_accumulates(tmp_path: Path) -> None:
    argv = ("train", make_job(tmp_path, config=MIXED), "--train.max_steps=4", "--train.grad_clip_norm=0", "--eval.at_end=false")
    assert call(*argv, "--train.grad_accum_steps=2", f"--run.dir={tmp_path}/one").code == 0
    ended = two_ranks(*argv, f"--run.dir={tmp_path}/two")
    assert ended.code == 0, ended
    assert_same_tensors(tensors(tmp_path / "two"), tensors(tmp_path / "one"))
    ones, twos = ([row for row in metrics(tmp_path / name) if "train/loss" in row] for name in ("one", "two"))
    for key in ("train/loss", "train/weighted_loss"):
        assert [row[key] for row in twos] == pytest.approx([row[key] for row in ones], rel=1e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("[1.0]", "loss_weights = [1.0]: must be 2, one for each of parts"),
        ("[-1.0, 1.0]", "none may be below 0"),
        ("[0.0, 1.0]", "loss_weights = [0.0, 1.0]: each must be at least 1e-12"),
        ("[1e-40, 1e-40]", "loss_weights = [1e-40, 1e-40]: each must be at least 1e-12"),
    ],
)
def test_weights_that_cannot_be(weights: str, message: str, tmp_path: Path) -> None:
    ended = call("check", make_job(tmp_path, config=MIXED), f"--data.loss_weights={weights}")
    assert ended.code == 2 and message in ended.err
