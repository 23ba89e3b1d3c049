"""What a stage costs: parameters, FLOPs and bytes, counted on the meta device by running the model there, not by a formula per arch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from kempnerforge.data.batch import Batch
from kempnerforge.vlm.base import VLM


@dataclass(frozen=True)
class ModuleCost:
    """One part of the model.

    Attributes:
        parameters, trainable: counts.
        flops: of one sample, forward and backward.
    """

    name: str
    parameters: int
    trainable: int
    flops: float


@dataclass(frozen=True)
class Cost:
    """What one stage costs, on one process.

    Attributes:
        modules: the parts; they cover the model.
        state_bytes: fp32 weights and gradients, optimizer state, and the weights once more in the compute dtype.
        activation_bytes: kept for the backward pass of one micro-batch.
    """

    modules: list[ModuleCost]
    state_bytes: int
    activation_bytes: int

    @property
    def flops(self) -> float:
        return sum(module.flops for module in self.modules)


def part_of(name: str) -> str:
    """The part that a parameter belongs to: a child of the model, of the backbone one level deeper."""
    words = name.split(".")
    return ".".join(words[: 2 if words[0] == "transformer" else 1])


def parts(names: Sequence[str]) -> dict[str, list[str]]:
    """Parameter names by part."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(part_of(name), []).append(name)
    return found


def cost(model: VLM, batch: Batch, trainable: frozenset[str], optimizer_slots: Mapping[str, int], compute_bytes: int) -> Cost:
    """Counts one micro-batch of a stage.

    Args:
        model: on the meta device; only shapes are computed.
        batch: a real one, for its shapes.
        trainable: names of the parameters that train.
        optimizer_slots: name -> fp32 numbers that the optimizer keeps per number of the parameter.
        compute_bytes: of one number in the compute dtype.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trainable)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[id(tensor.untyped_storage())] = tensor.numel() * compute_bytes
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch.to("meta")).loss.backward()
    rows = max(1, len(batch.sample_names))
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(model).__name__
    modules, counted = [], 0.0
    for part, names in parts(list(parameters)).items():
        flops = sum(
            count
            for name, count in by_module.items()
            if name == f"{root}.{part}" or (part == "transformer.layers" and _is_layer(name, root))
        )
        counted += flops
        size = {n: parameters[n].numel() for n in names}
        modules.append(ModuleCost(part, sum(size.values()), sum(size[n] for n in names if n in trainable), flops / rows))
    rest = counter.get_total_flops() - counted  # products outside of any part: a tied head
    if rest > 0:
        modules.append(ModuleCost("output head (tied)", 0, 0, rest / rows))
    state = sum(p.numel() * (4 + compute_bytes % 4 + (4 + 4 * optimizer_slots[n] if n in trainable else 0)) for n, p in parameters.items())
    return Cost(modules, state, sum(kept.values()))


def _is_layer(name: str, root: str) -> bool:
    return name.startswith(f"{root}.transformer.layers.") and name.count(".") == 3
