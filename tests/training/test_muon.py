from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from kempnerforge.training.optimizers import muon
from kempnerforge.training.optimizers.muon import Muon, orthogonalise
from tests.dist import run_ranks
from tests.training.tiny import random_tensors

SHAPES = [(8, 24), (24, 8), (8, 24), (16, 16), (5, 3), (1, 7), (7, 1)]
"""Two of one shape go through as one batch; tall ones are transposed; on two ranks 5, 7 and 1 rows do not split evenly."""


def made(seed: int) -> list[torch.Tensor]:
    return random_tensors(SHAPES, seed)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(value) for value in made(0)]


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int = 5) -> None:
    for step in range(steps):
        for p, grad in zip(params, made(100 + step), strict=True):
            p.grad = grad
        optimizer.step()


@pytest.mark.parametrize(("decay", "momentum"), [(0.0, 0.95), (0.1, 0.9)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_torch_bitwise(decay: float, momentum: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """torch.optim.Muon takes one matrix at a time, so ours is given one shape at a time here; batches: see below. In fp32, where the hardware
    has no bf16, it is the same but for the rounding of torch's.
    """
    monkeypatch.setattr(muon, "compute_dtype", lambda *_: dtype)
    for index in range(len(SHAPES)):
        ours, theirs = ([parameters()[index]] for _ in range(2))
        mine = Muon(ours, lr=0.02, momentum=momentum, weight_decay=decay)
        oracle = torch.optim.Muon(theirs, lr=0.02, momentum=momentum, weight_decay=decay, adjust_lr_fn="original")
        for step in range(5):
            ours[0].grad = theirs[0].grad = made(100 + step)[index]
            mine.step()
            oracle.step()
        tolerance = 0.0 if dtype == torch.bfloat16 else 5e-3
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=tolerance)
        assert torch.equal(mine.state[ours[0]]["momentum_buffer"], oracle.state[theirs[0]]["momentum_buffer"])


def test_batches_of_one_shape_change_nothing_but_rounding():
    together, alone = parameters(), parameters()
    run(Muon(together, lr=0.02), together)
    run_alone = [Muon([p], lr=0.02) for p in alone]
    for step in range(5):
        for p, grad, optimizer in zip(alone, made(100 + step), run_alone, strict=True):
            p.grad = grad
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)  # bf16 products, in another order


def test_orthogonalise_flattens_the_singular_values():
    """The quintic of Jordan et al. leaves singular values between 0.68 and 1.13; the singular vectors stay."""
    matrices = torch.randn(4, 12, 20, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    made = orthogonalise(matrices).float()
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.6 and values.max() < 1.25
    projected = u.mT @ made @ v.mT  # diagonal, if the vectors are the same
    off_diagonal = projected - torch.diag_embed(projected.diagonal(dim1=1, dim2=2))
    assert off_diagonal.abs().max() < 0.05
    assert torch.equal(orthogonalise(matrices.mT), orthogonalise(matrices).mT)


def test_only_matrices():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))])


def test_without_gradient_nothing_moves_and_nothing_is_kept():
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = Muon(params, lr=0.1, weight_decay=0.5)
    params[0].grad = made(1)[0]
    optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    assert moved == [True] + [False] * 6 and list(optimizer.state) == [params[0]]


def test_hyper_parameters_of_each_group():
    a, b = parameters()[:2]
    start = [a.detach().clone(), b.detach().clone()]
    optimizer = Muon([{"params": [a], "lr": 0.0}, {"params": [b], "lr": 0.1}])
    a.grad, b.grad = made(1)[:2]
    optimizer.step()
    assert torch.equal(a, start[0]) and not torch.equal(b, start[1])


class Matrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(parameters())


def sharded(out: str) -> None:
    """A rank: the same steps on sharded parameters with given whole gradients."""
    dist.init_process_group("gloo")
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    model = Matrices()
    fully_shard(model, mesh=mesh)
    params = list(model.matrices)
    optimizer = Muon(params, lr=0.02, weight_decay=0.1)
    for step in range(5):
        for p, grad in zip(params, made(100 + step), strict=True):
            assert isinstance(p, DTensor)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
        optimizer.step()
    whole = [p.full_tensor() for p in params]
    buffers = [optimizer.state[p]["momentum_buffer"].placements == p.placements for p in params]
    if dist.get_rank() == 0:
        torch.save([w.detach() for w in whole], out)
        Path(out).with_suffix(".json").write_text(json.dumps(buffers))
    dist.barrier()
    os._exit(0)


@pytest.mark.dist
def test_two_ranks_equal_one_process(tmp_path: Path):
    alone = parameters()
    run(Muon(alone, lr=0.02, weight_decay=0.1), alone)
    results = run_ranks("tests.training.test_muon:sharded", 2, tmp_path / "params.pt")
    assert [r.returncode for r in results] == [0, 0], results
    assert all(json.loads((tmp_path / "params.json").read_text()))
    for ours, theirs in zip(alone, torch.load(tmp_path / "params.pt"), strict=True):
        assert torch.equal(ours, theirs), ours.shape
