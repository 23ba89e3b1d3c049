"""Low-rank adapters: LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024).

``peft`` is not used: it puts a wrapper around each layer, which renames ``q_proj.weight`` to
``q_proj.base_layer.weight``. Freeze patterns, learning-rate scales and text checkpoints select parameters by
name and would no longer match. Here the layer object stays and its class becomes a subclass of ``nn.Linear``:
no parameter is renamed, references to the layer stay valid, and sharding, recomputation and compilation see a
linear layer with two or three more parameters.

Shapes: I input, O output features of a layer, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kempnerforge.config.lora import LORA_PARAMETERS, LoRAConfig
from kempnerforge.model.tensor_plan import mine
from kempnerforge.model.transformer import separate_draws
from kempnerforge.util.name_rules import matches_any, no_match, patterns_of


class LoRALinear(nn.Linear):
    """``h = W x + alpha / r * B A x`` (Hu et al. 2021, eq. 3); DoRA scales row o of ``W + alpha / r * B A``
    from its own length to ``magnitude[o]`` (Liu et al. 2024, eq. 5), the length taken as a constant in the
    backward pass (section 4.3).

    Parameters: ``weight`` (O, I) and ``bias`` (O,) of the layer, ``lora_a`` (R, I), ``lora_b`` (O, R), and
    ``magnitude`` (O,) with DoRA.

    NOTE: dropout acts on the input of ``A`` alone, with DoRA too, where the authors' code also drops the
    input of ``W`` in one of two terms. DoRA computes ``B A`` in every pass, which is much for one token:
    merge before generating.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    magnitude: nn.Parameter | None
    scale: float
    dropout: float

    @staticmethod
    def adapt(layer: nn.Linear, cfg: LoRAConfig) -> None:
        """Makes ``layer`` one of this class. Its output stays the same: ``A`` is drawn as ``nn.Linear`` draws
        its weight, ``B`` is 0.
        """
        assert type(layer) is nn.Linear, f"a {type(layer).__name__} cannot get an adapter"
        weight = layer.weight
        layer.__class__ = LoRALinear
        adapted = cast(LoRALinear, layer)
        adapted.scale, adapted.dropout = cfg.alpha / cfg.rank, cfg.dropout
        adapted.lora_a = nn.Parameter(weight.new_empty(cfg.rank, layer.in_features))
        adapted.lora_b = nn.Parameter(weight.new_zeros(layer.out_features, cfg.rank))
        nn.init.kaiming_uniform_(adapted.lora_a, a=math.sqrt(5))
        adapted.register_parameter("magnitude", nn.Parameter(weight.new_empty(layer.out_features)) if cfg.dora else None)
        adapted.fit_magnitude()

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return self.with_bias(input, None if self.bias is None else mine(self.bias))

    def with_bias(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """As ``forward``, with ``bias`` (O,) in place of its own."""
        x = F.dropout(input, self.dropout, self.training) if self.dropout else input
        weight, update = mine(self.weight), F.linear(F.linear(x, mine(self.lora_a)), mine(self.lora_b)) * self.scale  # (O, I), (..., O)
        if self.magnitude is None:
            return F.linear(input, weight, bias) + update
        stretch = mine(self.magnitude).float() / self.lengths(self.combined())
        y = (F.linear(input, weight) + update) * stretch.to(update.dtype)
        return y if bias is None else y + bias

    @torch.no_grad()
    def combined(self) -> Tensor:
        """``W + alpha / r * B A``: (O, I) fp32."""
        return torch.addmm(mine(self.weight).float(), mine(self.lora_b).float(), mine(self.lora_a).float(), alpha=self.scale)

    def lengths(self, weight: Tensor) -> Tensor:
        """Of the rows: (O, I) -> (O,), never 0."""
        return torch.linalg.vector_norm(weight, dim=1).clamp(min=1e-12)

    @torch.no_grad()
    def fit_magnitude(self) -> None:
        """With DoRA: makes the magnitude what the rows have, so that it changes nothing."""
        if self.magnitude is not None:
            self.magnitude.copy_(self.lengths(self.combined()))

    @torch.no_grad()
    def merge(self) -> None:
        """Makes this layer a plain ``nn.Linear`` again that computes the same."""
        weight = self.combined()
        if self.magnitude is not None:
            weight *= (self.magnitude.float() / self.lengths(weight))[:, None]
        self.weight.copy_(weight)
        for name in (*LORA_PARAMETERS, "scale", "dropout"):
            delattr(self, name)
        cast(nn.Linear, self).__class__ = nn.Linear

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={len(self.lora_a)}, scale={self.scale}, dora={self.magnitude is not None}"


def adapt(model: nn.Module, tables: Sequence[LoRAConfig], patterns: Mapping[str, Sequence[str]], places: Sequence[str] = ()) -> None:
    """Gives linear layers of ``model``, which is not sharded yet, their adapters. What is drawn for a layer
    depends on its name alone.

    Args:
        tables: of those that match a layer the last one counts.
        patterns: aliases.
        places: of each table, for messages.

    Raises:
        ValueError: a table matches no linear layer; the message lists near names.
    """
    layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    chosen: dict[str, LoRAConfig] = {}
    for number, table in enumerate(tables):
        wanted = patterns_of(table.module, patterns)
        found = [name for name in layers if matches_any(name, wanted) or matches_any(f"{name}.weight", wanted)]
        if not found:
            key = f"{places[number]}.module" if places else "lora.module"
            raise no_match(layers, table.module, patterns, key, "linear layer", "transformer.layers.*.q_proj")
        chosen.update(dict.fromkeys(found, table))
    for name, table in chosen.items():
        with separate_draws(f"lora {name}"):
            LoRALinear.adapt(layers[name], table)


def adapted_layers(model: nn.Module) -> list[LoRALinear]:
    """The layers of ``model`` that have an adapter."""
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


@contextmanager
def fitting_magnitudes(model: nn.Module) -> Iterator[None]:
    """Wrap this around code that replaces weights of ``model``: a magnitude (DoRA) that the code does not set
    is computed again from the new weight.
    """
    before = [(layer, layer.magnitude.detach().clone()) for layer in adapted_layers(model) if layer.magnitude is not None]
    yield
    for layer, magnitude in before:
        if layer.magnitude is not None and not magnitude.is_meta and torch.equal(layer.magnitude, magnitude):
            layer.fit_magnitude()


def merge_adapters(model: nn.Module) -> None:
    """Folds all adapters of ``model``, which is not sharded, into the weights. Afterwards layers and names
    are the same as in a model without adapters.
    """
    for layer in adapted_layers(model):
        layer.merge()
