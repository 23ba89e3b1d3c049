"""The contract of a data source: samples by index, their order, and a fingerprint of the data."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from kempnerforge.config.data import DataConfig
from kempnerforge.data.batching.order import Order, Shuffled
from kempnerforge.data.sample import Sample, SampleError, Text, no_texts, not_a_sample, text_size
from kempnerforge.data.text.template import stretches
from kempnerforge.util.digest import digest
from kempnerforge.util.plugin_returns import check_returns, instance, whole_number

if TYPE_CHECKING:
    from kempnerforge.data.sources.keys import Ignoring
    from kempnerforge.data.text.tokenizer import Tokenizer

SAMPLED = 8
"""Samples that the default fingerprint of a source is made of."""
CORPUS_SAMPLES = 200_000
"""Samples at most whose texts a tokenizer is trained on. Two million short ones took six minutes and 1.6 GiB."""


class Source(ABC):
    """Samples by index. Subclasses register with ``@registry.register_source("name")`` under the name of
    their config.

    Args:
        cfg: the ``[data]`` section.
        split: "train" or "test" (held out).

    Raises:
        ValueError: the data are missing or not what ``cfg`` says.

    Attributes:
        captions: whether texts are captions or documents, so that one image may well have several answers to
            no prompt.
        from_files: whether its samples are rows of the user's files.
    """

    captions: ClassVar[bool] = False
    from_files: bool = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_returns(
            cls,
            __len__=whole_number,
            __getitem__=not_a_sample,
            texts=no_texts,
            length=whole_number,
            num_images=whole_number,
            order=instance(Order, "an Order"),
            peers=instance(range, "a range"),
            part=whole_number,
            tokenised=instance(Source, "a Source"),
            fingerprint=instance(str, "a string"),
        )

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
        """The samples, ``index`` among them, of which one may replace it when it cannot be used."""
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
        """This source for a tokenizer and rows of ``seq_len`` positions; running text is cut into windows
        here.
        """
        return self

    def fingerprint(self) -> str:
        """Changes when the data change, as far as their number and a few samples show it. Sources of files
        override it.
        """
        count = len(self)
        sampled = sorted({k * (count - 1) // (SAMPLED - 1) for k in range(SAMPLED)})
        return digest(count, *(_described(self, index) for index in sampled))

    def shards(self) -> Sequence[str]:
        """Its files, where ``fingerprint`` glances at some of several."""
        return ()

    def corpus(self) -> Iterator[str]:
        """Training text for a tokenizer: prompts and answers after the templates, without placeholders."""
        for index in corpus_numbers(len(self)):
            try:
                texts = self.texts(index)
            except SampleError:
                continue
            for text in texts:
                for written in stretches(self.cfg, text):
                    yield from written.split(self.cfg.image_placeholder)


def corpus_numbers(count: int) -> Sequence[int]:
    """The samples, of ``count``, whose texts a tokenizer is trained on: all, or ``CORPUS_SAMPLES`` of them,
    drawn in one fixed way.
    """
    if count <= CORPUS_SAMPLES:
        return range(count)
    return sorted(random.Random(0).sample(range(count), CORPUS_SAMPLES))


def _described(source: Source, index: int) -> tuple[str, ...]:
    try:
        sample = source[index]
    except SampleError as error:
        return (str(error),)
    return (sample.id, *(repr(text) for text in sample.texts))
