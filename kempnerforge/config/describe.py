"""Every section of a job and its keys as text, taken from the dataclasses and their docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Collection, Iterator
from dataclasses import is_dataclass
from itertools import chain
from typing import Any, get_args, get_origin

import tomli_w

from kempnerforge.config.build import SECTIONS, UNIONS, fields_of, type_name
from kempnerforge.config.checks import is_key
from kempnerforge.config.lora import LoRAConfig
from kempnerforge.config.stages import StageConfig
from kempnerforge.config.training import HookConfig
from kempnerforge.util.errors import InputError

TABLES = {"[[stages]]": StageConfig, "[[lora]]": LoRAConfig, "[[hooks]]": HookConfig}


def describe(section: str = "") -> str:
    """The keys of one section ("optimizer"), or of all, as Markdown: each with its type, its default and what
    it means.

    Raises:
        InputError: there is no such section.
    """
    known = {f"[{name}]": cls for name, cls in SECTIONS.items()} | TABLES
    names = [name for name in known if section in ("", name.strip("[]"))]
    if not names:
        raise InputError(f"section = {section!r}: there is none; the sections are {', '.join(name.strip('[]') for name in known)}")
    return "\n".join(line for name in names for line in _section(name, known[name])).rstrip() + "\n"


def _section(name: str, cls: type) -> Iterator[str]:
    union = UNIONS.get(cls)
    forms = {value: union.class_for(value) for value in union.entries.names()} if union is not None else {}
    forms = {value: form for value, form in forms.items() if form.__module__.startswith("kempnerforge.")}  # no plugins
    lines = [_keys(form) for form in forms.values()]
    shared = {key: line for key, line in (lines[0] if lines else {}).items() if all(each.get(key) == line for each in lines)}
    known = {**_keys(cls), **shared}
    yield from (f"## `{name}`", "", *_about(cls), "", *known.values(), "")
    yield from _tables(name, cls)
    for value, form in forms.items():
        further = [line for key, line in _keys(form).items() if key not in known]
        yield from (f'### `{name}` with `{union.key if union else ""} = "{value}"`', "", *_about(form), "", *further, "")
        yield from _tables(name, form, known)


def _tables(name: str, cls: type, known: Collection[str] = ()) -> Iterator[str]:
    """The tables inside a section: keys whose value is a table or a list of tables."""
    for key, wanted in fields_of(cls).items():
        types = (wanted, *get_args(wanted), *chain(*map(get_args, get_args(wanted))))
        inner = next((each for each in types if is_dataclass(each)), None)
        if key not in known and isinstance(inner, type) and inner not in UNIONS:
            path = f"{name.strip('[]')}.{key}"
            title = f"[[{path}]]" if any(get_origin(each) is list for each in types) else f"[{path}]"
            yield from (f"### `{title}`", "", *_about(inner), "", *_keys(inner).values(), "")
            yield from _tables(path, inner)


def _about(cls: type) -> list[str]:
    """The first paragraph of the docstring of ``cls``."""
    return [_plain(line) for line in inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].splitlines()]


def _keys(cls: type) -> dict[str, str]:
    """Key -> the line about it."""
    meanings, types = meanings_of(cls), fields_of(cls)
    known = (f for f in dataclasses.fields(cls) if is_key(f))
    return {f.name: f"* `{f.name}`{_default(f)} ({type_name(types[f.name])}): {_plain(meanings.get(f.name, ''))}" for f in known}


def _default(f: dataclasses.Field[Any]) -> str:
    value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    if value is dataclasses.MISSING or value is None or is_dataclass(value):
        return ""
    if isinstance(value, list):
        value = [dataclasses.asdict(each) if is_dataclass(each) and not isinstance(each, type) else each for each in value]
    written = tomli_w.dumps({"key": value}).partition(" = ")[2] if value != {} else "{}"
    return f" = `{' '.join(written.split()).replace('[ ', '[').replace(', ]', ']')}`"


def meanings_of(cls: type) -> dict[str, str]:
    """Key -> what the docstring of ``cls``, or of a class above it, says in its "Attributes"."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        block = inspect.cleandoc(each.__dict__.get("__doc__") or "").partition("Attributes:\n")[2].split("\n\n")[0]
        for names, meaning in re.findall(r"^    (\w[\w, ]*): (.*(?:\n {5,}.*)*)", block, flags=re.M):
            found |= dict.fromkeys(re.split(r",\s*", names), re.sub(r"\s+", " ", meaning))
    return found


def _plain(text: str) -> str:
    return text.replace("``", "`")
