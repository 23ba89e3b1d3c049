"""Rules over names of parameters: an alias, or an fnmatch pattern that is compared with full names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from kempnerforge.util.errors import InputError, show

Aliases = Mapping[str, Sequence[str]]
"""Alias -> patterns."""


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of ``patterns`` matches the whole of ``name``. Case counts."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def patterns_of(rule: str, aliases: Aliases) -> Sequence[str]:
    """The patterns of the alias ``rule``; a rule that is no alias is a pattern itself."""
    return aliases.get(rule, [rule])


def match_names(names: Sequence[str], rule: str, aliases: Aliases, key: str) -> list[str]:
    """The parameter names that ``rule`` matches.

    Args:
        key: of the config, for the message.

    Raises:
        InputError: no name matches; the message lists near names.
    """
    patterns = patterns_of(rule, aliases)
    found = [name for name in names if matches_any(name, patterns)]
    if not found:
        raise no_match(names, rule, aliases, key)
    return found


def no_match(
    names: Iterable[str], rule: str, aliases: Aliases, key: str, kind: str = "parameter", example: str = "transformer.layers.0.*"
) -> InputError:
    """The error for a rule that matches none of ``names``.

    Args:
        kind: of thing that has the names.
        example: of a pattern.
    """
    meant = f" (the alias of {show(aliases[rule])})" if rule in aliases else ""
    near = near_names([*names, *(alias for alias in aliases if alias != rule)], patterns_of(rule, aliases))
    return InputError(
        f"{key} = {rule!r}{meant}: matches no {kind}; aliases: {', '.join(aliases) or 'none'}; near names: {near}"
        f' (a raw pattern matches full {kind} names, for example "{example}")'
    )


def near_names(names: Iterable[str], patterns: Iterable[str]) -> str:
    """The names, and beginnings of names, that are like one of ``patterns``, as a list for messages."""
    parts = (name.split(".") for name in names)
    known = sorted({".".join(words[:depth]) for words in parts for depth in range(1, len(words) + 1)})
    near = dict.fromkeys(name for pattern in patterns for name in difflib.get_close_matches(pattern, known, n=4, cutoff=0.4))
    return ", ".join([*near][:4]) or "none"
