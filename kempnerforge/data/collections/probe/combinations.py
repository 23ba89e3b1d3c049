"""Which combinations training never sees: a model that only memorises cannot answer questions about them.

Combination (i, j, ...) of the i-th colour with the j-th shape, and so on, is held out if ``i + j + ... +
seed`` is a multiple of ``held_out_every``: a Latin square, in which every colour and every shape is seen in
training, and every one is part of something held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

DIGITS = "0123456789"
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
WORDS = (
    "ant", "apple", "arm", "bag", "ball", "bath", "bear", "bee", "bell", "bird", "boat", "book", "bus", "cake", "cap", "car", "cat",
    "chair", "cow", "cup", "dish", "dog", "door", "duck", "ear", "egg", "eye", "fan", "farm", "fish", "flag", "foot", "fork", "fox",
    "frog", "goat", "hand", "hat", "hen", "hill", "home", "horse", "ice", "jam", "key", "king", "kite", "lake", "lamp", "leaf", "leg",
    "lion", "map", "milk", "moon", "mouse", "nail", "nest", "nose", "nut", "park", "pen", "pig", "ring", "road", "rock", "rope", "sea",
    "ship", "shoe", "sky", "snow", "sock", "star", "sun", "tent", "top", "train", "tree", "van", "wall", "wind", "wolf", "zoo",
)  # fmt: skip


@dataclass
class Combinations:
    """Combinations that training sees, under ``False``, and held-out ones, under ``True``.

    Attributes:
        every: one combination in so many is held out.
        pairs, counts, partners: (colour, shape); shape -> how many; (shape, another shape).
    """

    colours: Sequence[str]
    shapes: Sequence[str]
    max_count: int
    every: int
    seed: int
    pairs: dict[bool, list[tuple[str, str]]] = field(init=False)
    counts: dict[bool, dict[str, list[int]]] = field(init=False)
    partners: dict[bool, list[tuple[str, str]]] = field(init=False)

    def __post_init__(self) -> None:
        colours, shapes = list(enumerate(self.colours)), list(enumerate(self.shapes))
        self.pairs, self.counts, self.partners = {}, {}, {}
        for unseen in (False, True):
            self.pairs[unseen] = [(c, s) for (i, c), (j, s) in product(colours, shapes) if self.held_out(i, j) is unseen]
            self.partners[unseen] = [(a, b) for (i, a), (j, b) in product(shapes, shapes) if i != j and self.held_out(i, j) is unseen]
            counts = {s: [n for n in range(1, self.max_count + 1) if self.held_out(j, n) is unseen] for j, s in shapes}
            self.counts[unseen] = {s: numbers for s, numbers in counts.items() if numbers}

    def held_out(self, *indices: int) -> bool:
        """Whether the combination of ``indices`` is."""
        return (sum(indices) + self.seed) % self.every == 0

    def held_out_string(self, written: str, kind: str) -> bool:
        """Whether a piece of writing is: words as they are in the list, other strings by the sum of their
        characters.
        """
        if kind == "words":
            return self.held_out(WORDS.index(written))
        return self.held_out(*map((DIGITS if kind == "digits" else LETTERS).index, written))
