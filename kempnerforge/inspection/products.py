"""The matrix products of a step, alone: how fast this machine is at exactly these shapes, and at a large
product.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "convolution", "convolution_backward")
"""Operators that are matrix products, or made of them; attention's own kernels are ``ATTENTION``."""
ATTENTION = "_scaled_dot_product"
REPEATS = 5


class Products(TorchDispatchMode):
    """While it is active, notes every matrix product by its shapes, strides and dtypes.

    Attributes:
        calls: how often each was computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Hashable] = Counter()
        self._again: dict[Hashable, Callable[[], object]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS or name.startswith(ATTENTION):
            leaves, spec = tree_flatten((args, kwargs or {}))
            key = (name, *(_form(leaf) for leaf in leaves))
            self.calls[key] += 1
            if key not in self._again:
                like = [_shape(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                self._again[key] = lambda: _call(func, like, spec)
        return func(*args, **(kwargs or {}))

    def seconds(self, device: torch.device) -> float:
        """What all that were noted take one after the other, on random values; medians of a few runs."""
        return sum(count * _median(self._again[key], device) for key, count in self.calls.items())


def largest_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs a second of one large square product, the best of a few: the peak that a step is compared
    with, on the threads that a step has.
    """
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(_times(lambda: a @ b, device, 4 * REPEATS))


def _form(leaf: Any) -> Hashable:
    return (*leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else str(leaf)


def _shape(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def _call(func: Any, like: list[Any], spec: Any) -> Callable[[], object]:
    """``func`` on new tensors of the same forms."""
    leaves = [_new(*leaf) if isinstance(leaf, tuple) and len(leaf) == 4 and isinstance(leaf[2], torch.dtype) else leaf for leaf in like]
    args, kwargs = tree_unflatten(leaves, spec)
    return lambda: func(*args, **kwargs)


def _new(shape: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random floats, or zeros; a stride may be 0, as in an expanded tensor."""
    size = 1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True)) if 0 not in shape else 0
    values = torch.randn(size, device=device) if dtype.is_floating_point else torch.zeros(size, device=device)
    return values.to(dtype).as_strided(shape, stride)


def _median(prepare: Callable[[], Any], device: torch.device) -> float:
    return statistics.median(_times(prepare(), device))


def _times(call: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> list[float]:
    """Seconds of each of a few calls, the first one left out."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(repeats + 1):
        wait()
        begin = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - begin)
    return times[1:]
