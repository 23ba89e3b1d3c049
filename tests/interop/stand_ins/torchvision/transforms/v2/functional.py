"""What image processors call: (..., C, H, W) tensors."""

from typing import Any

import torch
import torch.nn.functional as F

from torchvision.transforms.functional import pil_to_tensor as pil_to_tensor


def resize(image: torch.Tensor, size: Any, interpolation: Any = None, antialias: bool = True, **_: Any) -> torch.Tensor:
    return F.interpolate(image.float(), size=tuple(size), mode="bilinear", antialias=antialias).round().clamp(0, 255).to(image.dtype)


def center_crop(image: torch.Tensor, output_size: Any) -> torch.Tensor:
    height, width = output_size
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[..., top : top + height, left : left + width]


def normalize(image: torch.Tensor, mean: Any, std: Any, *_: Any) -> torch.Tensor:
    mean, std = (torch.as_tensor(values, dtype=image.dtype).view(-1, 1, 1) for values in (mean, std))
    return (image - mean) / std
