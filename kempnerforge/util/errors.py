"""What is wrong with a config, collected so that all of it is reported at once."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Key = tuple[str | int, ...]
"""The place of a value in a config: ``("model", "dim")``, ``("stages", 0, "steps")``."""


MOST_QUOTED = 300
QUOTED = re.compile(
    rf"""(?<!\w)'(?:[^'\\\n]|\\.){{{MOST_QUOTED},}}'|(?<!\w)"(?:[^"\\\n]|\\.){{{MOST_QUOTED},}}"|\S{{{MOST_QUOTED + 1},}}"""
)
"""A quoted string, or a word, that is longer."""


class InputError(ValueError):
    """What the user gave cannot be used: config, data, arguments, files from elsewhere. Commands print it and
    end with exit code 2.

    NOTE: only this package's own checks raise it. A plain ``ValueError`` of a library, a plugin or our own
    code is a defect and keeps its traceback; where a library rejects the user's input, the call is wrapped
    and raises this.

    What it quotes is cut: of a value, no more than ``MOST_QUOTED`` characters are shown.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(QUOTED.sub(lambda found: cut(found[0], MOST_QUOTED), message))


class PluginError(Exception):
    """A method of a plugin's class returns what its base class does not allow. Commands print it and end with
    exit code 2.

    NOTE: no ``InputError``: what leaves out a sample or a question that cannot be used must not take this for
    one.
    """


class UnreadError(InputError):
    """A key that is set, and that nothing reads beside the other keys of its section.

    Args:
        key: its name in the section; the message begins with it.
    """

    def __init__(self, key: str, message: str) -> None:
        self.key = key
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.key, str(self))


class NotBuiltError(InputError, NotImplementedError):
    """A name or a config class is registered, but no implementation for it."""


@contextmanager
def library_call(where: str, what: str) -> Iterator[None]:
    """Wraps one call of a library that is given the user's files: any error in it becomes an ``InputError``.

    NOTE: nothing but that call belongs inside, as a defect of our code would be reported as the user's.

    Args:
        where: whose file or key it is.
        what: what cannot be done with it; the library's reason follows.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # a library has no one class for what it does not take
        raise InputError(f"{where}: {what}; {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What ``error`` says, as one line of limited length."""
    message = " ".join(str(error).split())
    if not isinstance(error, OSError | ImportError | RuntimeError) and type(error) is not ValueError:
        message = f"{type(error).__name__}: {message}"
    return message if len(message) <= 300 else f"{message[:200]} ... {message[-80:]}"


class ConfigError(InputError):
    """The config cannot be used. ``problems`` has one line for each thing that is wrong, with file, key,
    value and what is allowed.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


class Problems:
    """Collects lines for a ``ConfigError``.

    Args:
        origin: where values come from when nothing else is known of them: the file; empty for a config made
            by a program.
        origins: where single keys come from. The longest prefix of a key that is listed counts.
        records: the origins that are resolved jobs, where nothing tells what was chosen from what was a
            default.
    """

    def __init__(self, origin: str = "", origins: dict[Key, str] | None = None, records: Collection[str] = ()) -> None:
        self.origin, self.origins = origin, origins if origins is not None else {}
        self.records = records
        self.lines: list[str] = []

    def add(self, key: Key, text: str) -> None:
        """One more problem, with the value at ``key``; ``text`` goes on after the key: " = 3: must be even"."""
        self._add(self.origin_of(key), key_path(key) + text)

    def add_message(self, table: Key, message: str) -> None:
        """One more problem, with the table at ``table``; ``message`` may start with a key of it: "n_heads =
        3: ...".
        """
        found = re.match(r"(\w+)( =|:)", message)
        key = (*table, found[1]) if found else table
        glue = "" if not table else " " if len(table) <= (2 if is_stage(table) else 1) else "." if found else ": "
        self._add(self.origin_of(key), key_path(table) + glue + message)

    def _add(self, origin: str, text: str) -> None:
        line = f"{origin}: {text}" if origin else text
        if line not in self.lines:
            self.lines.append(line)

    def origin_of(self, key: Key) -> str:
        """The file that sets ``key``, or "command line"."""
        return next((self.origins[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self.origins), self.origin)

    def is_recorded(self, key: Key) -> bool:
        """Whether all values at ``key`` come from a resolved job."""
        inside = {origin for known, origin in self.origins.items() if known[: len(key)] == key}
        return {self.origin_of(key), *inside} <= set(self.records)

    def raise_if_any(self) -> None:
        if self.lines:
            raise ConfigError(self.lines)


def is_stage(key: Key) -> bool:
    return len(key) > 1 and key[0] == "stages" and isinstance(key[1], int)


def key_path(key: Key) -> str:
    """``key`` as people read it: ``[model] dim``, ``[vlm] freeze[0].module``, ``[[stages]] #1 optimizer.lr``."""
    if not key:
        return ""
    if is_stage(key):
        head, rest = f"[[stages]] #{int(key[1]) + 1}", key[2:]
    else:
        head, rest = str(key[0]) if key[0] in ("plugins", "stages") else f"[{key[0]}]", key[1:]
    tail = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest).removeprefix(".")
    return head + ("" if not tail or tail.startswith("[") else " ") + tail


def show(value: Any) -> str:
    """``value`` as TOML has it, cut where it is long."""
    if isinstance(value, dict):
        return "{...}" if value else "{}"
    if isinstance(value, str):
        return visible(json.dumps(cut(value, 76), ensure_ascii=False))
    if isinstance(value, list | tuple):
        return cut(f"[{', '.join(show(v) for v in value[:40])}]")
    return cut(json.dumps(value) if isinstance(value, bool) else str(value))


def cut(text: str, most: int = 80) -> str:
    """``text``, without its middle where it is longer than ``most`` characters."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-(most // 3 - 5) :]}"


def kind(value: Any) -> str:
    """The TOML type of ``value``, for messages."""
    if isinstance(value, bool):
        return "a boolean"
    names = {int: "an integer", float: "a float", str: "a string", list: "an array", dict: "a table"}
    if isinstance(value, datetime.date | datetime.time):
        return "a date or time"
    return next((name for cls, name in names.items() if isinstance(value, cls)), type(value).__name__)


def visible(text: str, keep: str = "") -> str:
    """Control characters as escapes, but for those in ``keep``: what is shown may quote data, which must not
    steer a terminal.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)
