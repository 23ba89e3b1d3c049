from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kempnerforge.config import JobConfig, load_config
from kempnerforge.training.optimizer import Optimizers, clip, holders, local_gradients, settings, squared_norm
from kempnerforge.training.optimizers.muon import Muon, MuonRule
from kempnerforge.vlm.base import VLM
from kempnerforge.vlm.build import build_model
from tests.training.tiny import make_job, optimizer_config, optimizers_of

STAGES = """
[[stages]]
name = "a"
steps = 4
[[stages]]
name = "b"
steps = 4
optimizer.lr = 1e-4
optimizer.weight_decay = 0.3
optimizer.lr_scale = { vision_encoder = 0.1, "vision_encoder.norm.*" = 0.5 }
"""


def job_and_model(folder: Path, *overrides: str, extra: str = STAGES) -> tuple[JobConfig, VLM]:
    job = load_config(make_job(folder, extra=extra), ["--optimizer.lr=0.01", "--train.max_steps=0", *overrides])
    job = replace(job, model=replace(job.model, vocab_size=100))
    return job, build_model(job)


def by_name(model: VLM, optimizers: Optimizers) -> dict[str, tuple[torch.optim.Optimizer, dict]]:
    owner = {id(p): (o, g) for o in optimizers.all for g in o.param_groups for p in g["params"]}
    return {name: owner[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_groups_partition_all_parameters_frozen_ones_too(name: str, tied: str, tmp_path: Path):
    job, model = job_and_model(tmp_path, f"--optimizer.name={name}", f"--model.tie_embeddings={tied}")
    for parameter in model.vision_encoder.parameters():
        parameter.requires_grad_(False)
    members = [id(p) for o in optimizers_of(job, model).all for g in o.param_groups for p in g["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters())


def test_muon_takes_linear_weights_and_neither_head_nor_embedding(tmp_path: Path):
    job, model = job_and_model(tmp_path, "--optimizer.name=muon", "--model.tie_embeddings=false")
    taken = {name for name, (o, _) in by_name(model, optimizers_of(job, model)).items() if isinstance(o, Muon)}
    assert taken == MuonRule().takes(model)
    assert taken == {n for n, p in model.named_parameters() if p.ndim == 2} - {
        "transformer.token_embedding.weight",
        "transformer.output_head.weight",
        "vision_encoder.position_embedding",
    }


def test_only_matrices_decay(tmp_path: Path):
    job, model = job_and_model(tmp_path, "--optimizer.name=muon")
    optimizers = optimizers_of(job, model)
    stages = job.resolved_stages()
    for stage, step, decay in ((stages[0], 0, 0.05), (stages[1], 4, 0.3)):
        optimizers.set_step(stage, step)
        for name, (_, group) in by_name(model, optimizers).items():
            assert group["weight_decay"] == (decay if model.get_parameter(name).ndim > 1 else 0.0), name


def test_learning_rate_of_a_stage_with_scales_the_last_match_counts(tmp_path: Path):
    job, model = job_and_model(tmp_path, "--optimizer.name=muon", "--scheduler.name=constant")
    optimizers = optimizers_of(job, model)
    stages = job.resolved_stages()
    assert optimizers.set_step(stages[0], 0) == {"lr": 0.01, "muon_lr": 0.02}
    assert {g["lr"] for o in optimizers.all for g in o.param_groups} == {0.01, 0.02}
    assert optimizers.set_step(stages[1], 5) == {"lr": 1e-4, "muon_lr": 0.02}
    found = by_name(model, optimizers)
    assert found["vision_encoder.layers.0.mlp.fc1.weight"][1]["lr"] == pytest.approx(0.1 * 0.02)
    assert found["vision_encoder.layers.0.mlp.fc1.bias"][1]["lr"] == pytest.approx(0.1 * 1e-4)
    assert found["vision_encoder.norm.weight"][1]["lr"] == pytest.approx(0.5 * 1e-4)
    assert found["adapter.proj.weight"][1]["lr"] == 0.02 and found["transformer.norm.weight"][1]["lr"] == 1e-4
    optimizers.set_step(stages[0], 0)  # all of it is a function of the step: nothing of the other stage is left
    assert {g["lr"] for o in optimizers.all for g in o.param_groups} == {0.01, 0.02}


def test_lr_scales_by_alias_and_pattern():
    names = ["adapter.proj.weight", "adapter.proj.bias", "transformer.norm.weight"]
    cfg = optimizer_config("adamw", lr=1.0, lr_scale={"adapter": 0.5, "*.bias": 2.0})
    found = settings(names, cfg, {"adapter": ["adapter.*"]})
    assert {name: one.lr for name, one in found.items()} == {
        "adapter.proj.weight": 0.5,
        "adapter.proj.bias": 2.0,
        "transformer.norm.weight": 1.0,
    }
    with pytest.raises(ValueError, match=r"optimizer.lr_scale = 'adapter' \(the alias of .*\): matches no parameter"):
        settings(names[2:], cfg, {"adapter": ["adapter.*"]})


def test_step_equals_torch_adamw_with_the_same_groups(tmp_path: Path):
    job, model = job_and_model(tmp_path)
    _, twin = job_and_model(tmp_path)
    optimizers = optimizers_of(job, model)
    decays = [p for p in twin.parameters() if p.ndim > 1]
    rest = [p for p in twin.parameters() if p.ndim <= 1]
    oracle = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8
    )
    stage = job.resolved_stages()[0]
    for step in range(3):
        for index, (p, q) in enumerate(zip(model.parameters(), twin.parameters(), strict=True)):
            rng = torch.Generator().manual_seed(1000 * step + index)
            p.grad = torch.randn(p.shape, generator=rng)
            q.grad = p.grad.clone()
        lr = optimizers.set_step(stage, step)["lr"]
        for group in oracle.param_groups:
            group["lr"] = lr
        optimizers.step()
        oracle.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=name)


def test_zero_grad_leaves_none_so_that_frozen_parameters_rest(tmp_path: Path):
    job, model = job_and_model(tmp_path, "--optimizer.name=muon")
    optimizers = optimizers_of(job, model)
    stage = job.resolved_stages()[0]

    def step(names: set[str]) -> None:
        for name, p in model.named_parameters():
            if name in names:
                p.grad = torch.ones_like(p)
        optimizers.set_step(stage, 0)
        optimizers.step()
        optimizers.zero_grad()

    everything = {name for name, _ in model.named_parameters()}
    frozen = {name for name in everything if name.startswith("vision_encoder.")}
    step(everything)  # so that there are moments
    assert all(p.grad is None for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        step(everything - frozen)
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == everything - frozen


def test_clip_is_that_of_torch():
    for scale in (0.1, 10.0):
        ours, theirs = ([torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(5))] for _ in range(2))
        for k, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
            q.grad = p.grad.clone()
        model = torch.nn.ParameterList(ours)
        norm = math.sqrt(squared_norm(local_gradients(model), holders(model, 1)))
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, 1.0)), rel=1e-6)
        clip(local_gradients(model), norm, 1.0)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=0)
    assert squared_norm([], []) == 0.0
    grad = torch.full((4,), 3.0)
    clip([grad], 6.0, 0.0)
    assert torch.equal(grad, torch.full((4,), 3.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_norm_of_a_bad_gradient_is_not_finite(bad: float):
    assert not math.isfinite(squared_norm([torch.ones(3), torch.tensor([1.0, bad])], [1, 1]))
