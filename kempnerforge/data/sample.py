"""A sample: images and texts about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from kempnerforge.util.errors import InputError, cut
from kempnerforge.util.plugin_returns import gives

ImageSource = Path | bytes
"""A file, or its encoded content (PNG, JPEG, ...)."""
MAX_REASON = 600
"""Characters of a reason at most: it may quote names and values of any length."""


class SampleError(InputError):
    """This sample cannot be used, and why. It is skipped and counted; the run goes on."""

    def __init__(self, reason: str) -> None:
        super().__init__(cut(reason, MAX_REASON))


class ConvertedText(str):
    """A text made of a value that is no string; ``was`` names its type: "a number"."""

    was: str

    def __new__(cls, text: str, was: str = "") -> ConvertedText:
        made = super().__new__(cls, text)
        made.was = was
        return made


@dataclass(frozen=True)
class Text:
    """A text about a sample's images: a question and its answer, a caption (no prompt), or a conversation.

    Attributes:
        prompt: what the model reads, before the template.
        answer: what it is trained to write, before the template. A tuple holds token ids: a window of running
            text, all of it trained, to which no template, BOS or EOS is added.
        more: the turns that follow, (prompt, answer) each. All answers are trained.
        system: the system prompt; empty takes ``data.system``.
        leading: None: ``data.image_placeholder`` in prompts and answers marks the places of images. A number:
            so many images are at the head of the first prompt, and the name of the placeholder is text like
            any other.
        kind: what is asked, for scores: evaluation reports each kind alone.
        blind: turns, from the first, that are written without their images.
        references: further answers that are right, as often as they were given; they are not trained.
        listed: whether the answer was the first of a list.
        unused: turns of the row that are in no pair of a question and its answer, so that they are left out.
    """

    prompt: str
    answer: str | tuple[int, ...]
    more: tuple[tuple[str, str], ...] = ()
    system: str = ""
    leading: int | None = None
    kind: str = ""
    blind: int = field(default=0, repr=False)
    references: tuple[str, ...] = field(default=(), repr=False, compare=False)
    listed: bool = field(default=False, repr=False, compare=False)
    unused: tuple[str, ...] = field(default=(), repr=False, compare=False)

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """(prompt, answer) of all turns; a window has none."""
        return () if isinstance(self.answer, tuple) else ((self.prompt, self.answer), *self.more)

    @property
    def strings(self) -> Iterator[str]:
        """Prompts and answers of all turns, in order."""
        return chain.from_iterable(self.turns)


@dataclass(frozen=True)
class Sample:
    """``texts`` share ``images`` and do not see each other. ``id`` names the sample in messages; no images:
    text alone. ``part`` says which of ``DataConfig.sections()`` it is from, and so which templates it has.
    ``key`` is the id that its row has, if any. ``shows`` are the pictures that its answers write, for scores; no
    model reads them.
    """

    id: str
    images: tuple[ImageSource, ...]
    texts: tuple[Text, ...]
    part: int = 0
    key: str = ""
    shows: tuple[ImageSource, ...] = field(default=(), repr=False)


def text_size(texts: tuple[Text, ...]) -> int:
    """Characters (of strings) and tokens (of windows) in ``texts``."""
    return sum(sum(map(len, text.strings)) if text.turns else len(text.prompt) + len(text.answer) for text in texts)


# ---- what a plugin's source returns --------------------------------------------------------------


def not_a_sample(value: Any, *_: Any, **__: Any) -> str:
    """What is wrong with ``value`` as a sample; empty: nothing. Some microseconds for each."""
    if not isinstance(value, Sample):
        return gives(value, "a Sample")
    if not isinstance(value.id, str):
        return gives(value.id, "a string", "id")
    for name in ("images", "shows"):
        images = getattr(value, name)
        if not isinstance(images, tuple):
            return gives(images, "a tuple of images", name)
        for number, image in enumerate(images):
            if not isinstance(image, Path | bytes):
                return gives(image, "a Path, or the bytes of a file (PNG, JPEG, ...)", f"{name}[{number}]")
    return no_texts(value.texts)


def no_texts(value: Any, *_: Any, **__: Any) -> str:
    """What is wrong with ``value`` as the texts of a sample; empty: nothing."""
    if not isinstance(value, tuple):
        return gives(value, "a tuple of Text", "texts")
    for number, text in enumerate(value):
        if not isinstance(text, Text):
            return gives(text, "a Text", f"texts[{number}]")
        for name, right, allowed in (
            ("prompt", isinstance(text.prompt, str), "a string"),
            ("answer", _is_answer(text.answer), "a string, or a tuple of token ids"),
            ("more", isinstance(text.more, tuple) and all(map(_is_turn, text.more)), "a tuple of (prompt, answer), of strings"),
            ("system", isinstance(text.system, str), "a string"),
            ("leading", text.leading is None or isinstance(text.leading, int), "None, or a number of images"),
            ("kind", isinstance(text.kind, str), "a string"),
            (
                "references",
                isinstance(text.references, tuple) and all(isinstance(each, str) for each in text.references),
                "a tuple of strings",
            ),
        ):
            if not right:
                return gives(getattr(text, name), allowed, f"texts[{number}].{name}")
    return ""


def _is_answer(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, tuple) and all(isinstance(each, int) for each in value[:1]))


def _is_turn(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, str) for part in value)
