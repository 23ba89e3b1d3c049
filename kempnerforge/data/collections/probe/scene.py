"""Things on a picture and where they are. Lengths are shares of the picture's side, from its upper left
corner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
COLOURS = {
    "red": (222, 40, 40),
    "green": (30, 150, 60),
    "blue": (40, 80, 222),
    "yellow": (238, 200, 0),
    "purple": (150, 50, 180),
    "orange": (246, 130, 20),
    "brown": (120, 70, 30),
    "black": (20, 20, 20),
}
LETTER_WIDTH = 0.62
"""Width of a letter over the height of its line, roughly: room that is kept for written text."""
GAP = 0.1
"""Room between two things over their size."""
TRIES = 60


@dataclass(frozen=True)
class Thing:
    """A coloured shape, or a coloured piece of writing.

    Attributes:
        shape: of ``SHAPES``; empty for writing.
        at: its centre, where that is decided already.
    """

    colour: str
    shape: str = ""
    writing: str = ""
    at: tuple[float, float] | None = None
    limit: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Placed:
    """A thing, its centre and the height of the box that it fills."""

    thing: Thing
    x: float
    y: float
    size: float

    @property
    def half(self) -> tuple[float, float]:
        """Half the width and half the height of its box."""
        return half_box(self.thing, self.size)

    def clear_of(self, other: Placed) -> bool:
        """Whether the boxes of the two do not touch, and keep their distance."""
        apart = 1 + GAP
        (w, h), (v, k) = self.half, other.half
        return abs(self.x - other.x) >= apart * (w + v) or abs(self.y - other.y) >= apart * (h + k)


def half_box(thing: Thing, size: float) -> tuple[float, float]:
    """Half the width and half the height of the box of ``thing`` at ``size``."""
    width = LETTER_WIDTH * len(thing.writing) * size if thing.writing else size
    return width / 2, size / 2


def arrange(things: Sequence[Thing], rng: Random, low: float, high: float) -> list[Placed]:
    """Gives every thing a size between ``low`` and ``high`` and a position where it touches nothing and is
    seen whole.

    Where that does not work out after some tries, all become a tenth smaller: a picture that is too full has
    small things. Things that already have a position keep it.
    """
    scale = 1.0
    while True:
        placed = _try(things, rng, low * scale, high * scale)
        if placed is not None:
            return placed
        scale *= 0.9


def _try(things: Sequence[Thing], rng: Random, low: float, high: float) -> list[Placed] | None:
    sizes = {thing: rng.uniform(low, high) for thing in range(len(things))}
    placed: list[Placed] = []
    for number in sorted(sizes, key=lambda k: (things[k].at is None, -sizes[k])):
        thing = things[number]
        size = min(sizes[number], thing.limit, 0.9 / (2 * half_box(thing, 1)[0]))
        if thing.at is not None:
            placed.append(Placed(thing, *thing.at, size))
            continue
        w, h = half_box(thing, size)
        for _ in range(TRIES):
            candidate = Placed(thing, rng.uniform(w, 1 - w), rng.uniform(h, 1 - h), size)
            if all(candidate.clear_of(other) for other in placed):
                placed.append(candidate)
                break
        else:
            return None
    return placed
