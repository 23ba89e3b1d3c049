"""From files and arguments to one merged table: reading TOML, ``extends``, and ``--section.key=value``."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import tomli

from kempnerforge.config.build import Argument, Discriminator, fields_of
from kempnerforge.config.checks import defaults, is_key, not_default
from kempnerforge.util.errors import ConfigError, InputError, Key, Problems, show
from kempnerforge.util.paths import expand, start_of
from kempnerforge.util.reading import MAX_BYTES, deeper_than, irregular

COMMAND_LINE = "command line"
MAX_DEPTH = 32
OF_A_RUN = ("checkpoints", "manifest.json", "complete.json", "model.safetensors", "model.safetensors.index.json")
"""What is beside the config of a run, a checkpoint or an export."""
RECORD = "# A resolved job: every key is here, also those that no one has set.\n"
"""The first line of what ``to_toml`` writes. A key in such a file is no choice: what is laid over it may
leave it unread, and it goes back to its default then.
"""


@dataclass(frozen=True)
class Layer:
    """One TOML file, without its ``extends``; ``record``: it begins as a resolved job."""

    path: Path
    table: dict[str, Any]
    record: bool = False

    @property
    def is_record(self) -> bool:
        """Whether it is the config of something that was trained, and not one that is written to train with."""
        return self.record or (self.path.name == "config.toml" and any((self.path.parent / name).exists() for name in OF_A_RUN))


def read_toml(path: Path) -> dict[str, Any]:
    """The table in the file ``path``.

    Raises:
        ConfigError: it cannot be read or is no TOML, in one line with file and line number.
    """
    if what := irregular(path):
        raise ConfigError([f"{path}: cannot be read: is {what}"])
    try:
        raw = path.read_bytes() if (size := path.stat().st_size) <= MAX_BYTES else None
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file{start_of(path)}"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror or error}"]) from None
    except ValueError as error:
        raise ConfigError([f"{show(str(path))}: cannot be read: {error}"]) from None
    if raw is None:
        raise ConfigError([f"{path}: has {size:,} bytes; at most {MAX_BYTES:,} are read"])
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError([f"{path}: line 1: starts with a byte order mark; save it as UTF-8 without one"])
    if b"\0" in raw:
        raise ConfigError([f"{path}: line {_line(raw, raw.index(0))}: contains a NUL byte; a config is UTF-8 text"])
    try:
        table = tomli.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise ConfigError([f"{path}: line {_line(raw, error.start)}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8"]) from None
    except RecursionError:
        table = None
    except ValueError as error:
        raise ConfigError([f"{path}: {_syntax_error(str(error))}"]) from None
    if table is None or deeper_than(table, MAX_DEPTH):
        raise ConfigError([f"{path}: is nested more than {MAX_DEPTH} levels deep"])
    return table


def _line(raw: bytes, position: int) -> int:
    return raw.count(b"\n", 0, position) + 1


def _syntax_error(message: str) -> str:
    """tomli's message with the line first, and in other words where a key or table is given twice."""
    found = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|(end of document))\)", message, re.DOTALL)
    text, where = (message, "") if found is None else (found[1], f"line {found[2]}, column {found[3]}: " if found[2] else "at the end: ")
    if text.startswith(("Cannot overwrite a value", "Cannot declare", "Duplicate", "Cannot mutate immutable namespace")):
        text = f"a key or table is given twice ({text})"
    return f"{where}not valid TOML: {text}"


def read_layers(path: Path) -> list[Layer]:
    """``path`` and the files that it extends, the most basic one first.

    Raises:
        ConfigError: one of them cannot be read, ``extends`` is no string, or the files extend each other in a
            circle.
    """
    layers: list[Layer] = []
    seen: list[Path] = []
    while True:
        try:
            table = read_toml(path)
        except ConfigError as error:
            raise ConfigError([f"{line} (extended by {layers[-1].path})" if layers else line for line in error.problems]) from None
        if path.resolve() in seen:
            raise ConfigError([f"{layers[-1].path}: extends = {show(str(path))}: the files extend each other in a circle"])
        seen.append(path.resolve())
        parent = table.pop("extends", None)
        with path.open("rb") as file:
            layers.append(Layer(path, table, file.read(len(RECORD)) == RECORD.encode()))
        if parent is None:
            return layers[::-1]
        if not isinstance(parent, str) or not parent:
            raise ConfigError([f"{path}: extends = {show(parent)}: must be the name of one TOML file, relative to this one"])
        try:
            path = path.parent / expand(parent)
        except InputError as error:
            raise ConfigError([f"{path}: extends = {show(parent)}: {error}"]) from None


def merge_layers(layers: Sequence[Layer], unions: Mapping[str, Discriminator]) -> tuple[dict[str, Any], dict[Key, str]]:
    """All layers as one table, and the file that each key comes from. Tables merge deeply, all else replaces.

    Args:
        layers: the most basic one first.
        unions: sections whose class depends on a key. When a layer changes it, keys of the layers below that
            the new class lacks are dropped, and of a record those that are at the default of the old one.
    """
    merged: dict[str, Any] = {}
    origins: dict[Key, str] = {}
    records = {str(layer.path) for layer in layers if layer.record}
    for layer in layers:
        for section, union in unions.items():
            below, above = merged.get(section), layer.table.get(section)
            if isinstance(below, dict) and isinstance(above, dict) and isinstance(name := above.get(union.key), str):
                recorded = {key for key in below if origins.get((section, key)) in records}
                _switch(below, name, union, recorded, below.keys())
        _overlay(merged, layer.table, str(layer.path), origins, ())
    return merged, origins


