"""The stamps of Tux Paint (Debian ``tuxpaint-stamps-default``, GPL-2): photos and drawings with a caption in
up to 77 languages.

Beside each picture ``mushroom.png`` lies ``mushroom.txt``: the caption in English, then a line ``de.utf8=Ein
Pilz.`` for each other language. Of the 952 stamps 785 are there as PNG; the others, SVG drawings, are left
out.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, field
from typing import ClassVar

from kempnerforge.config import registry
from kempnerforge.config.checks import at_least, one_of, only_if
from kempnerforge.config.data import DataConfig
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.source import Source
from kempnerforge.data.sources.pictures import resolve_image
from kempnerforge.util.errors import InputError
from kempnerforge.util.paths import PathText
from kempnerforge.util.reading import regular

ENGLISH = "en"


@registry.register_data_config
@dataclass
class StampsConfig(DataConfig):
    """Captioned stamps.

    Attributes:
        path: the folder that ``kempnerforge data fetch stamps`` made, or ``/usr/share/tuxpaint/stamps`` where
            the package is installed.
        languages: as the files name them, "en", "de", "pt_BR", "zh_CN". With several, each caption is a
            separate text, whose prompt is the name of its language.
        held_out_every: one stamp in so many is held out, by its name.
        form: "captions"; or "questions" about the group that a stamp is sorted into, the outermost of its
            folders: which one it is, and of one or another group whether it belongs to it.
        with_captions: with "questions", the captions are trained as further texts.
    """

    needs_images: ClassVar[bool] = True

    source: str = "stamps"
    path: PathText = ""
    languages: list[str] = field(default_factory=lambda: [ENGLISH])
    held_out_every: int = 10
    form: str = "captions"
    with_captions: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "form", ("captions", "questions"))
        only_if(self, self.form == "questions", "form = 'questions'", "with_captions")
        at_least(self, 2, "held_out_every")
        if not self.path:
            raise InputError("path = '': source 'stamps' needs the folder that this makes: kempnerforge data fetch stamps")
        if not self.languages or len(set(self.languages)) < len(self.languages):
            raise InputError(f"languages = {self.languages!r}: at least one, and each once")


@registry.register_source("stamps")
class Stamps(Source):
    """One sample per stamp that has a caption in one of the languages, in the order of the names.

    Raises:
        ValueError: no stamps there, or none in one of the languages.
    """

    cfg: StampsConfig

    def __init__(self, cfg: StampsConfig, split: str) -> None:
        super().__init__(cfg, split)
        self._root = os.path.realpath(cfg.path)
        self._stamps: list[tuple[str, tuple[Text, ...]]] = []
        known: set[str] = set()
        names = find_stamps(self._root)
        groups = sorted({_group(name) for name in names})
        if cfg.form == "questions" and len(groups) < 2:
            raise InputError(f"data.path = {cfg.path!r}: form = 'questions' is about the folders in it that stamps lie in, and needs two")
        asks, tells = cfg.form == "questions", cfg.form == "captions" or (cfg.with_captions and split == "train")
        for name in names:
            captions = read_captions(os.path.join(self._root, f"{name}.txt"))
            known |= captions.keys()
            texts = tuple(_text(language, captions[language], cfg) for language in cfg.languages if language in captions)
            number = zlib.crc32(name.encode("utf-8", "surrogateescape"))
            if texts and (number % cfg.held_out_every == 0) is (split == "test"):
                questions = _questions(_group(name), groups, number // cfg.held_out_every) if asks else ()
                self._stamps.append((name, questions + texts * tells))
        if not known:
            raise InputError(f"data.path = {cfg.path!r}: no stamps there; get them with: kempnerforge data fetch stamps")
        if missing := [language for language in cfg.languages if language not in known]:
            raise InputError(f"data.languages: no captions in {missing[0]!r}; there are {', '.join(sorted(known))}")

    def __len__(self) -> int:
        return len(self._stamps)

    def texts(self, index: int) -> tuple[Text, ...]:
        return self._stamps[index][1]

    def __getitem__(self, index: int) -> Sample:
        name, texts = self._stamps[index]
        return Sample(f"stamps/{name}", (resolve_image(f"{name}.png", self._root),), texts)


def _text(language: str, caption: str, cfg: StampsConfig) -> Text:
    return Text(language, caption, kind=language) if len(cfg.languages) > 1 else Text("", caption)


def _group(name: str) -> str:
    return name.partition(os.sep)[0]


def _questions(group: str, groups: list[str], number: int) -> tuple[Text, ...]:
    """About a stamp of ``group``; ``number`` chooses the other one that is asked for."""
    others = [other for other in groups if other != group]
    which = Text("which group does the picture belong to?", group, kind="group")
    asked = {group: "yes", others[number % len(others)]: "no"}
    return which, *(Text(f"does the picture belong to {name}?", answer, kind="yes or no") for name, answer in asked.items())


def find_stamps(root: str) -> list[str]:
    """The names of all stamps below ``root`` that have a PNG and captions: their paths without the ending."""
    found = []
    for folder, _, files in os.walk(root):
        names = set(files)
        for file in files:
            stem, ending = os.path.splitext(file)
            if ending == ".png" and f"{stem}.txt" in names:
                found.append(os.path.relpath(os.path.join(folder, stem), root))
    return sorted(found)


def read_captions(path: str) -> dict[str, str]:
    """Language -> caption, of one file; lines that say nothing are left out.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with open(regular(path), encoding="utf-8-sig") as file:
            first, *lines = file.read().splitlines() or [""]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
    captions = {ENGLISH: first.strip()}
    for line in lines:
        language, ending, caption = line.partition(".utf8=")
        if ending:
            captions[language.strip()] = caption.strip()
    return {language: caption for language, caption in captions.items() if caption}
