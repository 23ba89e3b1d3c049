"""Which keys of a row are read, and what is said of the others: data keys are as strict as config keys.

A source says what it knows as a table of tables (``Keys``); a key that is not in it, on any level, is an
error that names the nearest one. ``data.ignore_columns`` has patterns of other keys that may be there; by its
own name it takes out a known one, too.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

from kempnerforge.util.errors import InputError, cut, show

PROMPTS = ("prompt", "question", "instruction", "input")
ANSWERS = ("answer", "answers", "response", "output", "caption", "text")
IMAGES = ("image", "images")
TEXTS = "texts"
"""The usual names, understood where the config names no other."""
ID = "id"
"""Names a sample in messages."""
METADATA = (
    *("url", "key", "status", "error_message", "width", "height", "original_width", "original_height", "exif", "sha256", "md5", "uid", ID),
    *("hash", "similarity", "punsafe", "pwatermark", "NSFW", "LICENSE"),
)
"""What img2dataset and the tables it is fed with (LAION's) write beside an image and its text."""
HINTS = {
    "conversations": "data.source = 'llava' reads conversations",
    "messages": "data.source = 'llava' reads conversations",
    "text_list": "data.source = 'interleaved' reads documents",
    "image_info": "data.source = 'interleaved' reads documents",
}
SHOWN, KEYS_KEPT = 4, 4096

Keys = Mapping[str, "Keys | None"]
"""Known keys; below None nothing is looked at. A list is known by its entries."""
NULL: Keys = {}
"""In the place of known keys: a key that may be there as null, as in exports that write every key of every
entry.
"""
PART: Keys = {
    **dict.fromkeys(("type", "text", "image", "path", "url", "index")),
    "image_url": {"url": None, "detail": None},
    **dict.fromkeys(("input_audio", "audio", "video", "file", "annotations", "cache_control"), NULL),
}
"""Of an entry of a content list, as OpenAI's API and chat templates have it."""
ANSWER: Keys = {**PART, "answer": None, "answer_id": None, "answer_confidence": None}
"""Of an entry of a list of answers, as VQAv2 and VizWiz have it, or of a content list."""


@dataclass
class Ignoring:
    """``data.ignore_columns``: patterns as of fnmatch, over the path of a key ("texts.note").

    Attributes:
        used: patterns that a key was found for.
    """

    patterns: tuple[str, ...] = ()
    used: set[str] = field(default_factory=set)
    _known: dict[str, bool] = field(default_factory=dict)

    def __call__(self, key: str) -> bool:
        """Whether an unknown ``key`` may be there."""
        if key not in self._known:
            found = [pattern for pattern in self.patterns if fnmatchcase(key, pattern)]
            self.used.update(found)
            if len(self._known) >= KEYS_KEPT:
                self._known.clear()
            self._known[key] = bool(found)
        return self._known[key]

    def takes_out(self, key: str) -> bool:
        """Whether a known ``key`` shall not be read."""
        return key in self.patterns


def unknown_keys(value: Any, known: Keys, ignored: Ignoring, above: str = "", schema: bool = False) -> Iterator[str]:
    """What is wrong with each key in ``value`` that is neither known nor ignored. A key without a value is
    one, too.

    Args:
        schema: ``value`` is no row, but shows all keys that rows may have.
    """
    if isinstance(value, list):
        for entry in value:
            yield from unknown_keys(entry, known, ignored, above, schema)
    if not isinstance(value, Mapping):
        return
    for key in value:
        name = f"{above}{key}"
        if key not in known or (known[key] is NULL and not schema and value[key] not in (None, [])):
            if not ignored(name):
                hint = "it may be there as null" if known.get(key) is NULL else _hint(str(key), known)
                yield f"key {show(name)} is read by nothing ({hint})"
            continue
        if ignored.takes_out(name):
            ignored.used.add(name)
            continue
        below = known[key]
        is_no_list = below is PART and isinstance(value[key], Mapping)  # an object in the place of a text: a bad value, not bad keys
        if below is not None and below is not NULL and not is_no_list:
            yield from unknown_keys(value[key], below, ignored, f"{name}.", schema)


def _hint(key: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return HINTS.get(key) or (
        f"nearest is {close[0]!r}"
        if close
        else f"known are {', '.join([*list(known)[:8], *(['...'] if len(known) > 8 else [])]) or 'none'}"
    )


def filled_keys(row: Mapping[str, Any], names: Sequence[str], ignored: Ignoring, above: str = "") -> list[str]:
    """The ``names`` for which ``row`` has a value, without ignored ones."""
    return [name for name in names if row.get(name) is not None and not ignored.takes_out(f"{above}{name}")]


def refuse(where: str, problems: Collection[str]) -> None:
    """Raises InputError if there are ``problems`` with the keys of ``where``; says what to do about them."""
    if problems:
        shown = list(problems)[:SHOWN]
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        advice = (
            ""
            if all("data.ignore_columns" in problem for problem in shown)
            else ". Name it in the config, or list it in data.ignore_columns"
        )
        raise InputError(f"{cut(where, 200)}: {'; '.join(shown)}{more}{advice}")


def refuse_unused(ignoring: Iterable[Ignoring]) -> None:
    """Raises InputError if ``data.ignore_columns`` has a pattern for which no key was seen, in any of the
    data that it holds for.
    """
    for patterns, group in groupby(sorted(ignoring, key=lambda one: one.patterns), key=lambda one: one.patterns):
        used = set().union(*(one.used for one in group))
        if unused := [pattern for pattern in patterns if pattern not in used]:
            raise InputError(f"data.ignore_columns: no key of the data is called {', '.join(map(show, unused))}; take it out, or mend it")
