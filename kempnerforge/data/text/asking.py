"""Where the training texts place their images, so that every question is asked in the same way.

A prompt may place its images itself ("<image>\\nwhat is it?"). The question "what is it?" about an image
means the same, so the model must read the same: what was observed in the data is kept with the run and used
by every tool that asks. Placeholders in a question take precedence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kempnerforge.config.data import DataConfig
from kempnerforge.data.sample import Sample, SampleError, Text
from kempnerforge.data.source import Source

PLACES = ("front", "head", "tail")
OBSERVED = 8
"""Stretches of a source that are read, and samples in each: neighbours are cheap where rows are read from
front to back.
"""


class ImageForm(NamedTuple):
    """Where the images of a text are: ``place``, ``between`` and ``gap`` as in ``Asking``; ``between`` is
    None where a single image does not show it.
    """

    place: str
    between: str | None
    gap: str

    def __str__(self) -> str:
        if self.place == "front":
            return "images in front of everything"
        joined = f", {self.between!r} between them" if self.between else ""
        return f"images at the {self.place} of the prompt, {self.gap!r} {'after' if self.place == 'head' else 'before'} them{joined}"


IN_FRONT = ImageForm("front", None, "")


@dataclass(frozen=True)
class Asking:
    """Where the images go in a question that does not place them.

    Attributes:
        place: in "front" of the row, or at the "head" or the "tail" of the first prompt.
        between, gap: what is between two of them, and between them and the words of the prompt.
        system: what the conversations of the data begin with; empty: ``data.system``.
        together: images of every question, if all have as many; 0: each image is asked about alone.
    """

    place: str = "front"
    between: str = ""
    gap: str = ""
    system: str = ""
    together: int = 0

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise ValueError(f"place = {self.place!r}: allowed are {', '.join(PLACES)}")
        if self.together < 0:
            raise ValueError(f"together = {self.together}: must be at least 0")

    def text(self, prompt: str, images: int, placeholder: str, history: Sequence[tuple[str, str]] = ()) -> Text:
        """The conversation up to ``prompt``, which is asked about ``images``.

        Args:
            history: (prompt, answer) of the turns before; what a model writes is no place for an image.
        """
        turns = [*((asked, answer.replace(placeholder, "")) for asked, answer in history), (prompt, "")]
        if images and self.place != "front" and not any(placeholder in asked for asked, _ in turns):
            turns[0] = self.placed(turns[0][0], images, placeholder), turns[0][1]
        (first, answer), *more = turns
        return Text(first, answer, tuple(more), self.system)

    def placed(self, prompt: str, images: int, placeholder: str) -> str:
        """``prompt`` with its images; a gap that it has already is not made twice."""
        block = self.between.join([placeholder] * images)
        if self.place == "tail":
            return prompt + ("" if prompt.endswith(self.gap) else self.gap) + block
        return block + ("" if prompt.startswith(self.gap) else self.gap) + prompt

    @classmethod
    def usual(cls, cfg: DataConfig) -> Asking:
        """What goes with a source, as long as nothing is known of the data."""
        if cfg.source == "llava":
            return cls("head", "\n", "\n")
        return cls("head") if vars(cfg).get("images_in_prompt") else cls()


@dataclass(frozen=True)
class ObservedLayouts:
    """What was found in the data.

    Attributes:
        asking: the most frequent form.
        forms: each of them in words, and how many texts have it.
    """

    asking: Asking
    forms: Counter[str]

    def line(self, placeholder: str) -> str:
        """A line for the user; empty where all images are in front, which is the default."""
        form = ImageForm(self.asking.place, self.asking.between, self.asking.gap)
        if len(self.forms) < 2 and form.place == "front":
            return ""
        listed = ", ".join(f"{form} ({count} texts)" for form, count in self.forms.most_common(4))
        several = f"images are in different places: {listed}; " if len(self.forms) > 1 else ""
        return f"{several}a question without {placeholder} is asked with {form}"


def observe(source: Source, cfg: DataConfig) -> ObservedLayouts:
    """Where texts of ``source`` place their images: texts of its first section, whose template questions are
    asked with.

    Args:
        cfg: that section.
    """
    samples = [sample for sample in _some(source) if not sample.part]
    texts = [(text, len(sample.images)) for sample in samples for text in sample.texts if text.turns]
    with_images = [(text, count) for text, count in texts if count]
    found = Counter(form for text, count in with_images if (form := form_of(text, cfg.image_placeholder)))
    forms = Counter({str(form): count for form, count in found.items()})
    usual = _most_frequent(found)
    systems = Counter(text.system for text, _ in texts)
    system = systems.most_common(1)[0][0] if systems else ""
    counts = {count for _, count in with_images}
    together = counts.pop() if len(counts) == 1 else 0
    return ObservedLayouts(Asking(usual.place, usual.between or "", usual.gap, system, together if together > 1 else 0), forms)


def form_of(text: Text, placeholder: str) -> ImageForm | None:
    """How ``text`` places its images; None if they are anywhere but before or after the prompt."""
    if text.leading is not None:
        return ImageForm("head", "", "") if text.leading else IN_FRONT
    everything = "".join([text.system, *text.strings])
    if placeholder not in everything:
        return IN_FRONT
    mark, prompt = re.escape(placeholder), text.prompt
    if everything.count(placeholder) != prompt.count(placeholder):
        return None
    for place, pattern in (("head", rf"({mark}(?:\s*{mark})*)(\s*)(.*)"), ("tail", rf"(.*?)(\s*)({mark}(?:\s*{mark})*)")):
        found = re.fullmatch(pattern, prompt, re.DOTALL)
        block, rest = (found[1], found[3]) if found and place == "head" else (found[3], found[1]) if found else ("", placeholder)
        if found and placeholder not in rest:
            between = set(block.split(placeholder)[1:-1])
            return ImageForm(place, between.pop() if between else None, found[2]) if len(between) < 2 else None
    return None


def _most_frequent(found: Counter[ImageForm]) -> ImageForm:
    """The form of most texts; what is between images from those that have several."""
    if not found:
        return IN_FRONT
    joined: Counter[tuple[str, str]] = Counter()
    for (place, _, gap), count in found.items():
        joined[place, gap] += count
    place, gap = joined.most_common(1)[0][0]
    betweens = Counter({between: count for (p, between, g), count in found.items() if (p, g) == (place, gap) and between is not None})
    return ImageForm(place, betweens.most_common(1)[0][0] if betweens else None, gap)


def _some(source: Source) -> Iterator[Sample]:
    size = len(source)
    begins = sorted({k * max(0, size - OBSERVED) // (OBSERVED - 1) for k in range(OBSERVED)})
    indices: Iterable[int] = dict.fromkeys(index for begin in begins for index in range(begin, min(size, begin + OBSERVED)))
    for index in indices:
        try:
            yield source[index]
        except SampleError:
            continue
