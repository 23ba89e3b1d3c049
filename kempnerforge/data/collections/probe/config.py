"""``data.source = "probe"``: its settings, and what must hold between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from kempnerforge.config import registry
from kempnerforge.config.checks import at_least, at_most, fraction, more_than, one_of, only_if
from kempnerforge.config.data import DataConfig
from kempnerforge.data.collections.probe.scene import COLOURS, GAP, SHAPES
from kempnerforge.util.errors import InputError

QUESTIONS = ("counting", "relation", "binding", "reading", "comparison", "pointing")
SKILLS = (*QUESTIONS, "description")
"""Each is a function of its name in ``skills.py``; the last one asks nothing."""
FULL = 0.4
"""Share of a picture that its things may need at their smallest, with the room around them: more is rarely
found at random.
"""


@registry.register_data_config
@dataclass
class ProbeConfig(DataConfig):
    """Drawn pictures and questions about them. Keys of skills that are not chosen have no effect, so that
    stages may choose different skills.

    Attributes:
        skills: which, of "counting", "relation", "binding", "reading", "comparison", "pointing" (the default,
            all six) and "description", a caption to learn from, which is not held out unless it is alone. One
            that is named twice is asked twice as often.
        samples, eval_samples: of training, and held out.
        seed: of the pictures, and of which combinations are held out; ``train.seed`` decides their order
            alone.
        eval_on: "same", new pictures of what training is about; or "heldout", combinations that training
            never asks about.
        held_out_every: one combination in so many is held out.
        picture_size: pixels of a side as drawn; the encoder's ``image_size`` is the sharpest it will see.
        shapes, palette: names of shapes and colours, at least three each.
        min_size, max_size: of a thing, and the height of writing, as shares of the side.
        texts: questions about a picture at most.
        max_count: things of a kind at most, where they are counted.
        distractors: things at most that nothing is asked about.
        reading: "digits", "letters" or "words" are written.
        reading_length: characters of written digits or letters.
        compared_images: pictures of a comparison, 2 or 3.
        grid: what is pointed to is in the middle of one of grid x grid cells.
        points: "point", coordinates as Molmo writes them; or "cell", column and row.
        background: "white", or "varied": pale colours.
        noise: standard deviation of Gaussian noise on the pixels; 1 is from black to white.
    """

    needs_images: ClassVar[bool] = True

    source: str = "probe"
    skills: list[str] = field(default_factory=lambda: list(QUESTIONS))
    samples: int = 20_000
    eval_samples: int = 1_200
    seed: int = 0
    eval_on: str = "same"
    held_out_every: int = 4
    picture_size: int = 64
    shapes: list[str] = field(default_factory=lambda: list(SHAPES))
    palette: list[str] = field(default_factory=lambda: list(COLOURS))
    min_size: float = 0.15
    max_size: float = 0.25
    texts: int = 2
    max_count: int = 5
    distractors: int = 2
    reading: str = "digits"
    reading_length: int = 3
    compared_images: int = 2
    grid: int = 5
    points: str = "point"
    background: str = "white"
    noise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "eval_on", ("same", "heldout"))
        one_of(self, "reading", ("digits", "letters", "words"))
        one_of(self, "compared_images", (2, 3))
        one_of(self, "points", ("point", "cell"))
        one_of(self, "background", ("white", "varied"))
        at_least(self, 1, "samples", "eval_samples", "texts")
        at_least(self, 0, "seed", "distractors")
        at_least(self, 2, "reading_length", "grid")
        at_least(self, 3, "held_out_every")
        at_least(self, 8, "picture_size")
        at_most(self, 1 << 12, "picture_size")
        at_most(self, 1 << 24, "samples", "eval_samples")
        at_most(self, 1 << 6, "reading_length", "grid")
        more_than(self, 0, "min_size")
        fraction(self, "noise")
        only_if(self, self.reading != "words", "reading = 'digits' or 'letters'", "reading_length")
        for key, known, least in (("skills", SKILLS, 1), ("shapes", SHAPES, 3), ("palette", COLOURS, 3)):
            self._check_names(key, list(known), least)
        if not self.min_size <= self.max_size <= 0.35:
            raise InputError(f"max_size = {self.max_size}: must be between min_size = {self.min_size} and 0.35")
        smallest = min(len(self.shapes), len(self.palette), self.max_count)
        if self.held_out_every > smallest:
            raise InputError(
                f"held_out_every = {self.held_out_every}: must be at most {smallest}, the smallest of shapes, palette and max_count"
            )
        if self.max_count - -(-self.max_count // self.held_out_every) < self.compared_images:
            raise InputError(
                f"max_count = {self.max_count}: leaves fewer than compared_images = {self.compared_images} numbers to train on"
            )
        counted = self.max_count if {"counting", "comparison"} & set(self.skills) else 1
        things = min(self.texts, len(self.shapes)) * counted + self.distractors
        if things * (self.min_size * (1 + GAP)) ** 2 > FULL:
            raise InputError(
                f"min_size = {self.min_size}: up to {things} things (texts x max_count + distractors) do not fit; make it smaller"
            )

    def _check_names(self, key: str, known: list[str], least: int) -> None:
        names: list[str] = getattr(self, key)
        if unknown := [name for name in names if name not in known]:
            raise InputError(f"{key} = {names!r}: {unknown[0]!r} is none; allowed are {', '.join(map(repr, known))}")
        if len(names) < least or (least > 1 and len(set(names)) < len(names)):
            raise InputError(f"{key} = {names!r}: at least {least} are needed" + (", each once" if least > 1 else ""))
