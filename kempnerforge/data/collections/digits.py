"""Handwritten digits (Alpaydin and Kaynak, 1998, through ``scikit-learn``): 1,797 pictures of 8x8 with
questions about each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from PIL import Image

from kempnerforge.config import registry
from kempnerforge.config.data import DataConfig
from kempnerforge.data.collections.installed import data_package
from kempnerforge.data.images.decode import encode_png
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.source import Source
from kempnerforge.util.errors import InputError

QUESTIONS = {
    "which": ("which digit is it?", str),
    "even": ("is it even?", lambda digit: "no" if digit % 2 else "yes"),
    "larger": ("is it larger than four?", lambda digit: "yes" if digit > 4 else "no"),
}
"""Of both yes/no questions half of the ten digits are a yes."""
HELD_OUT = 5
"""The last of so many parts is held out: mostly digits of other writers."""


@registry.register_data_config
@dataclass
class DigitsConfig(DataConfig):
    """Digits by hand.

    Attributes:
        questions: of "which", "even" and "larger".
    """

    needs_images: ClassVar[bool] = True

    source: str = "digits"
    questions: list[str] = field(default_factory=lambda: list(QUESTIONS))

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.questions if name not in QUESTIONS]
        if unknown or not self.questions or len(set(self.questions)) < len(self.questions):
            raise InputError(f"questions = {self.questions!r}: allowed are {', '.join(map(repr, QUESTIONS))}, each once, and at least one")


@registry.register_source("digits")
class Digits(Source):
    """The first four fifths to train on, the last to test, in the order of the file."""

    cfg: DigitsConfig

    def __init__(self, cfg: DigitsConfig, split: str) -> None:
        super().__init__(cfg, split)
        data = data_package("digits", "scikit-learn", "sklearn.datasets", extra="digits").load_digits()
        self._pixels = np.asarray(data.images, dtype=np.float64)  # (N, 8, 8), ink from 0 to 16
        self._digits = [int(digit) for digit in data.target]
        cut = len(self._digits) - len(self._digits) // HELD_OUT
        self._numbers = range(cut) if split == "train" else range(cut, len(self._digits))

    def __len__(self) -> int:
        return len(self._numbers)

    def texts(self, index: int) -> tuple[Text, ...]:
        digit = self._digits[self._numbers[index]]
        return tuple(Text(QUESTIONS[name][0], QUESTIONS[name][1](digit), kind=name) for name in self.cfg.questions)

    def __getitem__(self, index: int) -> Sample:
        number = self._numbers[index]
        shades = (255 - self._pixels[number] * (255 / 16)).round().astype(np.uint8)  # black on white
        return Sample(f"digits/{number}", (encode_png(Image.fromarray(shades)),), self.texts(index))
