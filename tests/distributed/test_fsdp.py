"""Sharding: gradients are sums over ranks, names stay, a world of one has one unit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kempnerforge.distributed.fsdp import Unreduced, fsdp_modules
from kempnerforge.distributed.world import World
from tests.dist import ranks_pass, run_ranks
from tests.distributed.workers import Stack, data, gradients, install


@pytest.mark.dist
def test_two_ranks_add_their_gradients(tmp_path: Path) -> None:
    results = run_ranks("tests.distributed.workers:two_ranks", 2, tmp_path / "grads.pt", timeout=60)
    assert [r.returncode for r in results] == [0, 0], results[0].stderr[-2000:] + results[1].stderr[-2000:]
    got = torch.load(tmp_path / "grads.pt", weights_only=True)
    whole, accumulated = Stack(), Stack()
    for rank in range(2):
        whole(data(rank)).backward()
        for part in range(3):
            accumulated(data(rank, part)).backward()
    torch.testing.assert_close(got.pop("accumulated"), gradients(accumulated), rtol=1e-5, atol=1e-5)
    scale = max(float(g.abs().max()) for g in gradients(whole).values())
    torch.testing.assert_close(got.pop("bf16"), gradients(whole), rtol=0.1, atol=0.02 * scale)
    assert len(got) == 4
    for kind, grads in got.items():
        torch.testing.assert_close(
            grads, gradients(whole), rtol=1e-5, atol=1e-5, msg=lambda text, kind=kind: f"reshard recompute {kind}: {text}"
        )


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "shard_sizes"), [(2, [0]), pytest.param(4, [0, 2], marks=pytest.mark.slow)])
def test_all_ranks_have_the_weights_of_rank_0(ranks: int, shard_sizes: list[int]) -> None:
    ranks_pass("tests.distributed.workers:weights_of_rank_0", ranks, *shard_sizes, timeout=60)


@pytest.mark.dist
def test_weights_that_are_loaded_afterwards_are_not_sent() -> None:
    ranks_pass("tests.distributed.workers:blank_weights", 2, timeout=60)


def test_a_world_of_one_is_one_unit_that_computes_the_same(world: World) -> None:
    plain, model = Stack(), Stack()
    install(model, world)
    assert fsdp_modules(model) == [model]
    for step in range(2):
        losses = [m(data(0, step)) for m in (plain, model)]
        assert torch.equal(losses[0], losses[1])
        for loss in losses:
            loss.backward()
        assert all(torch.equal(a, b) for a, b in zip(gradients(plain).values(), gradients(model).values(), strict=True))
    assert list(gradients(model)) == [name for name, _ in Stack().named_parameters()]


def test_a_world_of_one_has_no_second_copy_of_its_gradients(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.Tensor] = []
    allocate = Unreduced.allocate
    monkeypatch.setattr(Unreduced, "allocate", lambda *args, **how: given.append(allocate(*args, **how)) or given[-1])
    model = Stack()
    install(model, world, torch.bfloat16)
    for _ in range(2):
        model(data(0)).backward()
        assert {g.untyped_storage().data_ptr() for g in gradients(model).values()} == {given[-1].untyped_storage().data_ptr()}
        model.zero_grad()
    assert given[0] is given[1] and given[2] is given[3] and given[0] is not given[2]


def test_compute_and_master_dtype(world: World) -> None:
    model = Stack()
    install(model, world, torch.bfloat16)
    model(data(0)).backward()
    assert model.dtypes == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {g.dtype for g in gradients(model).values()} == {torch.float32}
