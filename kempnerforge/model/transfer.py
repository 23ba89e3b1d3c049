"""Tensors on their way to a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor`` on ``device``. From the CPU to CUDA it goes through pinned memory: a copy from other memory
    waits until the device has done all that it was told before.
    """
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return (tensor if tensor.is_cuda else tensor.pin_memory()).to(device, non_blocking=True)


def told(values: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers as a tensor on ``device``, as ``moved``."""
    return moved(torch.tensor(values, dtype=dtype, device="cpu"), device)
