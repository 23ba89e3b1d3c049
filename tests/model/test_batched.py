"""Layers in batched products against the same layers one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kempnerforge.config import LoRAConfig, ModelConfig
from kempnerforge.model.batched import BatchedMLP, Each, Products
from kempnerforge.model.lora import LoRALinear
from kempnerforge.model.transformer import MLP

E, N, D = 3, 10, 16


def some_mlps(lora: bool = False, **fields: object) -> list[MLP]:
    torch.manual_seed(0)
    mlps = [MLP(ModelConfig(dim=D, n_heads=2, vocab_size=10, **fields)) for _ in range(E)]  # type: ignore[arg-type]
    for mlp in mlps:
        for parameter in mlp.parameters():
            nn.init.normal_(parameter, std=0.3)
        if lora:
            LoRALinear.adapt(mlp.up_proj, LoRAConfig(module="*", rank=2))
            nn.init.normal_(mlp.up_proj.get_parameter("lora_b"))
    return mlps


def both(mlps: list[MLP]) -> list[tuple[Tensor, list[Tensor | None]]]:
    """Output and gradients, of the input first: one by one, then batched."""
    parameters = [p for mlp in mlps for p in mlp.parameters()]
    found = []
    for batched in (False, True):
        x = torch.randn(E, 2, N, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = BatchedMLP(mlps)(x) if batched else torch.stack([mlp(part) for mlp, part in zip(mlps, x, strict=True)])
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        found.append((y.detach(), [x.grad, *(p.grad for p in parameters)]))
        for p in parameters:
            p.grad = None
    return found


@pytest.mark.parametrize("fields", [{}, {"activation": "gelu", "bias": True}, {"post_norms": True}], ids=["swiglu", "biases", "post norms"])
@pytest.mark.parametrize("lora", [False, True])
def test_output_and_gradients_are_those_of_the_layers(fields: dict[str, object], lora: bool) -> None:
    (want, want_gradients), (got, got_gradients) = both(some_mlps(lora, **fields))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for one, other in zip(want_gradients, got_gradients, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_frozen_weights_get_no_gradient_and_the_others_keep_theirs() -> None:
    mlps = some_mlps()
    mlps[1].requires_grad_(False)
    (_, want), (_, got) = both(mlps)
    assert [g is None for g in got] == [g is None for g in want] and any(g is None for g in got)
    for one, other in zip(want, got, strict=True):
        assert (one is None and other is None) or torch.allclose(one, other, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


def test_derivatives_are_those_of_small_differences() -> None:
    x, *weights = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4), (5, 4), (5, 4)))
    assert torch.autograd.gradcheck(Products.apply, (x, *weights))


def test_no_copy_of_the_weights_waits_for_the_backward_pass() -> None:
    """What is kept is the input and the weights themselves, which FSDP2 can free."""
    mlps, x, kept = some_mlps(), torch.randn(E, N, D, requires_grad=True), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        BatchedMLP(mlps)(x)
    own = {p.data_ptr() for mlp in mlps for p in mlp.parameters()}
    assert own <= {tensor.data_ptr() for tensor in kept}
    assert not [tensor.shape for tensor in kept if tensor.data_ptr() not in own and tensor.shape[1:] == mlps[0].up_proj.weight.shape]


def test_it_has_no_parameters_and_flops_are_counted() -> None:
    mlps, x = some_mlps(), torch.randn(E, N, D)
    assert not [*BatchedMLP(mlps).parameters()]
    with FlopCounterMode(display=False) as batched:
        BatchedMLP(mlps)(x)
    with FlopCounterMode(display=False) as one_by_one:
        for mlp, part in zip(mlps, x, strict=True):
            mlp(part)
    assert batched.get_total_flops() == one_by_one.get_total_flops() > 0


def test_layers_that_are_not_linear_are_computed_one_by_one() -> None:
    x = torch.randn(2, 4, D)
    norms = [nn.LayerNorm(D), nn.LayerNorm(D)]
    nn.init.normal_(norms[1].weight)
    owners = [nn.ModuleDict({"norm": norm}) for norm in norms]
    torch.testing.assert_close(Each(owners, "norm")(x), torch.stack([norms[0](x[0]), norms[1](x[1])]), rtol=0, atol=0)
