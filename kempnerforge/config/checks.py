"""The few checks that config sections share. Each raises ``ValueError`` naming key, value and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def one_of(section: Any, key: str, allowed: Iterable[Any]) -> None:
    """``section.key`` is one of ``allowed``."""
    value, options = getattr(section, key), list(allowed)
    if value not in options:
        raise ValueError(f"{key} = {value!r}: allowed are {', '.join(repr(o) for o in options)}")


def at_least(section: Any, low: float, *keys: str) -> None:
    """Each ``section.key`` is >= ``low``."""
    for key in keys:
        if not getattr(section, key) >= low:
            raise ValueError(f"{key} = {getattr(section, key)!r}: must be >= {low}")


def more_than(section: Any, low: float, *keys: str) -> None:
    """Each ``section.key`` is > ``low``."""
    for key in keys:
        if not getattr(section, key) > low:
            raise ValueError(f"{key} = {getattr(section, key)!r}: must be > {low}")


def fraction(section: Any, *keys: str) -> None:
    """Each ``section.key`` lies in [0, 1]."""
    for key in keys:
        if not 0 <= getattr(section, key) <= 1:
            raise ValueError(f"{key} = {getattr(section, key)!r}: must be between 0 and 1")


def divides(section: Any, part: str, whole: str) -> None:
    """``section.part`` divides ``section.whole``."""
    p, w = getattr(section, part), getattr(section, whole)
    if w % p:
        raise ValueError(f"{part} = {p}: must divide {whole} = {w}")
