"""Buffers that keep their precision when a model is cast."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn


class ExactBuffers(nn.Module):
    """A module that never rounds its buffers or the buffers of its children: ``to(torch.bfloat16)`` casts the
    parameters alone.

    NOTE: rounded, a mean of 0.481 would become 0.480, and rotary frequencies would encode other positions.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        kept = [(module, name, b) for module in self.modules() for name, b in module.named_buffers(recurse=False) if b.is_floating_point()]
        super()._apply(fn, recurse)
        for module, name, buffer in kept:
            cast = module._buffers[name]
            if cast is not None and torch.finfo(cast.dtype).bits < torch.finfo(buffer.dtype).bits:
                module._buffers[name] = buffer.to(cast.device)
        return self
