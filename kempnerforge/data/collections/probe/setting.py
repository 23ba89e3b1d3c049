"""What a skill is given, and what it returns."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from random import Random

from kempnerforge.data.collections.probe.combinations import DIGITS, LETTERS, WORDS, Combinations
from kempnerforge.data.collections.probe.config import ProbeConfig
from kempnerforge.data.collections.probe.scene import Thing
from kempnerforge.data.sample import Text

ALPHABETS = {"digits": DIGITS, "letters": LETTERS}


@dataclass(frozen=True)
class Draft:
    """A sample before it is drawn."""

    scenes: tuple[tuple[Thing, ...], ...]
    texts: tuple[Text, ...]


@dataclass(frozen=True)
class Setting:
    """The random numbers and the rules of one sample.

    Attributes:
        known: which combinations are held out.
        unseen: questions are about combinations that are held out; else about the others. What is not asked
            about is never held out.
    """

    cfg: ProbeConfig
    known: Combinations
    rng: Random
    unseen: bool

    def colour_for(self, shape: str, avoid: Collection[str] = ()) -> str:
        """A colour that training sees on ``shape``, none of ``avoid`` if there is another one."""
        colours = [c for c, s in self.known.pairs[False] if s == shape]
        return self.rng.choice([c for c in colours if c not in avoid] or colours)

    def others(self, most: int, shapes: Collection[str] = (), colours: Collection[str] = ()) -> list[Thing]:
        """Up to ``most`` things that nothing is asked about, of other shapes than ``shapes`` and other
        colours than ``colours``, with no shape and no colour twice.
        """
        made: list[Thing] = []
        pairs = self.rng.sample(self.known.pairs[False], len(self.known.pairs[False]))
        for colour, shape in pairs[: len(pairs) if most else 0]:
            taken = [*shapes, *(thing.shape for thing in made)], [*colours, *(thing.colour for thing in made)]
            if len(made) < most and shape not in taken[0] and colour not in taken[1]:
                made.append(Thing(colour, shape))
        return made

    def distractors(self) -> int:
        """How many things that nothing is asked about."""
        return self.rng.randint(0, self.cfg.distractors)

    def write(self, unseen: bool) -> str:
        """A string that is held out, or one that is not."""
        kind, rng = self.cfg.reading, self.rng
        while True:
            if kind == "words":
                written = rng.choice(WORDS)
            else:
                written = "".join(rng.choice(ALPHABETS[kind]) for _ in range(self.cfg.reading_length))
            if self.known.held_out_string(written, kind) is unseen:
                return written
