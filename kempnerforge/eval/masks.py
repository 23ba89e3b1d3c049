"""Masks from the sixteen codes that PaliGemma writes for one (Beyer et al. 2024, section 3.2): the decoder of
the VQ-VAE of Ning et al. 2023, "All in Tokens", whose published weights are ``vae-oid.npz``.

Shapes: B masks, E width of a code, D channels.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kempnerforge.eval.codecs import SEG_BINS, SEG_CODES, Box
from kempnerforge.util.errors import InputError
from kempnerforge.util.reading import regular

CODES = "_vq_vae._embedding"
"""Name of the codebook (128, E) in the files; the decoder's tensors are ``decoder.*``."""
SIDE = 64
"""Pixels along each side of a mask."""


class _Residual(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class MaskDecoder(nn.Module):
    """Codes to masks: a 4 x 4 grid of codes, two residual blocks, four doublings of the side.

    Args:
        code_dim: E.
        dim: D of the first layers; each doubling but the first halves it.
    """

    def __init__(self, code_dim: int = 512, dim: int = 128) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(SEG_BINS, code_dim))
        widths = (dim, dim, dim // 2, dim // 4, dim // 8)
        layers: list[nn.Module] = [nn.Conv2d(code_dim, dim, 1), nn.ReLU(), _Residual(dim), _Residual(dim)]
        for before, after in pairwise(widths):
            layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 1))

    @torch.no_grad()
    def forward(self, codes: Sequence[Sequence[int]]) -> np.ndarray:
        """(B, 16) codes -> (B, 64, 64) float32 in [0, 1]; more than one half is inside."""
        grid = self.codes[torch.tensor(codes, dtype=torch.int64).view(-1, SEG_CODES)].unflatten(1, (4, 4))  # (B, 4, 4, E)
        return (self.decoder(grid.permute(0, 3, 1, 2))[:, 0] / 2 + 0.5).clamp(0, 1).numpy()

    def on_image(self, box: Box, width: int, height: int) -> np.ndarray:
        """(height, width) bool: the mask of ``box`` at its place on an image; without codes the full box."""
        x0, y0, x1, y1 = (round(side) for side in box.pixels(width, height))
        canvas = np.zeros((height, width), dtype=bool)
        if x1 > x0 and y1 > y0:
            if box.codes:
                mask = Image.fromarray(self([box.codes])[0]).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
                canvas[y0:y1, x0:x1] = np.asarray(mask) > 0.5
            else:
                canvas[y0:y1, x0:x1] = True
        return canvas


def load_mask_decoder(path: str | Path) -> MaskDecoder:
    """Reads ``vae-oid.npz``, or a file of safetensors with the same names. Tensors of an encoder beside them
    are not needed.

    Raises:
        InputError: no such file, or it does not hold exactly this decoder.
    """
    tensors = _tensors(regular(path, "mask decoder"))
    found = {CODES: "codes"} | {name: name for name in tensors if name.startswith("decoder.")}
    first = tensors.get("decoder.0.weight")
    if CODES not in tensors or first is None or first.ndim != 4:
        raise InputError(
            f"mask decoder = {path}: needs {CODES!r} and 'decoder.0.weight', has {', '.join(sorted(tensors)[:5]) or 'nothing'}"
        )
    decoder = MaskDecoder(first.shape[1], first.shape[0]).eval()
    try:
        decoder.load_state_dict({ours: tensors[name].float() for name, ours in found.items()})
    except RuntimeError as error:
        raise InputError(f"mask decoder = {path}: is none: {' '.join(str(error).split())[:500]}") from None
    return decoder


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, SafetensorError) as error:
        raise InputError(f"mask decoder = {path}: cannot be read as .npz or .safetensors: {str(error).partition('. ')[0]}") from None
