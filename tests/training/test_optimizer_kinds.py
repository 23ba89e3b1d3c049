"""Lion and schedule-free AdamW: against their papers, against the authors' libraries, and in a run that stops, changes hands and freezes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kempnerforge.training.optimizer import Optimizers
from kempnerforge.training.optimizers.lion import Lion
from kempnerforge.training.optimizers.schedule_free_adamw import ScheduleFreeAdamW
from tests.params import quick
from tests.training.tiny import a_trainer, assert_same_tensors, call, make_job, plain, random_tensors, tensors, two_ranks, weights_of

SHAPES = [(8, 24), (5, 3), (7,), (1, 1)]
LRS = [0.002, 0.004, 0.01, 0.01, 0.003, 0.01, 0.0, 0.02]
"""Of eight steps: up, down, nothing, up again."""
DECAY, EPS = 0.1, 1e-8


def tensors_of(seed: int) -> list[Tensor]:
    return random_tensors(SHAPES, seed)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], lrs: list[float] = LRS) -> None:
    for step, lr in enumerate(lrs):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p, grad in zip(params, tensors_of(100 + step), strict=True):
            p.grad = grad.clone()
        optimizer.step()


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(value) for value in tensors_of(0)]


def lion_by_hand(w: Tensor, grads: list[Tensor], beta1: float, beta2: float) -> Tensor:
    """Chen et al. 2023, algorithm 2."""
    m = torch.zeros_like(w)
    for grad, lr in zip(grads, LRS, strict=True):
        w = w - lr * ((beta1 * m + (1 - beta1) * grad).sign() + DECAY * w)
        m = beta2 * m + (1 - beta2) * grad
    return w


def schedule_free_by_hand(w: Tensor, grads: list[Tensor], beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """Defazio et al. 2024, algorithm 1, with all three sequences; returns y and x."""
    x, z, v, total, peak = w, w, torch.zeros_like(w), 0.0, 0.0
    y = (1 - beta1) * z + beta1 * x
    for t, (grad, lr) in enumerate(zip(grads, LRS, strict=True), 1):
        v = beta2 * v + (1 - beta2) * grad**2
        z = z - lr * (grad / ((v / (1 - beta2**t)).sqrt() + EPS) + DECAY * y)
        peak = max(peak, lr)
        total += peak**2
        x = (1 - peak**2 / total) * x + peak**2 / total * z
        y = (1 - beta1) * z + beta1 * x
    return y, x


def doubles(index: int) -> tuple[Tensor, list[Tensor]]:
    """Start and gradients of a parameter, in float64."""
    return tensors_of(0)[index].double(), [tensors_of(100 + step)[index].double() for step in range(len(LRS))]


def test_lion_is_that_of_the_paper():
    params = parameters()
    run(Lion(params, betas=(0.9, 0.99), weight_decay=DECAY), params)
    for index, p in enumerate(params):
        torch.testing.assert_close(p.double(), lion_by_hand(*doubles(index), 0.9, 0.99), rtol=1e-5, atol=1e-6)


def test_schedule_free_is_that_of_the_paper():
    params = parameters()
    optimizer = ScheduleFreeAdamW(params, betas=(0.8, 0.95), eps=EPS, weight_decay=DECAY)
    run(optimizer, params)
    averages = optimizer.average()
    for index, p in enumerate(params):
        y, x = schedule_free_by_hand(*doubles(index), 0.8, 0.95)
        torch.testing.assert_close(p.double(), y, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(averages[p].double(), x, rtol=1e-5, atol=1e-6)
        assert (x - y).abs().max() > 1e-3


def test_lion_is_that_of_the_library():
    library = pytest.importorskip("lion_pytorch.foreach")
    ours, theirs = parameters(), parameters()
    run(Lion(ours, betas=(0.9, 0.99), weight_decay=DECAY), ours)
    run(library.Lion(theirs, betas=(0.9, 0.99), weight_decay=DECAY), theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_schedule_free_is_that_of_the_library():
    library = pytest.importorskip("schedulefree")
    ours, theirs = parameters(), parameters()
    mine = ScheduleFreeAdamW(ours, betas=(0.9, 0.99), eps=EPS, weight_decay=DECAY)
    oracle = library.AdamWScheduleFree(theirs, betas=(0.9, 0.99), eps=EPS, weight_decay=DECAY)
    oracle.train()
    run(mine, ours)
    run(oracle, theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    oracle.eval()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.average()[a], b, rtol=1e-5, atol=1e-6)


KINDS: list[Callable[..., torch.optim.Optimizer]] = [Lion, ScheduleFreeAdamW]


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_group_rests_and_one_that_begins_late_has_a_history_of_its_own(kind: Callable[..., torch.optim.Optimizer]):
    """In one group with another parameter, and in a group of its own."""
    early, late, alone = (nn.Parameter(torch.ones(4)) for _ in range(3))
    apart = nn.Parameter(torch.ones(4))
    together = kind([{"params": [early, late]}, {"params": [apart]}], lr=0.01, weight_decay=DECAY)
    single = kind([alone], lr=0.01, weight_decay=DECAY)
    for step in range(6):
        grad = torch.randn(4, generator=torch.Generator().manual_seed(step))
        early.grad = grad
        if step >= 3:
            late.grad, apart.grad, alone.grad = grad.clone(), grad.clone(), grad.clone()
            single.step()
        together.step()
        if step < 3:
            assert torch.equal(late, torch.ones(4)) and late not in together.state and apart not in together.state
            assert not torch.equal(early, torch.ones(4))
    assert torch.equal(late, alone) and torch.equal(apart, alone) and not torch.equal(early, late)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_left_as_they_are(kind: Callable[..., torch.optim.Optimizer]):
    params = parameters()
    optimizer = kind(params, lr=0.01, weight_decay=DECAY)
    for p, grad in zip(params, tensors_of(1), strict=True):
        p.grad = grad.clone()
    optimizer.step()
    for p, grad in zip(params, tensors_of(1), strict=True):
        assert p.grad is not None and torch.equal(p.grad, grad)


def test_without_a_learning_rate_nothing_moves_and_nothing_is_divided_by_zero():
    for kind in KINDS:
        params = parameters()
        run(kind(params, weight_decay=DECAY), params, [0.0, 0.0])
        assert all(torch.equal(p, start) for p, start in zip(params, tensors_of(0), strict=True))


# ---- in a run --------------------------------------------------------------------------------------------------------

STAGED = """
[scheduler]
name = "constant"
warmup_steps = 2

