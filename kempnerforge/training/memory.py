"""What a process holds while it trains: its part of the state, as ``fully_shard`` cuts it, and what a
micro-batch takes at most, found by running it on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil, prod
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kempnerforge.config import JobConfig, Stage
from kempnerforge.data.batching.batch import Batch
from kempnerforge.distributed.fsdp import recompute_unit
from kempnerforge.eval.mode import mode
from kempnerforge.model.attention import fused_from
from kempnerforge.training.accounting import Held
from kempnerforge.training.optimizer import state_copies
from kempnerforge.training.setup import Assembly
from kempnerforge.vlm.base import VLM
from kempnerforge.vlm.build import build_model

MASTER, REDUCED = 4, 4
"""Bytes of a number of the weights, the optimizer's state and reduced gradients: fp32."""


class Shards:
    """How ``fully_shard`` cuts a model: unit by unit, every parameter along its first axis, padded so that all
    processes hold equally much.

    Args:
        model: on the meta device; with layers that are shared, what one process has of it.
        processes: that share a copy of the weights.
    """

    def __init__(self, model: VLM, processes: int) -> None:
        units, taken = [*model.shard_units()], set[str]()
        names = {id(p): name for name, p in model.named_parameters()}
        self.units: list[list[str]] = []
        for unit in units:
            self.units.append([names[id(p)] for p in unit.parameters()])
            taken |= {*self.units[-1]}
        self.root = [name for name in names.values() if name not in taken]
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.processes = processes

    def part(self, names: Sequence[str]) -> int:
        """Numbers of ``names`` that a process holds."""
        return sum(ceil((self.shapes[name] or (1,))[0] / self.processes) * prod(self.shapes[name][1:]) for name in names)

    def whole(self, names: Sequence[str]) -> int:
        """Numbers of ``names`` once they are gathered, padding included."""
        return self.processes * self.part(names)

    def received(self, names: Sequence[str]) -> int:
        """Numbers that a process gets from the others, to gather ``names`` or to reduce them."""
        return self.whole(names) - self.part(names)


class State:
    """The state of a stage on one of ``processes``.

    Attributes:
        parts: groups of processes that each compute something of their own.
        shared: of them, those that share a copy of the weights; there are ``copies``.
        trained: names of the parameters that train.
        slots: name -> numbers that the optimizer keeps per number of the parameter.
        width: bytes of a number in the compute dtype.
        reshard: gathered weights are let go between forward and backward.

    Args:
        trainable: names of the parameters that train in the stage.
        dtype: of compute.
        model: on the meta device, what one process has of it where layers are shared; None: all of it.

    Raises:
        InputError: see ``DistributedConfig.check_processes``.
    """

    def __init__(
        self, assembly: Assembly, stage: Stage, trainable: frozenset[str], dtype: torch.dtype, processes: int, model: VLM | None = None
    ) -> None:
        job, together = assembly.job, assembly.job.distributed.tensor_parallel
        job.distributed.check_processes(processes)
        self.parts = processes // together
        self.shared = (job.distributed.shard_size // together if processes > 1 else 0) or self.parts
        self.copies, self.width = self.parts // self.shared, dtype.itemsize
        self.shards = Shards(model or assembly.model, self.shared)
        self.names = [*self.shards.root, *(name for unit in self.shards.units for name in unit)]
        self.trained = [name for name in self.names if name in trainable]
        self.slots = state_copies(assembly.model, stage.optimizer, job.train.ema_decay > 0)
        self.reshard = job.distributed.reshard_after_forward and self.parts > 1
        self.at_once = job.distributed.accumulate_sharded

    def bytes(self, accumulated: int) -> dict[str, int]:
        """Bytes by kind, at the moment when most is held.

        Args:
            accumulated: micro-batches of a step.
        """
        shards = self.shards
        held = sorted((shards.whole(unit) for unit in shards.units), reverse=True)
        shown = shards.whole(shards.root) + (sum(held[:2]) if self.reshard else sum(held))  # the unit at work and the next one
        cast = self.width if self.shared > 1 or self.width < MASTER else 0
        adds_up = accumulated > 1 and self.parts > 1 and not self.at_once
        return {
            "weights": MASTER * shards.part(self.names),
            "gradients": MASTER * shards.part(self.trained),
            "optimizer": MASTER * sum(self.slots[name] * shards.part([name]) for name in self.trained),
            "gathered weights": cast * shown,
            "unsharded gradients": REDUCED * shards.whole(self.trained) if adds_up else 0,
        }

    def passing(self) -> int:
        """Bytes that the end of a step takes beside ``bytes``, when activations are gone: gradients of one
        process in the compute dtype and once more in fp32, to be reduced; twice what is updated.
        """
        last = self.trained if self.shared == 1 else [name for name in self.shards.root if name in {*self.trained}]
        return max((self.width + REDUCED) * self.shards.whole(last), 2 * MASTER * self.shards.part(self.trained))


class Passes:
    """Micro-batches of a job on the meta device, forward and backward.

    Args:
        dtype: of compute.
        on_cpu: the kernels are those of a CPU.
    """

    def __init__(self, job: JobConfig, dtype: torch.dtype, on_cpu: bool) -> None:
        self.model, self.dtype, self.on_cpu = build_model(job, "meta"), dtype, on_cpu
        buffers = [(module, name, buffer) for module in self.model.modules() for name, buffer in module._buffers.items()]
        self.model.to(dtype)
        for module, name, buffer in buffers:  # as in training, they stay as they are
            module._buffers[name] = buffer
        for unit in self.model.shard_units() if job.train.activation_checkpointing else ():
            recompute_unit(unit, job.train.activation_checkpointing_keeps == "products")

    def run(self, batch: Batch, trainable: frozenset[str]) -> Live:
        """What one micro-batch takes where ``trainable`` train; a gradient is let go when it is whole."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trainable)
        hooks = [p.register_post_accumulate_grad_hook(_let_go) for p in self.model.parameters() if p.requires_grad]
        live = Live()
        try:
            with mode(self.model, training=True), live, _fused(live, fused_from(self.dtype) if self.on_cpu else 0):
                self.model(batch.to(next(self.model.parameters()).device)).mean(1, 1).backward()
        finally:
            nn.ParameterList(self.model.parameters()).requires_grad_(True)
            for hook in hooks:
                hook.remove()
        return live


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


class Live(Held):
    """Also knows whether something random was drawn.

    Attributes:
        draws: whether it was.
    """

    draws = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        attention = "scaled_dot_product" in str(func)  # could draw, see ``_fused``
        self.draws |= torch.Tag.nondeterministic_seeded in func.tags and not attention
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def _fused(live: Live, least: int) -> Iterator[None]:
    """Attention over at least ``least`` keys by a kernel that keeps no scores: on the meta device torch writes
    it out.

    NOTE: a ``TorchFunctionMode`` would be off in the backward pass, where units are recomputed.
    """
    written_out = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        live.draws |= bool(kwargs.get("dropout_p"))
        if k.shape[-2] < least or rest or kwargs.get("dropout_p"):
            return written_out(q, k, v, *rest, **kwargs)
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) if q.shape[1] != each.shape[1] else each for each in (k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]

    with patch.object(F, "scaled_dot_product_attention", attention):
        yield
