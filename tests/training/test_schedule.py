from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from kempnerforge.config import ConfigError, load_config, registry
from tests.training.tiny import make_job, scheduler_config

NAMES = registry.schedules.names()


@given(
    st.sampled_from(NAMES),
    st.integers(1, 300),
    st.integers(0, 300),
    st.floats(0, 1),
    st.floats(0, 1),
    st.none() | st.integers(0, 300),
)
@example("cosine", 20, 10, 0.0, 0.2, None)
@example("wsd", 1, 0, 0.0, 0.2, None)
@example("linear", 7, 7, 0.1, 0.2, 0)
@example("wsd", 9, 0, 0.1, 1.0, None)
def test_a_factor_rises_to_the_peak_and_falls_to_its_foot(name: str, steps: int, warmup: int, floor: float, share: float, own: int | None):
    """Over every schedule, also with a warm-up of a group's own: peak exactly 1 where the warm-up ends, foot exactly at the last step."""
    cfg = scheduler_config(name, warmup_steps=warmup, min_lr_ratio=floor, decay_fraction=share)
    rising = max(1, warmup if own is None else own)
    assume(rising <= steps and (name != "wsd" or rising <= cfg.decay_start(steps, rising)))
    factors = [cfg.factor(step, steps, own) for step in range(steps)]
    assert factors[:rising] == [(step + 1) / rising for step in range(rising)] and factors[rising - 1] == 1.0
    after = factors[rising - 1 :]
    assert all(later <= now and floor <= now <= 1 for now, later in pairwise(after))
    decays = name in ("cosine", "linear") or (name == "wsd" and share > 0)
    assert after[-1] == pytest.approx(floor if decays and len(after) > 1 else 1.0, abs=1e-12)
    if name == "wsd":
        flat = cfg.decay_start(steps, rising)
        assert set(factors[rising - 1 : flat]) == {1.0} and all(f < 1.0 for f in factors[flat:] if floor < 1)


def transformers_rates(schedule: Callable[..., torch.optim.lr_scheduler.LRScheduler], steps: int, **settings: object) -> list[float]:
    """The rates of its steps 0 to ``steps``, for a peak of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler, rates = schedule(optimizer, **settings), []
    for _ in range(steps + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("warmup", "steps"), [(1, 12), (4, 20), (10, 20), (19, 20)])
@pytest.mark.parametrize("name", ["cosine", "cosine with a floor", "linear", "wsd", "constant"])
def test_the_closed_forms_are_those_of_transformers_one_step_on(name: str, warmup: int, steps: int):
    """Their step 0 has a rate of 0: it moves nothing. Ours begins with their step 1 and so arrives at the foot, their step ``steps``, too."""
    optimization = pytest.importorskip("transformers").optimization
    decay = steps - scheduler_config("wsd", decay_fraction=0.05).decay_start(steps, warmup)
    ours, schedule, settings = {
        "cosine": (scheduler_config("cosine", min_lr_ratio=0.0), "get_cosine_schedule_with_warmup", {"num_training_steps": steps}),
        "cosine with a floor": (
            scheduler_config("cosine", min_lr_ratio=0.1),
            "get_cosine_with_min_lr_schedule_with_warmup",
            {"num_training_steps": steps, "min_lr_rate": 0.1},
        ),
        "linear": (scheduler_config("linear", min_lr_ratio=0.0), "get_linear_schedule_with_warmup", {"num_training_steps": steps}),
        "wsd": (
            scheduler_config("wsd", min_lr_ratio=0.0, decay_fraction=0.05),
            "get_wsd_schedule",
            {"num_stable_steps": steps - warmup - decay, "num_decay_steps": decay, "decay_type": "linear"},
        ),
        "constant": (scheduler_config("constant"), "get_constant_schedule_with_warmup", {}),
    }[name]
    theirs = transformers_rates(getattr(optimization, schedule), steps, num_warmup_steps=warmup, **settings)
    assert [ours.factor(step, steps, warmup) for step in range(steps)] == pytest.approx(theirs[1:], abs=1e-12)


def test_without_warmup_the_first_step_has_the_peak():
    for name in NAMES:
        cfg = scheduler_config(name, min_lr_ratio=0.2, decay_fraction=0.5)
        expected = {
            "cosine": [1, 0.8, 0.4, 0.2],
            "linear": [1, 1 - 0.8 / 3, 1 - 1.6 / 3, 0.2],
            "wsd": [1, 1, 0.6, 0.2],
            "constant": [1] * 4,
        }
        assert [cfg.factor(step, 4) for step in range(4)] == pytest.approx(expected[name]), name
        assert cfg.factor(0, 1) == 1.0, "a stage of one step"
        assert cfg.factor(99, 4) == pytest.approx(expected[name][-1]), "after the end it stays at the foot"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--scheduler.warmup_steps=9"],
            "[scheduler] warmup_steps = 9: with the 2 steps that 'wsd' decays in that is more than the 10 there",
        ),
        (['--optimizer.groups=[{module="adapter", warmup_steps=9}]'], "optimizer.groups of 'adapter': warmup_steps = 9: with the 2 steps"),
        (['--stages=[{name="a", steps=10}, {name="b", steps=5}]', "--scheduler.warmup_steps=5"], "with the 1 steps that 'wsd' decays in"),
    ],
)
def test_warmup_and_decay_do_not_overlap(overrides: list[str], message: str):
    given = ["--scheduler.name=wsd", "--vlm.arch=joint_decoder", "--train.max_steps=10", *overrides]
    with pytest.raises(ConfigError) as caught:
        load_config(None, given)
    assert message in str(caught.value)
    load_config(None, [word.replace("=9", "=8").replace("warmup_steps=5", "warmup_steps=4") for word in given])


def test_a_stage_cut_short_keeps_its_learning_rate(tmp_path: Path):
    """The schedule is a function of the planned steps, so that ``train.max_steps`` only ends it early."""
    job = make_job(tmp_path, extra='\n[[stages]]\nname = "a"\nsteps = 10\n[[stages]]\nname = "b"\nsteps = 20\n')
    whole, short = (load_config(job, [f"--train.max_steps={n}"]).resolved_stages() for n in (30, 13))
    assert [s.end for s in whole] == [10, 30] and [s.end for s in short] == [10, 13]
    for step in range(10, 13):
        factors = {s[1].scheduler.factor(step - s[1].start, s[1].planned_steps) for s in (whole, short)}
        assert len(factors) == 1
