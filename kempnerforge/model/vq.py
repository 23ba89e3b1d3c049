"""Pictures as tokens: a small vector-quantised autoencoder (VQ-VAE: van den Oord et al. 2017, arXiv
1711.00937), and a classifier that judges pictures that were written. Each is a folder with ``config.json`` and
``model.safetensors``; ``recipes/image-generation/codec.py`` trains both.

Shapes: N pictures, H pixels a side, G cells a side, G = H / 4, E width of a code, K codes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kempnerforge.config.build import build_record
from kempnerforge.config.checks import at_least
from kempnerforge.model.hf_files import CONFIG, WEIGHTS
from kempnerforge.util.errors import InputError
from kempnerforge.util.paths import start_of
from kempnerforge.util.reading import read_object, regular

STRIDE = 4
"""Pixels of a cell's side."""
COMMITMENT = 0.25
"""Weight of the third term of van den Oord et al. 2017, eq. 3."""
MAKER = "recipes/image-generation/codec.py makes it"


class Saved(nn.Module):
    """A module that is a folder with its config and its weights.

    Attributes:
        record: the class of ``cfg``.
    """

    record: ClassVar[type]

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg = cfg

    def save(self, path: Path) -> None:
        """Writes the folder."""
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG).write_text(json.dumps(asdict(self.cfg), indent=1) + "\n", encoding="utf-8")
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, path / WEIGHTS)

    @classmethod
    def load(cls, path: str | Path, key: str) -> Self:
        """Reads a folder that ``save`` wrote, strictly.

        Args:
            key: that names the folder, for messages.

        Raises:
            InputError: nothing is there, or it is something else.
        """
        folder, where = Path(path), f"{key} = {str(path)!r}"
        if not path or not (folder / CONFIG).is_file():
            raise InputError(f"{where}: no folder with {CONFIG} and {WEIGHTS}{start_of(path)}; {MAKER}")
        module = cls(build_record(cls.record, cls.record.__name__, read_object(folder / CONFIG), str(folder / CONFIG)))
        try:
            module.load_state_dict(load_file(regular(folder / WEIGHTS)))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{where}: {WEIGHTS} cannot be read: {error}") from None
        return module.eval().requires_grad_(False)


@dataclass
class VQConfig:
    """``config.json`` of a tokenizer of pictures.

    Attributes:
        image_size: H, a multiple of 4.
        codes: K.
        code_dim: E.
        width: channels inside.
    """

    image_size: int = 32
    codes: int = 256
    code_dim: int = 16
    width: int = 48

    def __post_init__(self) -> None:
        at_least(self, 2, "codes", "code_dim", "width")
        if self.image_size < STRIDE or self.image_size % STRIDE:
            raise InputError(f"image_size = {self.image_size}: must be a multiple of {STRIDE}")

    @property
    def tokens(self) -> int:
        """Codes of one picture, G * G."""
        return (self.image_size // STRIDE) ** 2


class Quantised(NamedTuple):
    """What training needs.

    Attributes:
        pictures: (N, 3, H, H), decoded again, values in [-1, 1].
        codes: (N, G * G) int64.
        loss: van den Oord et al. 2017, eq. 3, with squared errors, means over values.
        features: (N * G * G, E) of the encoder, to restart codes that are not used.
    """

    pictures: Tensor
    codes: Tensor
    loss: Tensor
    features: Tensor


class VQVAE(Saved):
    """Encoder, codebook and decoder."""

    record = VQConfig

    def __init__(self, cfg: VQConfig) -> None:
        super().__init__(cfg)
        width = cfg.width
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width // 2, 4, 2, 1),
            nn.SiLU(),
            nn.Conv2d(width // 2, width, 4, 2, 1),
            Residual(width),
            nn.Conv2d(width, cfg.code_dim, 1),
        )
        self.codebook = nn.Parameter(torch.randn(cfg.codes, cfg.code_dim))
        self.decoder = nn.Sequential(
            nn.Conv2d(cfg.code_dim, width, 3, 1, 1), Residual(width), nn.SiLU(), nn.ConvTranspose2d(width, width // 2, 4, 2, 1), nn.SiLU(),
            nn.ConvTranspose2d(width // 2, 3, 4, 2, 1),
        )  # fmt: skip

    def forward(self, pictures: Tensor) -> Quantised:
        """(N, 3, H, H) in [-1, 1], through the codebook and back."""
        grid = self.encoder(pictures)  # (N, E, G, G)
        features = grid.permute(0, 2, 3, 1).flatten(0, 2)  # (N * G * G, E)
        codes = self.nearest(features)
        chosen = F.embedding(codes, self.codebook)
        passed = (features + (chosen - features).detach()).unflatten(0, (len(pictures), *grid.shape[2:])).permute(0, 3, 1, 2)
        decoded = self.decoder(passed)
        loss = F.mse_loss(decoded, pictures) + F.mse_loss(chosen, features.detach()) + COMMITMENT * F.mse_loss(features, chosen.detach())
        return Quantised(decoded, codes.view(len(pictures), -1), loss, features)

    def nearest(self, features: Tensor) -> Tensor:
        """(..., E) -> (...) the nearest code of each."""
        return (self.codebook.square().sum(1) - 2 * features @ self.codebook.T).argmin(-1)

    @torch.no_grad()
    def encode(self, pictures: Sequence[np.ndarray]) -> list[list[int]]:
        """N of (H, H, 3) uint8 -> the codes of each, in rows from the upper left."""
        return self.nearest(self.encoder(scaled(pictures)).flatten(2).transpose(1, 2)).tolist()

    @torch.no_grad()
    def decode(self, codes: Sequence[Sequence[int]]) -> np.ndarray:
        """N times G * G codes -> (N, H, H, 3) uint8."""
        side = self.cfg.image_size // STRIDE
        grid = F.embedding(torch.tensor(codes), self.codebook).unflatten(1, (side, side)).permute(0, 3, 1, 2)
        pixels = ((self.decoder(grid) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous().numpy()


class Residual(nn.Module):
    """x + two convolutions of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.SiLU(), nn.Conv2d(width, width, 3, 1, 1), nn.SiLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def scaled(pictures: Sequence[np.ndarray]) -> Tensor:
    """N of (H, H, 3) uint8 -> (N, 3, H, H) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass
class ClassifierConfig:
    """``config.json`` of a classifier of pictures.

    Attributes:
        classes: what it tells apart, by the prompt that asks for a picture of it.
        image_size: pixels of a side.
        width: channels after the first convolution.
    """

    classes: list[str] = field(default_factory=list)
    image_size: int = 32
    width: int = 16

    def __post_init__(self) -> None:
        at_least(self, 4, "image_size", "width")
        if len(set(self.classes)) < max(2, len(self.classes)):
            raise InputError(f"classes = {self.classes}: needs two or more, each once")


class PictureClassifier(Saved):
    """A small convolutional network."""

    record = ClassifierConfig

    def __init__(self, cfg: ClassifierConfig) -> None:
        super().__init__(cfg)
        width = cfg.width
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.ReLU(), nn.Conv2d(2 * width, 4 * width, 4, 2, 1), nn.ReLU(), nn.AdaptiveMaxPool2d(1),
        )  # fmt: skip
        self.head = nn.Linear(4 * width, len(cfg.classes))

    def forward(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, H) in [-1, 1] -> (N, classes) logits."""
        return self.head(self.body(pictures).flatten(1))

    @torch.no_grad()
    def name(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """N of (H, H, 3) uint8 -> the class of each."""
        return [self.cfg.classes[at] for at in self(scaled(pictures)).argmax(1).tolist()]
