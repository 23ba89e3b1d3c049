"""A data source: what easy-VQA asks and says, without its pictures. A language model learns from it how questions are answered."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kempnerforge.config import registry
from kempnerforge.config.data import EasyVQAConfig
from kempnerforge.data.collections.easy_vqa import EasyVQA
from kempnerforge.data.sample import Sample


@registry.register_data_config
@dataclass
class EasyVQAWordsConfig(EasyVQAConfig):
    """The keys of ``easy_vqa``."""

    needs_images: ClassVar[bool] = False

    source: str = "easy_vqa_words"


@registry.register_source("easy_vqa_words")
class EasyVQAWords(EasyVQA):
    """The samples of ``easy_vqa`` less their images."""

    def __getitem__(self, index: int) -> Sample:
        return replace(super().__getitem__(index), images=())

    def num_images(self, index: int) -> int:
        return 0
