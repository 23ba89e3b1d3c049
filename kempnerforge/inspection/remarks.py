"""What is worth a word about samples that can all be used: values that were taken as text, prompts that
cannot tell their answers apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kempnerforge.data.sample import ConvertedText, ImageSource, Sample, Text
from kempnerforge.util.digest import content_digest
from kempnerforge.util.errors import show

KEPT = 200_000
"""Images whose answers are remembered."""


def name_digest(image: ImageSource) -> bytes:
    """16 bytes for the path of an image, or for its content where it has none: no file is opened."""
    return content_digest(str(image) if isinstance(image, Path) else hashlib.blake2b(image, digest_size=16).digest())


@dataclass
class Remarks:
    """Counts over samples.

    Attributes:
        taken: by what a value was in its row, how many there are and the first one.
        listed: answers that were lists; the first one.
        unused: turns of conversations that are left out; the first one.
        unasked: image -> the answer that it has to no prompt, of the first samples.
        ambiguous: images that have several, with the sample that shows it.
        prompts, answers: different ones of samples without images, up to two of each.
    """

    taken: dict[str, tuple[int, str]] = field(default_factory=dict)
    listed: tuple[int, str] = (0, "")
    unused: tuple[int, str] = (0, "")
    unasked: dict[bytes, bytes] = field(default_factory=dict)
    ambiguous: dict[bytes, str] = field(default_factory=dict)
    prompts: set[str] = field(default_factory=set)
    answers: set[str] = field(default_factory=set)

    def add(self, sample: Sample, asks: bool) -> None:
        """``asks``: whether prompts are questions in this source."""
        for text in sample.texts:
            for turn in text.turns:
                for value in turn:
                    if isinstance(value, ConvertedText):
                        self._count(value.was, 1, value)
            if text.unused:
                self.unused = self.unused[0] + len(text.unused), self.unused[1] or text.unused[0]
            if text.listed:
                self.listed = self.listed[0] + 1, self.listed[1] or str(text.answer)
            if asks and len(text.turns) == 1:
                self._compare(sample, text)

    def _count(self, was: str, number: int, example: str) -> None:
        before, first = self.taken.get(was, (0, example))
        self.taken[was] = before + number, str(first)

    def _compare(self, sample: Sample, text: Text) -> None:
        prompt, answer = text.turns[0]
        if not sample.images:
            for found, value in ((self.prompts, prompt), (self.answers, answer)):
                if len(found) < 2:
                    found.add(value)
        elif not prompt.strip():
            self._answered(content_digest(*map(name_digest, sample.images)), content_digest(answer), sample.id)

    def _answered(self, image: bytes, answer: bytes, name: str) -> None:
        if image in self.unasked:
            if self.unasked[image] != answer:
                self.ambiguous.setdefault(image, name)
        elif len(self.unasked) < KEPT:
            self.unasked[image] = answer

    def merge(self, other: Remarks) -> None:
        """Adds what ``other`` has counted."""
        for was, (number, example) in other.taken.items():
            self._count(was, number, example)
        self.listed = self.listed[0] + other.listed[0], self.listed[1] or other.listed[1]
        self.unused = self.unused[0] + other.unused[0], self.unused[1] or other.unused[1]
        for image, answer in other.unasked.items():
            self._answered(image, answer, other.ambiguous.get(image, "one of them"))
        self.ambiguous = other.ambiguous | self.ambiguous
        self.prompts |= other.prompts
        self.answers |= other.answers

    def lines(self) -> list[str]:
        """In words."""
        found = []
        for was, (number, example) in self.taken.items():
            made = "taken as no prompt" if was == "null" else f"taken as text, the first as {show(example)}"
            found.append(f"{number:,} values are {was}: {made}")
        if self.listed[0]:
            found.append(
                f"{self.listed[0]:,} answers are lists: the first entry is trained, as {show(self.listed[1])}, and in exact match any entry is right"
            )
        if self.unused[0]:
            found.append(
                f"{self.unused[0]:,} turns of conversations are left out, an answer before the first question or a question without an answer:"
                f" the first is {show(self.unused[1])}"
            )
        if self.ambiguous:
            name = next(iter(self.ambiguous.values()))
            found.append(
                f"{len(self.ambiguous):,} images have several answers without a prompt, as {show(name)} has: fine for captions;"
                " questions would have to be in a key that is read (data.prompt_column)"
            )
        if len(self.prompts) == 1 and len(self.answers) > 1:
            prompt = next(iter(self.prompts))
            found.append(f"samples without an image all have the prompt {show(prompt)} and different answers: nothing can tell them apart")
        return found


def merged(parts: Sequence[Remarks]) -> Remarks:
    """All of ``parts`` together."""
    whole = Remarks()
    for part in parts:
        whole.merge(part)
    return whole
