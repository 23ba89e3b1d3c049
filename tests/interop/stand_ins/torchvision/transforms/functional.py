"""From PIL to tensors."""

import numpy as np
import torch
from PIL import Image


def pil_to_tensor(picture: Image.Image) -> torch.Tensor:
    """(C, H, W) uint8."""
    found = torch.from_numpy(np.array(picture))
    return found[None] if found.ndim == 2 else found.permute(2, 0, 1)
