"""``[[optimizer.groups]]``: what holds for which parameter at which step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kempnerforge.config import ConfigError, JobConfig, load_config, to_toml
from kempnerforge.config.optimizer import OptimizerGroup
from kempnerforge.training.optimizer import Settings, settings, state_copies
from kempnerforge.vlm.base import VLM
from kempnerforge.vlm.build import build_model
from tests.training.tiny import make_job, optimizer_config, optimizers_of

NAMES = ["adapter.proj.weight", "adapter.proj.bias", "transformer.norm.weight", "vision_encoder.norm.weight"]
ALIASES = {"adapter": ["adapter.*"], "vision_encoder": ["vision_encoder.*"]}

JOB = """
[scheduler]
name = "constant"
warmup_steps = 2

[[optimizer.groups]]
module = "vision_encoder"
lr = 1e-4
warmup_steps = 4
[[optimizer.groups]]
module = "vision_encoder.norm.*"
betas = [0.5, 0.75]

[[stages]]
name = "a"
steps = 5
[[stages]]
name = "b"
steps = 5
optimizer.lr = 2e-3
[[stages.optimizer.groups]]
module = "adapter"
lr = 5e-3
weight_decay = 0.5
warmup_steps = 0
"""


def job_and_model(folder: Path, *overrides: str) -> tuple[JobConfig, VLM]:
    config = make_job(folder, extra=JOB)
    job = load_config(config, ["--optimizer.lr=0.01", "--train.max_steps=0", *overrides])
    job = replace(job, model=replace(job.model, vocab_size=100))
    return job, build_model(job)


def test_later_groups_win_key_by_key_and_the_scale_multiplies():
    cfg = optimizer_config(
        "adamw",
        lr=1e-2,
        betas=(0.9, 0.99),
        weight_decay=0.1,
        groups=[
            OptimizerGroup("adapter", lr=1e-3, weight_decay=0.2),
            OptimizerGroup("*.bias", lr=1e-4, betas=(0.5, 0.6)),
            OptimizerGroup("adapter.*", warmup_steps=7, muon_lr=0.5),
        ],
        lr_scale={"adapter": 0.5, "vision_encoder": 0.0},
    )
    assert settings(NAMES, cfg, ALIASES) == {
        "adapter.proj.weight": Settings(0.5e-3, 0.25, 0.2, (0.9, 0.99), 7),
        "adapter.proj.bias": Settings(0.5e-4, 0.25, 0.2, (0.5, 0.6), 7),
        "transformer.norm.weight": Settings(1e-2, 0.02, 0.1, (0.9, 0.99), None),
        "vision_encoder.norm.weight": Settings(0.0, 0.0, 0.1, (0.9, 0.99), None),
    }


def test_a_group_without_a_hit_is_named():
    cfg = optimizer_config("adamw", groups=[OptimizerGroup("adapter", lr=1.0), OptimizerGroup("adaptor", lr=1.0)])
    with pytest.raises(ValueError, match=r"optimizer.groups\[1\].module = 'adaptor': matches no parameter; .*adapter"):
        settings(NAMES, cfg, ALIASES)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("lr = 1.0", "module: missing"),
        ('module = "adapter"', "changes nothing"),
        ('module = "adapter"\nlr = -1.0', r"lr = -1.0: must be >= 0"),
        ('module = "adapter"\nwarmup_steps = -1', "warmup_steps = -1: must be >= 0"),
        ('module = "adapter"\nbetas = [0.9, 1.0]', r"betas = \[0.9, 1.0\]: must lie in \[0, 1\)"),
        ('module = "adapter"\nmomentum = 0.5', "momentum = 0.5: unknown key"),
    ],
)
@pytest.mark.parametrize("where", ["[[optimizer.groups]]", '[[stages]]\nname = "a"\nsteps = 1\n[[stages.optimizer.groups]]'])
def test_wrong_groups_are_refused_when_the_config_is_read(where: str, table: str, message: str, tmp_path: Path):
    path = make_job(tmp_path, extra=f"\n{where}\n{table}\n")
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "groups[0]" in str(caught.value) or "groups.0" in str(caught.value) or "groups #1" in str(caught.value), caught.value


def test_groups_survive_the_way_to_toml_and_back(tmp_path: Path):
    job, _ = job_and_model(tmp_path, "--optimizer.groups.0.lr=3e-4", "--stages.1.optimizer.groups.0.lr=4e-3")
    (tmp_path / "again.toml").write_text(to_toml(job))
    assert load_config(tmp_path / "again.toml") == job
    first, second = (stage.optimizer.groups for stage in job.resolved_stages())
    assert [g.lr for g in first] == [3e-4, None] and second == [OptimizerGroup("adapter", lr=4e-3, weight_decay=0.5, warmup_steps=0)]


def test_hyper_parameters_are_a_function_of_the_step(tmp_path: Path):
    """A stage's groups replace the section's; each warm-up begins again with the stage."""
    job, model = job_and_model(tmp_path)
    optimizers, stages = optimizers_of(job, model), job.resolved_stages()
    expected = {  # step: learning rates of encoder, adapter, rest; weight decay of the adapter
        0: (1e-4 / 4, 0.01 / 2, 0.01 / 2, 0.05),
        1: (2e-4 / 4, 0.01, 0.01, 0.05),
        2: (3e-4 / 4, 0.01, 0.01, 0.05),
        4: (1e-4, 0.01, 0.01, 0.05),
        5: (1e-3, 5e-3, 1e-3, 0.5),
        9: (2e-3, 5e-3, 2e-3, 0.5),
    }
    for step in (9, 4, 0, 1, 5, 2):  # in any order
        stage = stages[step >= 5]
        assert optimizers.set_step(stage, step) == pytest.approx({"lr": expected[step][2]})
        groups = {id(p): g for o in optimizers.all for g in o.param_groups for p in g["params"]}
        of = {name: groups[id(p)] for name, p in model.named_parameters()}
        encoder, adapter, rest = (
            of[n] for n in ("vision_encoder.layers.0.mlp.fc1.weight", "adapter.proj.weight", "transformer.token_embedding.weight")
        )
        assert (encoder["lr"], adapter["lr"], rest["lr"], adapter["weight_decay"]) == pytest.approx(expected[step]), step
        assert of["adapter.proj.bias"]["weight_decay"] == 0.0 and encoder["betas"] == rest["betas"] == (0.9, 0.95)
        assert of["vision_encoder.norm.weight"]["betas"] == ((0.5, 0.75) if step < 5 else (0.9, 0.95))
        assert of["vision_encoder.norm.weight"]["lr"] == encoder["lr"]


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "schedule_free_adamw"])
def test_groups_partition_all_parameters_whatever_steps_them(name: str, tmp_path: Path):
    job, model = job_and_model(tmp_path, f"--optimizer.name={name}", "--optimizer.groups.1.betas=[0.9, 0.75]")
    optimizers = optimizers_of(job, model)
    members = [id(p) for o in optimizers.all for g in o.param_groups for p in g["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters())


def adamw(w: Tensor, grads: list[Tensor], hyper: list[tuple[float, float, float, float]]) -> Tensor:
    """Loshchilov and Hutter 2019, algorithm 2, in float64. ``hyper``: of each step (lr, decay, beta1, beta2); eps is 1e-8."""
    w, m, v = w.double(), torch.zeros(w.shape).double(), torch.zeros(w.shape).double()
    for t, (grad, (lr, decay, beta1, beta2)) in enumerate(zip(grads, hyper, strict=True), 1):
        m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
        w = w - lr * decay * w - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + 1e-8)
    return w


def test_ten_steps_by_hand(tmp_path: Path):
    job, model = job_and_model(tmp_path)
    optimizers = optimizers_of(job, model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads: dict[str, list[Tensor]] = {name: [] for name in start}
    for step in range(10):
        for index, (name, p) in enumerate(model.named_parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + index))
            grads[name].append(p.grad.double())
        optimizers.set_step(job.resolved_stages()[step >= 5], step)
        optimizers.step()
    for name, p in model.named_parameters():
        hyper = []
        for step in range(10):
            first, into = step < 5, step % 5
            encoder, adapter = name.startswith("vision_encoder."), name.startswith("adapter.")
            lr = (1e-4 if encoder else 0.01) if first else (5e-3 if adapter else 2e-3)
            rise = 4 if encoder and first else 0 if adapter and not first else 2
            decay = 0.5 if adapter and not first else 0.05
            betas = (0.5, 0.75) if first and name.startswith("vision_encoder.norm.") else (0.9, 0.95)
            hyper.append((lr * (min(1, (into + 1) / rise) if rise else 1), decay if p.ndim > 1 else 0.0, *betas))
        torch.testing.assert_close(p.double(), adamw(start[name], grads[name], hyper), rtol=1e-4, atol=1e-6, msg=name)


def test_state_copies(tmp_path: Path):
    _, model = job_and_model(tmp_path)
    muon, norm = "adapter.proj.weight", "transformer.norm.weight"
    for name, ema, expected in (
        ("adamw", False, (2, 2)),
        ("muon", True, (2, 3)),
        ("lion", True, (2, 2)),
        ("schedule_free_adamw", False, (2, 2)),
    ):
        copies = state_copies(model, optimizer_config(name), ema)
        assert copies.keys() == dict(model.named_parameters()).keys() and (copies[muon], copies[norm]) == expected
