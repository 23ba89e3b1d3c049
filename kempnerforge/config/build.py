"""Tables -> dataclasses, strictly: unknown keys and wrong types are problems, nothing is cast but an integer
literal for a float.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable
from typing import Any

from kempnerforge.config import registry
from kempnerforge.config.adapter import AdapterConfig
from kempnerforge.config.checks import defaults, is_key
from kempnerforge.config.data import DataConfig
from kempnerforge.config.optimizer import OptimizerConfig
from kempnerforge.config.schedule import SchedulerConfig
from kempnerforge.config.training import HookConfig, TrackerConfig
from kempnerforge.config.vision import VisionEncoderConfig
from kempnerforge.config.vlm import VLMConfig
from kempnerforge.util.errors import InputError, Key, Problems, UnreadError, key_path, kind, show
from kempnerforge.util.paths import expand

INVALID: Any = type("Invalid", (), {"__repr__": lambda self: "INVALID"})()
"""Replaces a value that has a problem; the problem is already in the list."""


@dataclasses.dataclass(frozen=True)
class Discriminator:
    """A section whose class is selected by one of its keys, the discriminator.

    Attributes:
        by_name: the value of that key alone may be written instead of a table.
    """

    key: str
    class_for: Callable[[str], type]
    entries: registry.Registry
    by_name: bool = False


UNIONS: dict[type, Discriminator] = {
    VLMConfig: Discriminator("arch", VLMConfig.class_for, registry.vlm_configs),
    VisionEncoderConfig: Discriminator("type", registry.vision_configs.get, registry.vision_configs),
    AdapterConfig: Discriminator("type", registry.adapter_configs.get, registry.adapter_configs),
    OptimizerConfig: Discriminator("name", registry.optimizer_configs.get, registry.optimizer_configs),
    SchedulerConfig: Discriminator("name", registry.schedules.get, registry.schedules),
    TrackerConfig: Discriminator("type", registry.tracker_configs.get, registry.tracker_configs, by_name=True),
    HookConfig: Discriminator("type", registry.hook_configs.get, registry.hook_configs),
    DataConfig: Discriminator("source", registry.data_configs.get, registry.data_configs),
}

MAX_INT, MAX_FLOAT = 2**31 - 1, 1e12
"""Of the numbers in a config."""

SECTIONS: dict[str, Any] = {}
"""Every section of a job and its class; ``config/job.py`` fills it."""


class Argument:
    """A value from the command line: TOML, or, where a string is wanted or it is no TOML, its bare text.

    Args:
        text: as given.
        value: what ``text`` is as TOML, or ``text`` again.
    """

    def __init__(self, text: str, value: Any) -> None:
        self.text, self.value = text, value

    def resolve(self, wanted: Any) -> Any:
        return self.text if wanted is str and not isinstance(self.value, str) else self.value


@functools.cache
def fields_of(cls: type) -> dict[str, Any]:
    """The keys of a section: name -> type."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if is_key(f)}


def required(cls: type) -> list[str]:
    """The keys of a section that have no default."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.init and f.default is missing and f.default_factory is missing]


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint for an unknown name."""
    options = list(names)
    close = difflib.get_close_matches(name, options, n=1)
    return f"did you mean {close[0]!r}?" if close else f"allowed are {', '.join(options)}"


def _hint(cls: type, name: str, known: Collection[str], names: Iterable[str]) -> str:
    """What to write in place of the unknown key ``name``. A table inside a section is seldom seen, so all its
    keys are shown.
    """
    other = _of_another(cls, name, known)
    inner = not issubclass(cls, (*UNIONS, *SECTIONS.values())) and cls.__name__ != "JobConfig"
    return f"{other} Allowed here are {', '.join(names)}" if other and inner else other or nearest(name, names)


def _of_another(cls: type, name: str, known: Collection[str]) -> str:
    """A hint for a key ``name`` that ``cls`` does not have: other classes of the same section, or other
    sections, that have it; or nothing.
    """
    if name in known:
        return ""
    for base, union in UNIONS.items():
        if issubclass(cls, base):
            siblings = [other for other in union.entries.names() if name in fields_of(union.class_for(other))]
            if siblings:
                return f"a key of {union.key} = {', '.join(map(repr, siblings))}; here {union.key} = {getattr(cls, union.key)!r}"
    sections = [f"[{section}] {name}" for section, known in SECTIONS.items() if known is not cls and name in keys_of(known)]
    return f"did you mean {' or '.join(sections)}?" if sections else ""


def known_key(key: str) -> bool:
    """Whether a section, or a key of one, is called ``key`` ("optimizer", "optimizer.lr"); of arrays of
    tables and tables in a section the rest is not looked at.
    """
    section, *rest = re.split(r"[.\[]", key)
    if section not in SECTIONS:
        return section in ("stages", "lora", "hooks", "plugins")
    return not rest or rest[0] in keys_of(SECTIONS[section])


