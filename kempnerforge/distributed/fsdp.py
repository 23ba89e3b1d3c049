"""FSDP2 (Zhao et al. 2023; ``fully_shard``) over the units that a model names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from kempnerforge.distributed.spread import spread, take_away
from kempnerforge.distributed.tensor import share_layers
from kempnerforge.distributed.world import World
from kempnerforge.model.aux_loss import restore_losses, return_losses, with_aux_loss

RECOMPILE_LIMIT = 64
PRODUCTS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops.higher_order.flex_attention,
]
"""What a unit keeps the outputs of when it is recomputed but for its products."""


def prepare(
    model: nn.Module,
    units: Iterable[nn.Module],
    world: World,
    dtype: torch.dtype,
    *,
    reshard: bool,
    recompute: bool,
    compile_units: bool,
    keep_products: bool = False,
    blank: bool = False,
) -> None:
    """Installs shared layers, recomputation, compilation and sharding, in this order, unit by unit. Names do
    not change. The model is on ``world.device`` then, and the weights are those of rank 0.

    Args:
        model: on ranks other than 0 it may be on the meta device: only rank 0 needs memory for all weights.
        units: modules that do not overlap; the root takes the other parameters.
        dtype: of compute; master weights and gradient reduction are fp32.
        reshard: free gathered weights after the forward pass.
        recompute: activation checkpointing; ``keep_products`` as of ``recompute_unit``.
        compile_units: ``torch.compile`` each unit.
        blank: the parameters are loaded afterwards; rank 0's are not sent.

    NOTE: in a world of one only the root is wrapped, and stays unsharded: a wrapped unit costs 1.5 ms a step
    and saves nothing. Gradients are summed, not averaged: the loss is already divided by the number of targets
    over all ranks.
    """
    if compile_units:  # a graph for each set of frozen parts; beyond the limit units run uncompiled
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        # otherwise a unit with an auxiliary loss would run uncompiled when it is recomputed
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    # inputs are not cast: FSDP reaches into dataclasses and would round the fp32 rotary tables that a block
    # reads
    param_dtype = dtype if dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    whole = take_away(model) if world.size > 1 else {}
    if world.size == 1:
        model.to(world.device)
    if world.tensor is not None:
        share_layers(model, world.tensor)
    for unit in units:
        if aux_losses := with_aux_loss(unit):
            return_losses(unit, aux_losses)
        if recompute:
            recompute_unit(unit, keep_products)
        if compile_units:
            unit.compile(dynamic=True)
        if world.parts > 1:
            fully_shard(unit, mesh=world.mesh, mp_policy=policy, reshard_after_forward=reshard)
        if aux_losses:
            restore_losses(unit, aux_losses)
    fully_shard(model, mesh=world.mesh, mp_policy=policy, reshard_after_forward=False)
    if world.size > 1:
        spread(model, whole, world.device, blank=blank)
    for module in fsdp_modules(model):
        if world.parts == 1:
            module.set_custom_reduce_scatter(Unreduced())  # pyright: ignore[reportArgumentType]
        else:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a plain sum: gloo has no scaled one


class Unreduced:
    """In place of a reduce-scatter where no other process has gradients: what it is given is its result. FSDP
    asks for two buffers, and copies from one to the other if they are two.
    """

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Twice the same memory, one call after the other."""
        given, self._buffer = self._buffer, None
        if given is None:
            given = self._buffer = torch.empty(size, dtype=dtype, device=device)
        return given


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """The sharded modules of ``model``, root first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def sync_gradients(model: nn.Module, sync: bool) -> None:
    """Whether the next backward pass reduces gradients over ranks; False adds them up on this rank."""
    for module in fsdp_modules(model):
        module.set_requires_gradient_sync(sync, recurse=False)


def recompute_unit(unit: nn.Module, keep_products: bool = False) -> None:
    """Makes ``unit`` keep its inputs alone and run again in the backward pass; with ``keep_products`` it keeps
    the outputs of ``PRODUCTS``, too, and runs nothing of them again.

    NOTE: on CUDA a FlexAttention of a unit that is not compiled is a compiled function of its own, whose
    insides are not seen here: it runs again.
    """
    forward = unit.forward  # replaced on the instance, so that no parameter name changes
    options: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, PRODUCTS)} if keep_products else {}
    unit.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)
