"""Which keys of a row are read, and what is said of the others: data keys are as strict as config keys.

A source says what it knows as a table of tables (``Keys``); a key that is not in it, on any level, is an error that names the nearest one.
``data.ignore_columns`` has patterns of other keys that may be there; by its own name it takes out a known one, too.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from kempnerforge.config.errors import InputError, cut, show

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
SHOWN = 4

Keys = Mapping[str, "Keys | None"]
"""Known keys; below None nothing is looked at. A list is known by its entries."""
PART: Keys = {"type": None, "text": None, "image": None, "image_url": {"url": None, "detail": None}, "path": None, "url": None}
"""Of an entry of a content list, as OpenAI's API and chat templates have it."""


@dataclass(frozen=True)
class Ignoring:
    """``data.ignore_columns``: patterns as of fnmatch, over the path of a key ("texts.note")."""

    patterns: tuple[str, ...] = ()

    def __call__(self, key: str) -> bool:
        """Whether an unknown ``key`` may be there."""
        return bool(self.patterns) and _matches(key, self.patterns)

    def takes_out(self, key: str) -> bool:
        """Whether a known ``key`` shall not be read."""
        return key in self.patterns


@lru_cache(maxsize=4096)
def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def unread(value: Any, known: Keys, ignored: Ignoring, above: str = "") -> Iterator[str]:
    """What is wrong with each key in ``value`` that is neither known nor ignored. A key without a value is one, too."""
    if isinstance(value, list):
        for entry in value:
            yield from unread(entry, known, ignored, above)
    if not isinstance(value, Mapping):
        return
    for key in value:
        name = f"{above}{key}"
        if key in known:
            below = known[key]
            is_no_list = below is PART and isinstance(value[key], Mapping)  # an object in the place of a text: a bad value, not bad keys
            if below is not None and not is_no_list and not ignored.takes_out(name):
                yield from unread(value[key], below, ignored, f"{name}.")
        elif not ignored(name):
            yield f"key {show(name)} is read by nothing ({_hint(str(key), known)})"


def _hint(key: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return HINTS.get(key) or (
        f"nearest is {close[0]!r}"
        if close
        else f"known are {', '.join([*list(known)[:8], *(['...'] if len(known) > 8 else [])]) or 'none'}"
    )


def candidates(row: Mapping[str, Any], names: Sequence[str], ignored: Ignoring, above: str = "") -> list[str]:
    """Those of ``names`` that ``row`` has a value for."""
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
