"""Linear layers whose products are in float8 (Micikevicius et al. 2022, arXiv 2209.05433), by torchao.

Weights, their names and checkpoints stay as they are: inputs, weights and gradients are scaled and cast in each
product. torchao is an optional package: ``pip install 'kempnerforge[float8]'``.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kempnerforge.model.transformer import Transformer
from kempnerforge.util.errors import InputError

log = logging.getLogger("kempnerforge")

MULTIPLE = 16
"""What the kernels need the sizes of a layer to be a multiple of."""
LEAST_CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0), "rowwise_with_gw_hp": (9, 0)}
"""Compute capability that CUDA's kernels need: Ada, and Hopper."""


def to_float8(model: nn.Module, recipe: str, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Makes the linear layers in the layers of each ``Transformer`` of ``model`` multiply in float8. Embeddings, head,
    adapter and vision encoder stay. The model is not sharded yet, and may be on the meta device.

    A layer does so in training mode alone: evaluated, or frozen, it computes what it computes without.

    Args:
        recipe: of torchao: "tensorwise", "rowwise", "rowwise_with_gw_hp".
        dtype: of compute.
        device: where it will run.

    Returns:
        The names of the layers.

    Raises:
        InputError: torchao is not there, or float8 does not go with the model, ``dtype`` or ``device``.
    """
    key = f"train.float8 = {recipe!r}"
    torchao = _package(key)
    if dtype != torch.bfloat16:
        raise InputError(f"{key}: computes in bf16 outside of products; train.mixed_precision is fp32 on this machine, set it to 'bf16'")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY[recipe]:
        name, need = torch.cuda.get_device_name(device), ".".join(map(str, LEAST_CAPABILITY[recipe]))
        raise InputError(f"{key}: needs a GPU of compute capability {need}, which {name} is not; set it to 'off'")
    chosen = float8_layers(model, recipe)
    # numbers of vectors are any, and the product for a weight's gradient runs along them
    config = replace(torchao.Float8LinearConfig.from_recipe_name(recipe), pad_inner_dim=True)
    torchao.convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in chosen)
    for layer in (model.get_submodule(name) for name in chosen):
        layer.__class__ = _in_training(type(layer))
    if device.type == "cpu":
        log.warning("%s: on a CPU it is slower than bf16, and there to be tried", key)
    return chosen


@cache
def _in_training(kind: Any) -> Any:
    """A layer of torchao's class ``kind`` that computes as ``nn.Linear`` where it is not trained."""

    class Float8Linear(kind):
        def forward(self, input: Tensor) -> Tensor:
            if self.training and input.numel():  # no vectors have no largest value to scale by
                return super().forward(input)
            return F.linear(input, self.weight, self.bias)

    return Float8Linear


def float8_layers(model: nn.Module, recipe: str) -> list[str]:
    """Names of the layers that ``to_float8`` would change.

    Raises:
        InputError: there are none, or one cannot be.
    """
    key = f"train.float8 = {recipe!r}"
    chosen = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and _in_backbone(model, name)}
    if not chosen:
        raise InputError(f"{key}: {type(model).__name__} has no linear layers in a text backbone of ours")
    for name, layer in chosen.items():
        if type(layer) is not nn.Linear:
            raise InputError(f"{key}: {name} is a {type(layer).__name__}; not with [[lora]] in the text backbone")
        if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
            sizes = f"{layer.in_features} inputs and {layer.out_features} outputs"
            raise InputError(f"{key}: {name} has {sizes}; both must be multiples of {MULTIPLE}")
    return [*chosen]


def _in_backbone(model: nn.Module, name: str) -> bool:
    """Whether ``name`` is in the ``layers`` of a ``Transformer``."""
    parts = name.split(".")
    return any(part == "layers" and isinstance(model.get_submodule(".".join(parts[:at])), Transformer) for at, part in enumerate(parts))


def _package(key: str) -> Any:
    try:
        return importlib.import_module("torchao.float8")
    except ImportError:
        raise InputError(f"{key}: needs the package torchao: pip install 'kempnerforge[float8]'") from None
