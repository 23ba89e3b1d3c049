"""From a resolved job to its model."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kempnerforge.config import JobConfig, registry
from kempnerforge.model.lora import adapt
from kempnerforge.model.memory import memory_bytes, within_memory
from kempnerforge.util.errors import InputError, NotBuiltError
from kempnerforge.vlm.base import VLM
from kempnerforge.vlm.text_only import TextOnly

SIZED = ("model", "vision_encoder", "adapter", "vlm")
"""The sections that decide how large a model is."""


def arch_class(job: JobConfig) -> type[VLM]:
    """The class that builds ``job``'s model.

    Raises:
        NotImplementedError: the arch has a config but no model.
    """
    if job.vlm is None:
        return TextOnly
    if job.vlm.arch not in registry.archs:
        raise NotBuiltError(f"vlm.arch = {job.vlm.arch!r}: its config is known, but no model is built for it yet; {registry.archs.known()}")
    return registry.archs.get(job.vlm.arch)


class Undrawn(TorchDispatchMode):
    """Random initial values of parameters are not drawn: the memory that they would fill stays untouched. All
    that a module computes, its buffers among it, is there.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fills = torch.Tag.nondeterministic_seeded in func.tags and func._schema.is_mutable
        return args[0] if fills and isinstance(args[0], nn.Parameter) else func(*args, **(kwargs or {}))


def build_model(job: JobConfig, device: torch.device | str | None = None, *, blank: bool = False) -> VLM:
    """Builds the model with fresh weights that depend on ``train.seed`` alone.

    Args:
        job: ``model.vocab_size`` is set.
        device: where; "meta" builds shapes without memory.
        blank: its weights are loaded afterwards, all of them: what they are now does not matter.

    Raises:
        InputError: this machine does not have the memory for it, or ``distributed.context_parallel`` does not
            go with the arch.
    """
    cls = arch_class(job)
    if job.distributed.context_parallel > 1 and not cls.shares_rows:
        known = [name for name in registry.archs.names() if registry.archs.get(name).shares_rows]
        raise InputError(
            f"distributed.context_parallel = {job.distributed.context_parallel}: vlm.arch = {job.vlm and job.vlm.arch!r} needs whole rows;"
            f" 1, or an arch that can share them: {', '.join(known)}"
        )
    sizes = {name: asdict(part) for name in SIZED if (part := getattr(job, name)) is not None}
    sizes["lora"] = {str(number): asdict(table) for number, table in enumerate(job.lora)}

    def built() -> VLM:
        model = cls(job)
        adapt(model, job.lora, job.module_patterns(), [job.place(("lora", number)) for number in range(len(job.lora))])
        return model

    if torch.device(device or "cpu").type != "meta":  # filling memory until there is no more takes minutes
        with torch.random.fork_rng(devices=[]), torch.device("meta"), within_memory(sizes, meta=True, most=memory_bytes()):
            built()
    with torch.random.fork_rng(devices=[]), torch.device(device or "cpu"), within_memory(sizes), Undrawn() if blank else nullcontext():
        torch.manual_seed(job.train.seed)
        return built()