[[optimizer.groups]]
module = "adapter"
lr = 1e-3
warmup_steps = 1

[[stages]]
name = "align"
steps = 3
freeze = [{ module = "vision_encoder" }, { module = "transformer.layers.0.*" }]

[[stages]]
name = "finetune"
steps = 3
optimizer.lr = 5e-4
freeze = [{ module = "adapter" }]
"""
NAMES = ["adamw", "muon", "lion", "schedule_free_adamw"]
COMMON = ("--train.max_steps=0", "--checkpoint.interval=0", "--eval.at_end=false")


@pytest.mark.parametrize("name", quick(NAMES, "schedule_free_adamw"))
def test_resumed_in_and_between_stages_is_bitwise_the_same(name: str, tmp_path: Path):
    argv = ("train", make_job(tmp_path, extra=STAGED), *COMMON, f"--optimizer.name={name}")
    assert call(*argv, f"--run.dir={tmp_path}/whole").code == 0
    for cut in (1, 3, 4, 6):
        ended = call(*argv, f"--train.max_steps={cut}")
        assert ended.code == 0, ended
    assert_same_tensors(tensors(tmp_path / "run"), tensors(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("name", "ema"), quick([("lion", 0.6), ("schedule_free_adamw", 0)], ("schedule_free_adamw", 0)))
def test_two_ranks_equal_one_process_that_accumulates_also_when_they_take_over(name: str, ema: float, tmp_path: Path):
    """One process, two ranks that evaluate after every step, one process again, with the same micro-batches. (Clipping would add the
    rounding of a norm that is summed by shards.)
    """
    argv = ("train", make_job(tmp_path, extra=STAGED), *COMMON, "--train.grad_clip_norm=0", f"--optimizer.name={name}")
    argv, one = (*argv, f"--train.ema_decay={ema}"), "--train.grad_accum_steps=2"
    assert call(*argv, one, f"--run.dir={tmp_path}/whole").code == 0
    assert call(*argv, one, "--train.max_steps=1").code == 0
    ended = two_ranks(*argv, "--train.max_steps=5", "--eval.interval=1", "--eval.samples=2", "--eval.blind=false")
    assert ended.code == 0, ended
    assert call(*argv, one).code == 0
    stored = tensors(tmp_path / "whole")
    assert any(name.startswith("averaged.") for name in stored)
    assert_same_tensors(tensors(tmp_path / "run"), stored)


def staged(folder: Path, *overrides: str):
    from kempnerforge.config import load_config

    return load_config(make_job(folder, extra=STAGED), ["--train.max_steps=0", *overrides])


def test_schedule_free_reset_goes_on_from_the_average(tmp_path: Path):
    with a_trainer(staged(tmp_path, "--optimizer.name=schedule_free_adamw")) as trainer:
        trainer.apply_freeze()
        for _ in range(2):
            trainer.train_step()
            trainer.step += 1
        before = weights_of(trainer)
        averages = {name: plain(value).clone() for name, value in trainer.optimizers.averages().items()}
        assert averages and any(not torch.equal(value, before[name]) for name, value in averages.items())
        trainer.optimizers.reset()
        assert_same_tensors(weights_of(trainer), before | averages)
        assert not trainer.optimizers.averages() and not any(o.state for o in trainer.optimizers.all)


@pytest.mark.slow
def test_schedule_free_reset_where_parts_freeze_is_a_second_run(tmp_path: Path):
    """The adapter, which the second stage freezes, stays at its average from the boundary on, as it does in a run that begins with the first."""
    cfg = make_job(tmp_path, extra=STAGED)
    argv = ("train", cfg, *COMMON, "--checkpoint.interval=1", "--optimizer.name=schedule_free_adamw")
    assert call(*argv, "--stages.1.optimizer.moments=reset", f"--run.dir={tmp_path}/both").code == 0
    assert call(*argv, "--train.max_steps=3", f"--run.dir={tmp_path}/first").code == 0
    first, last = STAGED.index("[[stages]]"), STAGED.rindex("[[stages]]")
    alone = make_job(tmp_path, extra=STAGED[:first] + STAGED[last:])
    ended = call("train", alone, *argv[2:], f"--run.init_from={tmp_path}/first", f"--run.dir={tmp_path}/second")
    assert ended.code == 0, ended
    both, averages = tensors(tmp_path / "both"), tensors(tmp_path / "first")
    assert_same_tensors(both, tensors(tmp_path / "second"))
    frozen = [name for name in both if name.startswith("model.adapter.")]
    assert frozen and all(torch.equal(both[name], averages[name.replace("model.", "averaged.", 1)]) for name in frozen)


def test_schedule_free_wants_one_first_beta_above_zero(tmp_path: Path):
    name = "--optimizer.name=schedule_free_adamw"
    with pytest.raises(ValueError, match=r"betas = \[0.0, 0.9\]: the first one must be > 0"):
        staged(tmp_path, name, "--optimizer.betas=[0.0, 0.9]")
    job = staged(tmp_path, name, "--stages.1.optimizer.betas=[0.5, 0.9]")
    with pytest.raises(ValueError, match=r"optimizer.betas: the first one is \[0.5, 0.9\] in different stages"):
        Optimizers(nn.Linear(2, 2), job.resolved_stages(), {"adapter": ["*"]})
    staged_beta2 = staged(tmp_path, name, "--stages.1.optimizer.betas=[0.9, 0.99]")
    Optimizers(nn.Linear(2, 2), staged_beta2.resolved_stages(), {"adapter": ["*"]})
