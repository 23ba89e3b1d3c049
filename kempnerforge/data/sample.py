"""A sample: images and what is said about them. A source: samples by index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from kempnerforge.config.data import DataConfig
from kempnerforge.data.batching.order import Order, Shuffled
from kempnerforge.data.fingerprint import digest
from kempnerforge.data.text.template import render_answer, stretches
from kempnerforge.util.errors import InputError, cut

if TYPE_CHECKING:
    from kempnerforge.data.sources.keys import Ignoring
    from kempnerforge.data.text.tokenizer import Tokenizer

__all__ = ["ImageSource", "Sample", "SampleError", "Source", "Taken", "Text", "render_answer", "text_size"]

ImageSource = Path | bytes
"""A file, or its encoded content (PNG, JPEG, ...)."""
MAX_REASON = 600
"""Characters of a reason at most: it may quote names and values of any length."""
LOOKED_AT = 8
"""Samples that the fingerprint of a source is made of, unless the source knows better."""


class SampleError(InputError):
    """This sample cannot be used, and why. It is skipped and counted; the run goes on."""

    def __init__(self, reason: str) -> None:
        super().__init__(cut(reason, MAX_REASON))


class Taken(str):
    """A text that the row has as something else; ``was`` says as what: "a number"."""

    def __new__(cls, text: str, was: str = "") -> Taken:
        made = super().__new__(cls, text)
        made.was = was
        return made

    was: str


@dataclass(frozen=True)
class Text:
    """One thing said about a sample's images: a question and its answer, a caption (no prompt), or a conversation.

    Attributes:
        prompt: what the model reads, before the template.
        answer: what it is trained to write, before the template. A tuple holds token ids: a window of running text, all of it trained,
            to which no template, BOS or EOS is added.
        more: the turns that follow, (prompt, answer) each. All answers are trained.
        system: what the conversation begins with; empty takes ``data.system``.
        leading: None: ``data.image_placeholder`` in prompts and answers marks the places of images. A number: so many images stand at the
            head of the first prompt, and the name of the placeholder is text like any other.
        kind: what is asked, for scores: evaluation reports each kind alone.
        references: further answers that are right; they are not trained.
        listed: whether the answer was the first of a list.
    """

    prompt: str
    answer: str | tuple[int, ...]
    more: tuple[tuple[str, str], ...] = ()
    system: str = ""
    leading: int | None = None
    kind: str = ""
    references: tuple[str, ...] = field(default=(), repr=False, compare=False)
    listed: bool = field(default=False, repr=False, compare=False)

    @classmethod
    def asking(cls, prompt: str, history: Sequence[tuple[str, str]] = (), system: str = "") -> Text:
        """A conversation that ends with a question, for ``Encoder.encode_prompt``: ``history`` holds (prompt, answer) of the turns before."""
        (first, answer), *more = [*history, (prompt, "")]
        return cls(first, answer, tuple(more), system)

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """(prompt, answer) of all turns; a window has none."""
        return () if isinstance(self.answer, tuple) else ((self.prompt, self.answer), *self.more)


@dataclass(frozen=True)
class Sample:
    """``texts`` share ``images`` and do not see each other. ``id`` names the sample in messages; no images: text alone. ``part`` says which of
    ``DataConfig.sections()`` it is from, and so which templates it has. ``key`` is the id that its row has, if any.
    """

    id: str
    images: tuple[ImageSource, ...]
    texts: tuple[Text, ...]
    part: int = 0
    key: str = ""


class Source(ABC):
    """Samples by index. Subclasses register with ``@registry.register_source("name")`` under the name of their config.

    Args:
        cfg: the ``[data]`` section.
        split: "train" or "test" (held out).

    Raises:
        ValueError: the data are missing or not what ``cfg`` says.

    Attributes:
        captions: whether texts are captions or documents, so that one image may well have several answers to no prompt.
        from_files: whether its samples are rows of the user's files.
    """

    captions: ClassVar[bool] = False
    from_files: bool = False

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

    def texts(self, index: int) -> tuple[Text, ...]:
        """The texts of sample ``index``, where that is cheaper without its images.

        Raises:
            SampleError: this sample cannot be used.
        """
        return self[index].texts

    def length(self, index: int) -> int:
        """Size of all texts of a sample, in characters or tokens: samples of like size are batched together."""
        try:
            return text_size(self.texts(index))
        except SampleError:
            return 0

    def num_images(self, index: int) -> int:
        """Images of a sample, as far as that can be told without reading it: 1 where it cannot."""
        return 1

    def order(self, seed: int) -> Order:
        """The stream of sample numbers to train on."""
        return Shuffled(len(self), seed)

    def asks(self, index: int) -> bool:
        """Whether a sample's prompts are questions."""
        return not self.captions

    def peers(self, index: int) -> range:
        """The samples, ``index`` among them, of which one may stand in for it when it cannot be used."""
        return range(len(self))

    def part(self, index: int) -> int:
        """``Sample.part`` of a sample, without reading it."""
        return 0

    def ignoring(self) -> Iterator[Ignoring]:
        """``data.ignore_columns`` of each part, with what it was used for."""
        return iter(())

    @classmethod
    def has(cls, cfg: DataConfig, split: str) -> bool:
        """Whether ``cfg`` names data for ``split``."""
        return True

    def tokenised(self, tokenizer: Tokenizer, seq_len: int) -> Source:
        """This source for a tokenizer and rows of ``seq_len`` positions; running text is cut into windows here."""
        return self

    def fingerprint(self) -> str:
        """Tells whether the data are still those of an earlier run, cheaply: by their number and a few samples. Sources of files override it."""
        count = len(self)
        looked_at = sorted({k * (count - 1) // (LOOKED_AT - 1) for k in range(LOOKED_AT)})
        return digest(count, *(_described(self, index) for index in looked_at))

    def corpus(self) -> Iterator[str]:
        """Training text for a tokenizer: prompts and answers after the templates, without placeholders."""
        for index in range(len(self)):
            try:
                texts = self.texts(index)
            except SampleError:
                continue
            for text in texts:
                for written in stretches(self.cfg, text):
                    yield from written.split(self.cfg.image_placeholder)


def _described(source: Source, index: int) -> tuple[str, ...]:
    try:
        sample = source[index]
    except SampleError as error:
        return (str(error),)
    return (sample.id, *(repr(text) for text in sample.texts))


def text_size(texts: tuple[Text, ...]) -> int:
    """Characters (of strings) and tokens (of windows) in ``texts``."""
    return sum(len(text.prompt) + len(text.answer) + sum(len(prompt) + len(answer) for prompt, answer in text.more) for text in texts)
