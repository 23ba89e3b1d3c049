"""easy-VQA (Zhou, 2019; PyPI ``easy-vqa``, MIT): 4,000 + 1,000 images of 64x64 with one coloured shape, about
ten questions each.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from kempnerforge.config import registry
from kempnerforge.config.data import EasyVQAConfig
from kempnerforge.data.collections.installed import data_package
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.source import Source

COLOURS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
SHAPES = frozenset({"circle", "rectangle", "triangle"})


@registry.register_source("easy_vqa")
class EasyVQA(Source):
    """One sample per image, by image number. Captions are made of the answers of the same split, and only
    where these name both the shape and the colour: 2,435 of the 4,000 training images.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self, cfg: EasyVQAConfig, split: str) -> None:
        super().__init__(cfg, split)
        package = data_package("easy_vqa", "easy-vqa", "easy_vqa", extra="quickstart")
        paths: dict[int, str] = getattr(package, f"get_{split}_image_paths")()
        asked: dict[int, list[Text]] = defaultdict(list)
        for question, answer, image in zip(*getattr(package, f"get_{split}_questions")(), strict=True):
            asked[image].append(Text(question, answer))
        self._samples: list[Sample] = []
        for image in sorted(paths):
            texts = tuple(asked[image]) if cfg.form == "questions" else ()
            if cfg.form == "captions" or (cfg.with_captions and split == "train"):
                texts += _caption(asked[image])
            if texts:
                self._samples.append(Sample(f"easy_vqa/{split}/{image}", (Path(paths[image]),), texts))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


def _caption(texts: list[Text]) -> tuple[Text, ...]:
    """What the answers say of an image, shape first; nothing unless they name its shape and its colour."""
    answers = {str(text.answer) for text in texts}
    shapes, colours = sorted(answers & SHAPES), sorted(answers & COLOURS)
    return (Text("", " ".join(shapes + colours)),) if shapes and colours else ()
