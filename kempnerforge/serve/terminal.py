"""A conversation with a model in a terminal, or over a pipe: a line is a question or a command."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from kempnerforge.data.images.decode import opened
from kempnerforge.eval.codecs import Marks, decode
from kempnerforge.eval.draw import save_drawn
from kempnerforge.eval.generate import Sampling
from kempnerforge.serve.desk import Model
from kempnerforge.util.errors import InputError
from kempnerforge.util.paths import place_of

HELP = """\
/image PATH...   ask about these images, too
/images          list them
/ask [TEXT]      ask TEXT, or ask without a prompt, as for captions; needed for a question that begins with "/"
/draw PATH       write the first image with the boxes and points of the last answer
/reset           forget images and conversation
/quit            end (as does the end of the input)"""


class Chat:
    """Answers lines.

    Args:
        model: is asked.
        out: where answers go, a piece at a time.
        note: called with what is said about them.
        has_turns: the model reads earlier turns; otherwise each question is asked alone.
        max_new_tokens, sampling: of every answer.
    """

    def __init__(
        self,
        model: Model,
        out: TextIO,
        note: Callable[[str], object],
        *,
        has_turns: bool = False,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self._model, self._out, self._note = model, out, note
        self._has_turns, self._max_new_tokens, self._sampling = has_turns, max_new_tokens, sampling
        self._commands: dict[str, Callable[[str], object]] = {
            "/image": self._add,
            "/images": lambda rest: self._list(),
            "/ask": self._ask,
            "/draw": self._draw,
            "/reset": lambda rest: self._reset(),
            "/help": lambda rest: self._note(HELP),
        }
        self.images: list[Path] = []
        self.history: list[tuple[str, str]] = []
        self.last = ""

    def read(self, line: str) -> bool:
        """Does what ``line`` says; an empty one says nothing. False: it says that this is the end.

        Raises:
            ValueError: it cannot be done, and why. The next line can.
        """
        line = line.strip()
        name, _, rest = line.partition(" ")
        if name == "/quit":
            return False
        if not name.startswith("/"):
            if line:
                self._ask(line)
        elif name in self._commands:
            self._commands[name](rest.strip())
        else:
            raise InputError(f"{name}: no such command\n{HELP}")
        return True

    def add(self, images: Sequence[Path]) -> None:
        """Takes images into the conversation, all or none.

        Raises:
            ValueError: one cannot be used.
        """
        for image in images:
            with opened(image):
                pass
        self.images += images

    def _add(self, rest: str) -> None:
        try:
            paths = [place_of(word) for word in shlex.split(rest)]
        except ValueError as error:
            raise InputError(f"/image {rest}: {error}") from None
        if not paths:
            raise InputError("/image needs a path")
        self.add(paths)
        self._list()

    def _list(self) -> None:
        self._note("\n".join(f"image {k}: {path}" for k, path in enumerate(self.images, 1)) or "no images")

    def _reset(self) -> None:
        self.images, self.history, self.last = [], [], ""
        self._note("forgotten")

    def _ask(self, prompt: str) -> None:
        answer = self._model.ask(prompt, self.images, self._max_new_tokens, self._sampling, self.history)
        try:
            for piece in answer:
                self._out.write(piece)
                self._out.flush()
        finally:
            self.last = answer.text
            self._out.write("\n")
            self._out.flush()
        if self._has_turns:
            self.history.append((prompt, self.last))
        if marks := decode(self.last):
            self._note(f"{counted(marks)}{'; /draw PATH draws them' if self.images else ''}")

    def _draw(self, rest: str) -> None:
        marks = decode(self.last)
        if not rest or not self.images or not marks:
            raise InputError("/draw PATH needs a path, an image, and an answer with boxes or points in it")
        save_drawn(self.images[0], self.last, place_of(rest))
        self._note(f"{counted(marks)} drawn into {rest}")


def counted(marks: Marks) -> str:
    """Such as "1 box and 2 points"."""
    numbers = ((len(marks.boxes), "box", "boxes"), (len(marks.points), "point", "points"))
    return " and ".join(f"{count} {one if count == 1 else several}" for count, one, several in numbers if count)
