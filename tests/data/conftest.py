"""A tokenizer, rows with pictures, and encoders that the data tests share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kempnerforge.config.data import DataConfig
from kempnerforge.data import Encoder, Layout, Sample, Text, Tokenizer
from tests.data.samples import ListSource, png


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["what is the colour?\n", "red", "blue", "is it a circle?\n", "yes", "no"] * 4, 400)


@pytest.fixture(name="png")
def png_fixture() -> Callable[..., bytes]:
    return png


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