def keys_of(section: Any) -> set[str]:
    """The keys of a section, of whichever class."""
    union = UNIONS.get(section)
    classes = [section] if union is None else [union.class_for(name) for name in union.entries.names()]
    return {key for cls in classes if dataclasses.is_dataclass(cls) for key in fields_of(typing.cast(type, cls))}


def build_record(cls: type, name: str, table: Any, origin: str) -> Any:
    """An instance of ``cls`` from what was kept of one as JSON.

    Args:
        name, origin: what it is, and the file, for messages.

    Raises:
        InputError: a key is missing or unknown, or a value is of another type or out of its range.
    """
    made = build(cls, table, (name,), problems := Problems(origin))
    if made is INVALID:
        raise InputError("\n".join(problems.lines) or f"{origin}: cannot be understood")
    return made


def build(cls: type, table: Any, key: Key, problems: Problems) -> Any:
    """An instance of ``cls`` (for a union: of the subclass that ``table`` selects) from ``table``, or
    ``INVALID``.
    """
    union = UNIONS.get(cls)
    if union is not None and union.by_name and isinstance(table, str):
        table = {union.key: table}
    if not isinstance(table, dict):
        problems.add(key, f" = {show(table)}: must be a table, not {kind(table)}")
        return INVALID
    if union is None:
        return construct(cls, cls, convert_fields(cls, table, key, problems), table, key, problems)
    name = table.get(union.key, getattr(cls, union.key))
    name = convert(str, name, (*key, union.key), problems)
    if name is INVALID:
        return INVALID
    chosen = class_named(union, name, key, problems)
    if chosen is None:
        return INVALID
    values = convert_fields(chosen, table, key, problems) | {union.key: name}
    return construct(chosen, getattr(chosen, "in_job", chosen), values, table, key, problems)


def class_named(union: Discriminator, name: str, key: Key, problems: Problems) -> type | None:
    """The class that ``name`` selects, or None with a problem."""
    try:
        return union.class_for(name)
    except InputError as error:
        text = str(error)
        problems.add_message(key, text[text.find(f"{union.key} = ") :] if f"{union.key} = " in text else text)
        return None


def convert_fields(
    cls: type, table: dict[str, Any], key: Key, problems: Problems, allowed: Collection[str] | None = None
) -> dict[str, Any]:
    """The keys of ``table`` that ``cls`` knows (and ``allowed`` names), as the types of its fields;
    ``INVALID`` where there is a problem.
    """
    known = fields_of(cls)
    names = [name for name in known if allowed is None or name in allowed]
    values = {}
    for name, value in table.items():
        if name in names:
            values[name] = convert(known[name], value, (*key, name), problems)
        elif key:
            value = value.value if isinstance(value, Argument) else value
            problems.add((*key, name), f" = {show(value)}: unknown key; {_hint(cls, name, known, names)}")
        else:
            study = "this is a study: kempnerforge study plan FILE" if name == "study" else ""
            problems.add((name,), f": unknown section; {study or _hint(cls, name, known, names)}")
    return values


def construct(
    cls: type,
    make: Callable[..., Any],
    values: dict[str, Any],
    given: Collection[str],
    key: Key,
    problems: Problems,
    complete: bool = False,
) -> Any:
    """``make(**values)``, or ``INVALID``.

    A section's own check stops at the first bad value. To find the others it is tried again without that
    value; a later complaint counts only if every key that it mentions was given and is fine so far, since it
    could be an after-effect otherwise.

    Args:
        cls: the section's class, for its keys.
        make: the class, or what else makes an instance of it from keywords.
        values: of ``convert_fields``.
        given: the keys that the user wrote.
        complete: ``make`` has values for everything already, so that no key is required.
    """
    needed = [] if complete else required(cls)
    missing = [name for name in needed if name not in given]
    for name in missing:
        problems.add((*key, name), ": missing, it has no default")
    left_out = {name for name, value in values.items() if value is INVALID} | (set(given) - set(values))
    if missing or any(name in left_out for name in needed):
        return INVALID
    names = list(fields_of(cls))
    while True:
        try:
            made = make(**{name: value for name, value in values.items() if name not in left_out})
        except (ValueError, NotImplementedError) as error:
            if isinstance(error, UnreadError) and not complete and problems.is_recorded((*key, error.key)):
                values[error.key] = defaults(cls)[error.key]  # it was not chosen
                continue
            message = str(error)
            mentioned = [name for name in re.findall(r"\w+", message) if name in names]
            if left_out and not set(mentioned) <= set(values) - left_out:
                return INVALID
            problems.add_message(key, message)
            culprit = next((name for name in mentioned if name in values), None)
            if culprit is None or culprit in needed:
                return INVALID
            left_out.add(culprit)
        else:
            return INVALID if left_out else made


