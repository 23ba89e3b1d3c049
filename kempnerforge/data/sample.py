"""A sample: images and what is said about them. A source: samples by index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kempnerforge.config.data import DataConfig

if TYPE_CHECKING:
    from kempnerforge.data.tokenizer import Tokenizer

ImageSource = Path | bytes
"""A file, or its encoded content (PNG, JPEG, ...)."""


class SampleError(ValueError):
    """This sample cannot be used, and why. It is skipped and counted; the run goes on."""


@dataclass(frozen=True)
class Text:
    """One thing said about a sample's images.

    Attributes:
        prompt: what the model reads, before the template.
        answer: what it is trained to write, before the template. A tuple holds token ids: a window of running text, all of it trained,
            to which no template, BOS or EOS is added.
    """

    prompt: str
    answer: str | tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """``texts`` share ``images`` and do not see each other. ``id`` names the sample in messages; no images: text alone. ``part`` says which of
    ``DataConfig.sections()`` it is from, and so which templates it has.
    """

    id: str
    images: tuple[ImageSource, ...]
    texts: tuple[Text, ...]
    part: int = 0


class Source(ABC):
    """Samples by index. Subclasses register with ``@registry.register_source("name")`` under the name of their config.

    Args:
        cfg: the ``[data]`` section.
        split: "train" or "test" (held out).

    Raises:
        ValueError: the data are missing or not what ``cfg`` says.
    """

    def __init__(self, cfg: DataConfig, split: str) -> None:
        assert split in ("train", "test"), split
        self.cfg, self.split = cfg, split

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``; images are not decoded.

        Raises:
            SampleError: this sample cannot be used.
        """

    def length(self, index: int) -> int:
        """Size of all texts of a sample, in characters or tokens: samples of like size are batched together."""
        try:
            return text_size(self[index].texts)
        except SampleError:
            return 0

    def num_images(self, index: int) -> int:
        """Images of a sample, as far as that can be told without reading it: 1 where it cannot."""
        return 1

    @classmethod
    def has(cls, cfg: DataConfig, split: str) -> bool:
        """Whether ``cfg`` names data for ``split``."""
        return True

    def tokenised(self, tokenizer: Tokenizer, seq_len: int) -> Source:
        """This source for a tokenizer and rows of ``seq_len`` positions; running text is cut into windows here."""
        return self

    def corpus(self) -> Iterator[str]:
        """Training text for a tokenizer: prompts and answers after the templates, without placeholders."""
        for index in range(len(self)):
            try:
                texts = self[index].texts
            except SampleError:
                continue
            for text in texts:
                yield from render_prompt(self.cfg, text.prompt).split(self.cfg.image_placeholder)
                if isinstance(text.answer, str):
                    yield from render_answer(self.cfg, text.answer).split(self.cfg.image_placeholder)


def render_prompt(cfg: DataConfig, prompt: str) -> str:
    """``prompt`` in ``data.prompt_template``."""
    return cfg.prompt_template.format(prompt=prompt)


def render_answer(cfg: DataConfig, answer: str) -> str:
    """``answer`` in ``data.answer_template``."""
    return cfg.answer_template.format(answer=answer)


def text_size(texts: tuple[Text, ...]) -> int:
    """Characters (of strings) and tokens (of windows) in ``texts``."""
    return sum(len(text.prompt) + len(text.answer) for text in texts)
