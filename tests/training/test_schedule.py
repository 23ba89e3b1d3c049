from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kempnerforge.config import SchedulerConfig, load_config
from kempnerforge.training.schedule import DECAYS, lr_factor
from tests.training.tiny import make_job


@given(
    st.sampled_from(sorted(DECAYS)),
    st.integers(0, 50),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 300),
    st.data(),
)
def test_factor_lies_between_0_and_1_and_never_rises_after_warmup(
    name: str, warmup: int, floor: float, share: float, steps: int, data: st.DataObject
):
    cfg = SchedulerConfig(name=name, warmup_steps=warmup, min_lr_ratio=floor, decay_fraction=share)
    step = data.draw(st.integers(0, steps - 1))
    now, later = lr_factor(cfg, step, steps), lr_factor(cfg, step + 1, steps)
    assert 0 <= now <= 1
    if step >= warmup:
        assert later <= now + 1e-12 and now >= floor - 1e-12


def test_warmup_is_linear_and_its_first_step_moves():
    cfg = SchedulerConfig(name="constant", warmup_steps=4)
    assert [lr_factor(cfg, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert lr_factor(SchedulerConfig(name="constant"), 0, 10) == 1.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cosine", [1.0, 0.5 + 0.25 * math.sqrt(2), 0.5, 0.5 - 0.25 * math.sqrt(2), 0.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("wsd", [1.0, 1.0, 1.0, 0.5, 0.0]),
        ("constant", [1.0] * 5),
    ],
)
def test_shapes(name: str, expected: list[float]):
    cfg = SchedulerConfig(name=name, min_lr_ratio=0.0, decay_fraction=0.5)
    assert [lr_factor(cfg, step, 8) for step in (0, 2, 4, 6, 8)] == pytest.approx(expected)
    with_floor = SchedulerConfig(name=name, min_lr_ratio=0.2, decay_fraction=0.5)
    assert [lr_factor(with_floor, step, 8) for step in (0, 2, 4, 6, 8)] == pytest.approx([0.2 + 0.8 * e for e in expected])


def test_cosine_is_that_of_torch():
    cfg = SchedulerConfig(name="cosine", min_lr_ratio=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.1)
    for step in range(20):
        assert lr_factor(cfg, step, 20) == pytest.approx(oracle.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        oracle.step()


def test_a_stage_cut_short_keeps_its_learning_rate(tmp_path: Path):
    """The schedule is a function of the planned steps, so that ``train.max_steps`` only ends it early."""
    job = make_job(tmp_path, extra='\n[[stages]]\nname = "a"\nsteps = 10\n[[stages]]\nname = "b"\nsteps = 20\n')
    whole, short = (load_config(job, [f"--train.max_steps={n}"]).resolved_stages() for n in (30, 13))
    assert [s.end for s in whole] == [10, 30] and [s.end for s in short] == [10, 13]
    for step in range(10, 13):
        factors = {lr_factor(s[1].scheduler, step - s[1].start, s[1].planned_steps) for s in (whole, short)}
        assert len(factors) == 1