def convert(wanted: Any, value: Any, key: Key, problems: Problems) -> Any:
    """``value`` as the annotated type ``wanted``, or ``INVALID`` with a problem."""
    if typing.get_origin(wanted) is typing.Annotated:
        return _convert_path(typing.get_args(wanted)[0], value, key, problems)
    if isinstance(value, Argument):
        value = value.resolve(wanted)
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return without_arguments(value)
    if origin in (typing.Union, types.UnionType):
        return _convert_union([a for a in args if a is not types.NoneType], value, key, problems)
    if origin is typing.Literal:
        if any(type(value) is type(option) and value == option for option in args):
            return value
        problems.add(key, f" = {show(value)}: allowed are {', '.join(show(a) for a in args)}")
        return INVALID
    if origin in (list, tuple):
        return _convert_array(origin, args, value, key, problems)
    if origin is dict:
        return _convert_table(args[1], value, key, problems)
    if dataclasses.is_dataclass(wanted):
        return build(typing.cast(type, wanted), value, key, problems)
    return _convert_scalar(wanted, value, key, problems)


def _convert_path(wanted: Any, value: Any, key: Key, problems: Problems) -> Any:
    found = convert(wanted, value, key, problems)
    if found is INVALID:
        return INVALID
    try:
        return expand(found)
    except InputError as error:
        problems.add(key, f" = {show(found)}: {error}")
        return INVALID


def without_arguments(value: Any) -> Any:
    """``value`` without ``Argument`` inside, for tables that are read later."""
    if isinstance(value, Argument):
        return without_arguments(value.value)
    if isinstance(value, dict):
        return {name: without_arguments(v) for name, v in value.items()}
    return [without_arguments(v) for v in value] if isinstance(value, list) else value


def _convert_union(options: list[Any], value: Any, key: Key, problems: Problems) -> Any:
    if len(options) == 1:
        return convert(options[0], value, key, problems)
    for option in options:
        result = convert(option, value, key, trial := Problems())
        if not trial.lines:
            return result
    for option in options:
        if (typing.get_origin(option) or option) is type(value):  # of the right type: what is wrong is the value itself
            return convert(option, value, key, problems)
    problems.add(key, f" = {show(value)}: must be {' or '.join(type_name(option) for option in options)}, not {kind(value)}")
    return INVALID


def _convert_array(origin: type, args: tuple[Any, ...], value: Any, key: Key, problems: Problems) -> Any:
    if not isinstance(value, list):
        problems.add(key, f" = {show(value)}: must be an array, not {kind(value)}")
        return INVALID
    fixed = origin is tuple and args[-1] is not Ellipsis
    if fixed and len(value) != len(args):
        problems.add(key, f" = {show(value)}: must have {len(args)} entries, not {len(value)}")
        return INVALID
    wanted = args if fixed else (args[0],) * len(value)
    entries = [convert(w, v, (*key, i), problems) for i, (w, v) in enumerate(zip(wanted, value, strict=True))]
    return INVALID if any(entry is INVALID for entry in entries) else origin(entries)


def _convert_table(wanted: Any, value: Any, key: Key, problems: Problems) -> Any:
    if not isinstance(value, dict):
        problems.add(key, f" = {show(value)}: must be a table, not {kind(value)}")
        return INVALID
    entries = {name: convert(wanted, v, (*key, name), problems) for name, v in value.items()}
    return INVALID if any(entry is INVALID for entry in entries.values()) else entries


def _convert_scalar(wanted: Any, value: Any, key: Key, problems: Problems) -> Any:
    if wanted not in _SCALARS:
        raise TypeError(f"{key_path(key)}: a config field cannot have the type {wanted!r}")
    if wanted is float and type(value) is int and abs(value) <= 2**53:
        value = float(value)
    why = _objection(wanted, value) or (_too_large(value, key) if key[:1] and known_key(str(key[0])) else "")
    if why:
        problems.add(key, f" = {show(value)}: {why}")
    return INVALID if why else value


def _too_large(value: Any, key: Key) -> str:
    """Why no setting has this size, or nothing. So no library has to handle such a value."""
    if isinstance(value, int) and not isinstance(value, bool) and key[-1] != "seed" and abs(value) > MAX_INT:
        return f"must be at most {MAX_INT:,}"
    return f"must be at most {MAX_FLOAT:g}" if isinstance(value, float) and abs(value) > MAX_FLOAT else ""


def _objection(wanted: type, value: Any) -> str:
    """Why ``value`` is no ``wanted``, or nothing."""
    if type(value) is not wanted:
        return f"must be {type_name(wanted)}, not {kind(value)}"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "must fit into 64 bits"
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
        return "must be UTF-8 text without NUL"
    return ""


_SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def type_name(wanted: Any) -> str:
    """What a value of type ``wanted`` is in TOML."""
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_name(option) for option in typing.get_args(wanted) if option is not type(None)))
    if typing.get_origin(wanted) is typing.Literal:
        return " or ".join(show(option) for option in typing.get_args(wanted))
    if typing.get_origin(wanted) in (list, tuple):
        return "an array"
    if typing.get_origin(wanted) is typing.Annotated:
        return "a path"
    return _SCALARS.get(wanted, "a table")
