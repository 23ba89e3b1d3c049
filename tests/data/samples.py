"""Images, sources and comparisons that tests of the data share."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kempnerforge.config.data import DataConfig
from kempnerforge.data import Batch, Sample, SampleError, Source, Tokenizer
from kempnerforge.data.sources import build_source


def png(colour: tuple[int, int, int], size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> bytes:
    """A PNG of random pixels."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


class ListSource(Source):
    """Samples of a list; None stands for one that cannot be used."""

    def __init__(self, samples: Sequence[Sample | None]) -> None:
        super().__init__(DataConfig(source="list"), "train")
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        if sample is None:
            raise SampleError(f"row {index} is broken")
        return sample


def built(cfg: DataConfig, split: str = "train", tokenizer: Tokenizer | None = None, seq_len: int = 24) -> Source:
    """The source of ``cfg``, which must have samples."""
    source = build_source(cfg, split, tokenizer, seq_len)
    assert source is not None
    return source


def assert_same_batch(a: Batch, b: Batch) -> None:
    for f in fields(Batch):
        x, y = getattr(a, f.name), getattr(b, f.name)
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y, f.name
