"""Text to image: the pictures of another source as answers, written in the tokens of a picture tokenizer
(``model/vq.py``). A caption of a picture is the prompt, so labels, packing, cache and loss are those of any
answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kempnerforge.config import registry
from kempnerforge.config.checks import defaults, not_default
from kempnerforge.config.data import DataConfig
from kempnerforge.config.model import BEGIN_PICTURE, CODE, END_PICTURE, picture_tokens
from kempnerforge.data.batching.loader import CHARACTERS_PER_TOKEN
from kempnerforge.data.batching.order import Order
from kempnerforge.data.fingerprint import file_fingerprint, pictures_fingerprint
from kempnerforge.data.images.decode import load_image
from kempnerforge.data.sample import Sample, SampleError, Text, text_size
from kempnerforge.data.source import Source, corpus_numbers
from kempnerforge.data.sources.build import build_source
from kempnerforge.data.sources.keys import Ignoring
from kempnerforge.data.text.template import stretches
from kempnerforge.model.hf_files import CONFIG
from kempnerforge.model.vq import VQVAE
from kempnerforge.util.digest import digest
from kempnerforge.util.errors import InputError, UnreadError
from kempnerforge.util.paths import PathText

WRITTEN = re.compile(rf"{BEGIN_PICTURE}((?:<code_\d+>)*){END_PICTURE}")
KIND = "picture"
"""The kind of these texts, for scores."""


@registry.register_data_config
@dataclass
class PictureCodesConfig(DataConfig):
    """Pictures to be written. The tokens that they are written in, "<boi>", "<eoi>" and "<code_0>" to the
    last one of the tokenizer, join ``model.new_tokens`` by themselves.

    Attributes:
        codec: the folder of the picture tokenizer.
        pictures: ``[data.pictures]``, a section as ``[data]`` of a source of pictures with captions would be.
            Each sample has one picture; each answer about it is the prompt of a text here, and its prompt
            is not read. Templates and all else are keys of this section.
    """

    unread: ClassVar[tuple[str, ...]] = ("images",)

    source: str = "picture_codes"
    codec: PathText = ""
    pictures: DataConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pictures is None or isinstance(self.pictures, PictureCodesConfig):
            raise InputError("pictures: needs one table, [data.pictures], that names a source of pictures and captions")
        if wrong := [key for key in not_default(self.pictures) if key in defaults(DataConfig) and key != "source"]:
            raise UnreadError(f"pictures.{wrong[0]}", f"pictures.{wrong[0]}: is not read there; set it beside codec")

    def tokens(self) -> list[str]:
        """Names of the tokens that its texts need.

        Raises:
            InputError: there is no picture tokenizer.
        """
        return picture_tokens(VQVAE.load(self.codec, "data.codec").cfg.codes)

    def check_tokens(self, names: Sequence[str], grows: bool) -> None:
        known, codes = [name for name in names if CODE.fullmatch(name)], len(self.tokens()) - len(picture_tokens(0))
        if len(known) < codes and not (grows and (not known or CODE.fullmatch(names[-1]))):
            last = "" if CODE.fullmatch(names[-1] if names else "") or not known else f", and {names[-1]!r} after them"
            raise InputError(
                f"data.codec = {self.codec!r}: its {CONFIG} has codes = {codes}, and the model's vocabulary {len(known)} of them "
                f"(model.new_tokens){last}; set data.codec to the picture tokenizer of this model, or train one with all {codes} in "
                "model.new_tokens, one after another"
            )

    def codec_fingerprint(self) -> str:
        return file_fingerprint(self.codec)


@registry.register_source("picture_codes")
class PictureCodes(Source):
    """One sample for each of the other source, without images to read. Codes are made when a sample is first
    wanted, and kept, 64 numbers each.
    """

    cfg: PictureCodesConfig

    def __init__(self, cfg: PictureCodesConfig, split: str) -> None:
        super().__init__(cfg, split)
        assert cfg.pictures is not None
        try:
            inner = build_source(cfg.pictures, split)
        except InputError as error:
            raise InputError(f"data.pictures: {error}") from None
        if inner is None:
            raise InputError(f"data.pictures: source = {cfg.pictures.source!r}: no samples in split {split!r}")
        self.inner, self.from_files = inner, inner.from_files
        self.codec = VQVAE.load(cfg.codec, "data.codec")
        self._written: dict[int, str] = {}

    @classmethod
    def has(cls, cfg: DataConfig, split: str) -> bool:
        inner: Any = getattr(cfg, "pictures", None)
        return registry.sources.get(inner.source).has(inner, split)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Sample:
        sample = self.inner[index]
        if len(sample.images) != 1:
            raise SampleError(f"sample {sample.id}: {len(sample.images)} images; one is written")
        if index not in self._written:
            self._written[index] = written(self.codec.encode([load_image(sample.images[0], self.codec.cfg.image_size)])[0])
        texts = tuple(Text(caption, self._written[index], leading=0, kind=KIND) for caption in captions(sample.texts))
        return Sample(sample.id, (), texts, shows=sample.images)

    def length(self, index: int) -> int:
        texts = self.inner.texts(index)
        return text_size(texts) + len(texts) * self.codec.cfg.tokens * CHARACTERS_PER_TOKEN

    def num_images(self, index: int) -> int:
        return 0

    def order(self, seed: int) -> Order:
        return self.inner.order(seed)

    def peers(self, index: int) -> range:
        return self.inner.peers(index)

    def ignoring(self) -> Iterator[Ignoring]:
        return self.inner.ignoring()

    def shards(self) -> Sequence[str]:
        return self.inner.shards()

    def fingerprint(self) -> str:
        return digest(self.inner.fingerprint(), pictures_fingerprint(self.inner), file_fingerprint(self.cfg.codec))

    def corpus(self) -> Iterator[str]:
        """Captions alone, as the tokens of pictures are in no text."""
        for index in corpus_numbers(len(self)):
            try:
                for caption in captions(self.inner.texts(index)):
                    yield from stretches(self.cfg, Text(caption, ""))
            except SampleError:
                continue


def captions(texts: Sequence[Text]) -> list[str]:
    """What the answers of ``texts`` say.

    Raises:
        SampleError: an answer is no text, or holds the name of a token that pictures are written in.
    """
    found = [answer for text in texts for _, answer in text.turns]
    if not found or any(CODE.search(caption) or BEGIN_PICTURE in caption or END_PICTURE in caption for caption in found):
        raise SampleError("a caption must be text without the names of picture tokens")
    return found


def written(codes: Sequence[int]) -> str:
    """A picture as an answer."""
    return BEGIN_PICTURE + "".join(f"<code_{code}>" for code in codes) + END_PICTURE


def codes_in(text: str, tokens: int) -> list[int] | None:
    """The codes of a picture that is written in ``text``; None if that is not one picture of ``tokens`` codes
    and nothing else.
    """
    found = WRITTEN.fullmatch("".join(text.split()))
    codes = [int(code) for code in CODE.findall(found[1])] if found else []
    return codes if len(codes) == tokens else None
