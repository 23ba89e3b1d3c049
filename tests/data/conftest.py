"""A tokenizer, rows with pictures, and encoders that the data tests share."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from PIL import Image

from kempnerforge.config.data import DataConfig
from kempnerforge.data import Encoder, Layout, Sample, SampleError, Source, Text, Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["what is the colour?\n", "red", "blue", "is it a circle?\n", "yes", "no"] * 4, 400)


def png(colour: tuple[int, int, int], size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(name="png")
def png_fixture() -> Callable[..., bytes]:
    return png


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


@pytest.fixture
def list_source() -> type[ListSource]:
    return ListSource


@pytest.fixture
def make_encoder(tokenizer: Tokenizer) -> Callable[..., Encoder]:
    plain = tokenizer

    def make(
        image_tokens: int = 2,
        image_size: int = 8,
        max_text_len: int = 32,
        seq_len: int = 64,
        pad_to: int = 40,
        tokenizer: Tokenizer = plain,
        **cfg: object,
    ) -> Encoder:
        layout = Layout(image_tokens, image_size, max_text_len, seq_len, pad_to)
        return Encoder(tokenizer, DataConfig(**cfg), layout, seed=0)  # type: ignore[arg-type]

    return make


@pytest.fixture
def pictures() -> list[Sample]:
    """24 samples with one image each and one to four texts of different length."""
    rng = np.random.default_rng(0)
    words = ["red", "blue", "yes", "no", "a long answer of many words"]
    samples = []
    for k in range(24):
        texts = tuple(Text("what?" * int(rng.integers(3)), str(rng.choice(words))) for _ in range(int(rng.integers(1, 5))))
        samples.append(Sample(f"s{k}", (png((k * 10, 0, 255 - k)),), texts))
    return samples
