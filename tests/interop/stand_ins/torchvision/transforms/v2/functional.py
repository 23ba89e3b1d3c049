"""What image processors call: (..., C, H, W) tensors."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from torchvision.transforms import InterpolationMode as InterpolationMode
from torchvision.transforms.functional import pil_to_tensor as pil_to_tensor


def resize(image: torch.Tensor, size: Any, interpolation: Any = None, antialias: bool = True, **_: Any) -> torch.Tensor:
    return F.interpolate(image.float(), size=tuple(size), mode="bilinear", antialias=antialias).round().clamp(0, 255).to(image.dtype)


def crop(image: torch.Tensor, top: int, left: int, height: int, width: int) -> torch.Tensor:
    return image[..., top : top + height, left : left + width]


def pad(image: torch.Tensor, padding: Sequence[int], fill: float = 0, **_: Any) -> torch.Tensor:
    left, top, right, bottom = padding
    return F.pad(image, (left, right, top, bottom), value=fill)


def normalize(image: torch.Tensor, mean: Any, std: Any, *_: Any, **__: Any) -> torch.Tensor:
    mean, std = (torch.as_tensor(values, dtype=image.dtype).view(-1, 1, 1) for values in (mean, std))
    return (image - mean) / std
