"""The few checks that config sections share. Each raises ``ValueError`` naming key, value and what is
allowed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import Field, fields, is_dataclass
from typing import Any

from kempnerforge.util.errors import InputError, UnreadError

NO_KEY = {"key": False}
"""Metadata of a field that is no key of a config."""


def is_key(field: Field[Any]) -> bool:
    """Whether a field of a section can be set in a config."""
    return field.init and field.metadata.get("key", True)


def one_of(section: Any, key: str, allowed: Iterable[Any]) -> None:
    """``section.key`` is one of ``allowed``."""
    value, options = getattr(section, key), list(allowed)
    if value not in options:
        raise InputError(f"{key} = {value!r}: allowed are {', '.join(repr(o) for o in options)}")


def at_least(section: Any, low: float, *keys: str) -> None:
    """Each ``section.key`` is >= ``low``."""
    for key in keys:
        if not getattr(section, key) >= low:
            raise InputError(f"{key} = {getattr(section, key)!r}: must be >= {low}{', non-negative' if low == 0 else ''}")


def at_most(section: Any, high: float, *keys: str) -> None:
    """Each ``section.key`` is <= ``high``."""
    for key in keys:
        if not getattr(section, key) <= high:
            raise InputError(f"{key} = {getattr(section, key)!r}: must be <= {high}")


def more_than(section: Any, low: float, *keys: str) -> None:
    """Each ``section.key`` is > ``low``."""
    for key in keys:
        if not getattr(section, key) > low:
            raise InputError(f"{key} = {getattr(section, key)!r}: must be > {low}")


def fraction(section: Any, *keys: str) -> None:
    """Each ``section.key`` lies in [0, 1]."""
    for key in keys:
        if not 0 <= getattr(section, key) <= 1:
            raise InputError(f"{key} = {getattr(section, key)!r}: must be between 0 and 1")


def not_default(section: Any) -> dict[str, Any]:
    """The values of ``section`` that differ from its class's defaults, by key."""
    return {key: value for key, default in defaults(type(section)).items() if (value := getattr(section, key)) != default}


def defaults(cls: type) -> dict[str, Any]:
    """The default of each key of a section, ``MISSING`` where it has none."""
    return {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(cls)}


def only_if(section: Any, read: object, reader: str, *keys: str) -> None:
    """Each ``section.key`` is ``read``, or left at its default.

    Args:
        reader: what reads it: "form = 'text'".
    """
    for key in keys if not read else ():
        if key in (found := not_default(section)):
            shown = "" if is_dataclass(found[key]) else f" = {found[key]!r}"
            raise UnreadError(key, f"{key}{shown}: only {reader} reads it")


def divides(section: Any, part: str, whole: str) -> None:
    """``section.part`` divides ``section.whole``."""
    p, w = getattr(section, part), getattr(section, whole)
    if w % p:
        raise InputError(f"{part} = {p}: must divide {whole} = {w}")
