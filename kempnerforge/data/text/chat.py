"""``data.template = "chat"``: the tokenizer's own chat template, taken apart.

The template is rendered (in a separate process, within limits) with a marker in place of each message.
Between the markers lies what the template itself writes; a message never passes through it, so nothing in a
message can be taken for the template's writing. The rendering is split at the markers, and the same split
serves all conversations of as many turns.

An answer is trained after what it is asked with. Where a template writes earlier answers in another way than
the last (Qwen3 puts an empty think block in front of the last), one row cannot hold that for all turns, and
each is trained in a separate row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from kempnerforge.config import registry
from kempnerforge.config.data import DataConfig
from kempnerforge.data.sample import Text
from kempnerforge.data.text.rendering import TemplateError, TemplateLimitError, render
from kempnerforge.data.text.template import EOS_PIECE, Piece, Template
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.util.errors import InputError

PROBED = 3
"""Turns of the conversations that tell whether a template writes all answers alike; longer ones are compared
when they come.
"""
LITERAL = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"")
PAD = "\u2003"
"""White space around a marker: a template that trims messages takes it away."""
MARKER = re.compile(f"({PAD}?)\ue000([0-9]+)\ue001({PAD}?)")
DATE = "26 Jul 2024"
"""For templates that write the date (Llama 3 and later, whose default it is): today's would change the data
from day to day.
"""


class Slot(NamedTuple):
    """The place of a message in a rendered conversation.

    Attributes:
        field: "system", "prompt" or "answer".
        trims: whether the template removes white space in front, after.
    """

    field: str
    turn: int
    trims: tuple[bool, bool]

    def fill(self, message: str) -> str:
        """``message`` as the template writes it."""
        message = message.lstrip() if self.trims[0] else message
        return message.rstrip() if self.trims[1] else message


class ChatTemplate(Template):
    """The chat template of a tokenizer.

    What is trained: each answer, what the template writes in front of it beyond its own generation prompt if
    that is white space alone, and the end of turn after it: the special token that follows the last answer,
    with nothing but white space between. A template that writes none is given EOS, after the last answer.

    Args:
        cfg: a template that does not take its system prompt is refused at once.

    Attributes:
        listed: the template takes a message as a list of parts.
        extra: what is before an answer beyond what the template writes when it asks for one; neither is
            trained.

    Raises:
        ValueError: there is no chat template, or it is one that cannot be used.
    """

    bos = False  # the template writes it where it belongs
    specials = True

    def __init__(self, cfg: DataConfig, tokenizer: Tokenizer | None) -> None:
        super().__init__(cfg, tokenizer)
        system = cfg.system
        assert tokenizer is not None, "what it writes is known with a tokenizer alone"
        if tokenizer.chat_template is None:
            raise InputError("data.template = 'chat': the tokenizer has no chat template; data.template = 'turns' lets you write one")
        self._source = tokenizer.chat_template
        names = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
        self._tokens = {key: name for key, name in names.items() if name is not None}
        specials = sorted(tokenizer.special_names.values(), key=len, reverse=True)
        self._end = re.compile(rf"(\s*)({'|'.join(map(re.escape, specials))})") if specials else None
        self._skeletons: dict[tuple[int, bool], list[Piece | Slot]] = {}
        if "strftime_now" in self._source and "date_string" not in self._source:
            raise InputError(f"{self._blame}: it writes today's date, so the data would change from day to day")
        self.listed = False
        try:
            self._opening = self._find_opening()
        except TemplateLimitError:
            raise
        except ValueError as error:
            self.listed = True  # templates of vision-language models take a message as a list of parts
            try:
                self._opening = self._find_opening()
            except ValueError:
                raise error from None
        self._literals = _literals(self._source)
        self.by_turn = self._differs(PROBED)
        skeleton = self._skeleton(1, bool(system))
        last = next(k for k, part in enumerate(skeleton) if isinstance(part, Slot) and part.field == "answer")
        self.end = next((part.text.strip() for part in skeleton[last + 1 :] if isinstance(part, Piece) and part.trained), "")
        self.own = "\0".join(part.text for part in skeleton if isinstance(part, Piece))
        asked = "".join(self._asked(_fields(1, bool(system))[:-1])[0])
        before = "".join(part.text for part in skeleton[:last] if isinstance(part, Piece) and not part.trained)
        self.extra = before.removeprefix(asked) if before.startswith(asked) else ""

    @classmethod
    def stretches(cls, cfg: DataConfig, text: Text) -> Iterator[str]:
        """The words alone: what is around them is known with a tokenizer."""
        yield from filter(None, (text.system or cfg.system, *text.strings))

    @property
    def _blame(self) -> str:
        return f"data.template = 'chat': the tokenizer's chat template ({' '.join(self._source.split())[:60]!r}...) cannot be used"

    def pieces(self, text: Any, system: str) -> list[Piece]:
        messages = {("system", 0): system}
        for turn, (prompt, answer) in enumerate(text.turns):
            messages |= {("prompt", turn): prompt, ("answer", turn): answer}
        last, found = len(text.turns) - 1, []
        for part in self._skeleton(last + 1, bool(system)):
            if isinstance(part, Piece):
                found.append(part)
                continue
            trained = part.field == "answer" and (part.turn == last or not self.by_turn)
            found.append(Piece(self._written(part, messages, last + 1, trained), trained, part.field))
        return found

    def _written(self, slot: Slot, messages: dict[tuple[str, int], str], turns: int, trained: bool) -> str:
        """A message as the template writes it. One that holds words of the template may be taken apart by it
        ("</think>"): it is rendered.

        Raises:
            ValueError: the template changes what is around it, or an answer that is trained.
        """
        plain = slot.fill(message := messages[slot.field, slot.turn])
        word = next((word for word in self._literals if word in message), None)
        if word is None:
            return plain
        fields = _fields(turns, bool(messages["system", 0]))
        number = fields.index((slot.field, slot.turn))
        left, right = (PAD * (not trims) for trims in slot.trims)
        before, _, after = self._render(fields, generate=False).partition(f"{left}{_marker(number)}{right}")
        made = self._render(fields, generate=False, given={number: message})
        inside = made[len(before) : len(made) - len(after)]
        if made != before + inside + after or (trained and inside != plain):
            raise InputError(f"{self._blame} for an answer with {word!r} in it, which it takes apart")
        return inside

    def _skeleton(self, turns: int, system: bool) -> list[Piece | Slot]:
        key = turns, system
        if key not in self._skeletons:
            self._skeletons[key] = [*self._take_apart(turns, system)]
            if not self.by_turn and self._differs(turns, system):
                raise InputError(f"{self._blame}: of {turns} turns it writes earlier ones otherwise than it asks for them")
        if not self.by_turn:
            return self._skeletons[key]
        answer = max(k for k, part in enumerate(self._skeletons[key]) if isinstance(part, Slot) and part.field == "answer")
        whole = self._skeletons[key]
        opened = answer - 1 if answer and isinstance(before := whole[answer - 1], Piece) and before.trained else answer
        return [part._replace(trained=False) if isinstance(part, Piece) else part for part in whole[:opened]] + whole[opened:]

    def _differs(self, turns: int, system: bool = False) -> bool:
        """Whether some answer of a conversation of so many turns does not follow what it is asked with."""
        try:
            skeletons = [[*self._take_apart(count, system)] for count in range(1, turns + 1)]
        except TemplateLimitError:
            raise
        except ValueError:
            return turns > 1 and self._differs(turns - 1, system)
        return any(_before(skeletons[-1], k) != _before(skeletons[k], k) for k in range(turns - 1))

    def _take_apart(self, turns: int, system: bool) -> Iterator[Piece | Slot]:
        fields = _fields(turns, system)
        own, slots = self._split(self._render(fields, generate=False), fields)
        answers = [k for k, slot in enumerate(slots) if slot.field == "answer"]
        end = self._end_of(own[-1]) if answers and answers[-1] == len(slots) - 1 else ""
        asked, before = self._asked(fields[:-1])
        alike = (own[:-2], slots[:-1]) == (asked[:-1], before) and own[-2].startswith(asked[-1])
        if end and not alike and self._render(fields[:-1], generate=True) != self._render(fields[:-1], generate=False):
            own, slots = [*asked, own[-1]], [*before, slots[-1]]  # it asks in another way than it writes a given answer
        for k, written in enumerate(own):
            if k and slots[k - 1].field == "answer":
                ended = self._end_of(written)
                if end and ended.strip() == end.strip():
                    yield Piece(ended, True)
                    written = written[len(ended) :]
                elif k == len(slots):
                    yield EOS_PIECE
            opening = self._opening if k in answers and written.endswith(self._opening) else ""
            yield Piece(written.removesuffix(opening), False)
            if opening:
                yield Piece(opening, True)
            if k < len(slots):
                yield slots[k]

    def _asked(self, fields: list[tuple[str, int]]) -> tuple[list[str], list[Slot]]:
        """The template's own writing and the messages, up to the answer that it asks for."""
        return self._split(self._render(fields, generate=True), fields)

    def _end_of(self, written: str) -> str:
        """The special token that ``written`` begins with, and white space in front of it; or nothing."""
        found = self._end.match(written) if self._end else None
        return found[0] if found else ""

    def _find_opening(self) -> str:
        """White space that the template writes in front of an answer, but not when it asks for one."""
        fields = [("prompt", 0), ("answer", 0)]
        (_, before, *_), _ = self._split(self._render(fields, generate=False), fields)
        (_, asked), _ = self._split(self._render(fields[:1], generate=True), fields[:1])
        opening = before.removeprefix(asked) if before.startswith(asked) else ""
        return opening if opening.isspace() else ""

    def _split(self, rendered: str, fields: list[tuple[str, int]]) -> tuple[list[str], list[Slot]]:
        """What the template writes itself, and the messages between."""
        parts = MARKER.split(rendered)
        numbers = [int(number) for number in parts[2::4]]
        slots = [
            Slot(*fields[number], (not left, not right)) if number < len(fields) else None
            for left, number, right in zip(parts[1::4], numbers, parts[3::4], strict=True)
        ]
        for number, (field, _) in enumerate(fields):
            if numbers.count(number) != 1:
                what = {"system": "the system prompt", "prompt": "what the user says", "answer": "an answer"}[field]
                raise InputError(f"{self._blame}: it writes {what} {numbers.count(number)} times, or alters it")
        order = [slot.turn for slot in slots if slot is not None and slot.field == "answer"]
        if order != sorted(order) or "\ue000" in "".join(parts[0::4]):
            raise InputError(f"{self._blame}: it alters messages or their order")
        return parts[0::4], [slot for slot in slots if slot is not None]

    def _render(self, fields: list[tuple[str, int]], generate: bool, given: Mapping[int, str] | None = None) -> str:
        """The conversation with a marker for each message, but for those that are ``given``, by number."""
        roles = {"system": "system", "prompt": "user", "answer": "assistant"}
        contents: list[Any] = [(given or {}).get(k, f"{PAD}{_marker(k)}{PAD}") for k in range(len(fields))]
        if self.listed:
            contents = [[{"type": "text", "text": content}] for content in contents]
        messages = [{"role": roles[field], "content": content} for (field, _), content in zip(fields, contents, strict=True)]
        try:
            return render(self._source, messages, generate, date_string=DATE, **self._tokens)
        except (TemplateError, TemplateLimitError) as error:
            with_system = " with a system prompt" if fields[0][0] == "system" else ""
            raise type(error)(f"{self._blame}{with_system}: {error}") from None


def _fields(turns: int, system: bool) -> list[tuple[str, int]]:
    """The messages of a conversation: what each is, and of which turn."""
    return [("system", 0)] * system + [(field, turn) for turn in range(turns) for field in ("prompt", "answer")]


def _marker(number: int) -> str:
    return f"\ue000{number}\ue001"


def _before(skeleton: list[Piece | Slot], turn: int) -> list[str | Slot]:
    """All before the answer of ``turn``, neighbours joined."""
    found: list[str | Slot] = [""]
    for part in skeleton:
        if isinstance(part, Slot):
            if (part.field, part.turn) == ("answer", turn):
                break
            found += [part, ""]
        else:
            found[-1] = str(found[-1]) + part.text
    return found


def _literals(source: str) -> list[str]:
    """The strings that a template knows, but for white space and names of roles."""
    found = {(one or other).replace("\\n", "\n").strip() for one, other in LITERAL.findall(source)}
    return sorted(word for word in found if len(word) > 2 and not word.isalnum())


registry.register_template("chat")(ChatTemplate)  # not as a decorator: type checkers lose the class by it