def switch_recorded(table: dict[str, Any], key: Key, argument: Argument, unions: Mapping[str, Discriminator], problems: Problems) -> None:
    """Before ``argument`` is assigned to ``key``, where that selects another class: what a record says of the
    old one goes.
    """
    union = unions.get(str(key[0]))
    if union is None or len(key) < 2 or key[-1] != union.key:
        return
    below: Any = table
    for part in key[:-1]:
        entries = enumerate(below) if isinstance(below, list) else below.items() if isinstance(below, dict) else ()
        below = {str(name): entry for name, entry in entries}.get(str(part))
    if isinstance(below, dict):
        path = tuple(int(part) if str(part).isdecimal() else part for part in key[:-1])
        recorded = {name for name in below if problems.is_recorded((*path, name))}
        _switch(below, argument.resolve(str), union, recorded, recorded)


def _switch(below: dict[str, Any], name: str, union: Discriminator, recorded: Collection[str], droppable: Collection[str]) -> None:
    """Takes out of ``below`` what does not outlast the class called ``name``: of ``droppable`` the keys that
    it lacks, of ``recorded`` those that are at the default of the class before.
    """
    if name == (old := below.get(union.key)):
        return
    try:
        known = fields_of(union.class_for(name))
        before = defaults(union.class_for(old)) if isinstance(old, str) and recorded else {}
    except InputError:
        return  # an unknown name is reported when the section is built
    left = {key for key in recorded if key in before and as_toml(before[key]) == below[key]}
    for key in [key for key in below if key in left or (key in droppable and key not in known)]:
        del below[key]


def as_toml(value: Any, complete: bool = True) -> Any:
    """A section or a value of one as it is in a file: tables, arrays and scalars. None has no TOML and is
    left out.

    Args:
        complete: False leaves out what is at the default of its class, too.
    """
    if is_dataclass(value) and not isinstance(value, type):
        shown = value.__dict__ if complete else not_default(value)
        value = {f.name: shown[f.name] for f in fields(value) if is_key(f) and f.name in shown}
    if isinstance(value, dict):
        return {name: as_toml(entry, complete) for name, entry in value.items() if entry is not None}
    return [as_toml(entry, complete) for entry in value] if isinstance(value, list | tuple) else value


def _overlay(below: dict[str, Any], above: dict[str, Any], origin: str, origins: dict[Key, str], key: Key) -> None:
    for name, value in above.items():
        here = (*key, name)
        if not isinstance(value, dict):
            below[name] = value
        else:
            if not isinstance(below.get(name), dict):
                below[name] = {}
            _overlay(below[name], value, origin, origins, here)
        origins[here] = origin


def parse_overrides(arguments: Sequence[str], problems: Problems) -> list[tuple[Key, Argument]]:
    """``--section.key=value`` or ``--section.key value``, in order. The key is a dotted TOML key, the value
    TOML or bare text.
    """
    found: list[tuple[Key, Argument]] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not name.strip():
            problems.add((), f"{show(argument)}: must look like --section.key=value")
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                problems.add((), f"--{name}: needs a value, as in --{name}=...")
                continue
            text = rest.pop(0)
        key = dotted(name)
        if key is None:
            problems.add((), f"--{name}: must look like --section.key=value")
            continue
        found.append((key, Argument(text, _toml_value(text))))
    return found


def dotted(name: str) -> Key | None:
    """The parts of a dotted TOML key; None: it is none."""
    try:
        table: Any = tomli.loads(f"{name} = 0")
    except ValueError:
        return None
    key: list[str] = []
    while isinstance(table, dict) and len(table) == 1:
        part, table = next(iter(table.items()))
        key.append(part)
    return tuple(key) if table == 0 else None


def _toml_value(text: str) -> Any:
    """``text`` as a TOML value, or itself where it is none."""
    try:
        table = tomli.loads(f"value = [{text}]")
    except (ValueError, RecursionError):
        return text
    return table["value"][0] if list(table) == ["value"] and len(table["value"]) == 1 else text


def assign(table: dict[str, Any], key: Key, value: Argument, problems: Problems) -> None:
    """``table[key] = value``, making tables on the way; where there is an array, a part of ``key`` is an
    index from 0.
    """
    here: Any = table
    parts: list[Any] = list(key)
    for depth, part in enumerate(parts):
        if isinstance(here, list):
            if not part.isdecimal() or int(part) >= len(here):
                array = ".".join(map(str, key[:depth]))
                problems.add((), f"--{'.'.join(map(str, key))}: {array} has {len(here)} entries, counted from 0; there is no {part!r}")
                return
            parts[depth] = part = int(part)
        if depth == len(key) - 1:
            here[part] = value
            break
        below = here[part] if isinstance(here, list) else here.get(part)
        below = below.value if isinstance(below, Argument) else below
        if not isinstance(below, dict | list):
            below = {}
            problems.origins[tuple(parts[: depth + 1])] = COMMAND_LINE
        here[part] = below
        here = below
    path: Key = tuple(parts)
    for known in [known for known in problems.origins if known[: len(path)] == path]:
        del problems.origins[known]
    problems.origins[path] = COMMAND_LINE
