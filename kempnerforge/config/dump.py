"""A job back to TOML, and what differs between two jobs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tomli_w

from kempnerforge.config.files import RECORD, as_toml
from kempnerforge.config.job import JobConfig


def to_dict(section: Any) -> dict[str, Any]:
    """A job or a section as plain tables, arrays and scalars, with defaults. None is left out."""
    table = as_toml(section)
    assert isinstance(table, dict), f"{type(section).__name__} is no section"
    return table


def to_toml(job: JobConfig | Mapping[str, Any]) -> str:
    """The resolved job; ``load_config`` reads an equal one from it, and no key in it counts as chosen."""
    return RECORD + re.sub(r"[^\n -~]", _escaped, tomli_w.dumps(to_dict(job)))


def _escaped(found: re.Match[str]) -> str:
    """A character of a string as TOML writes one that cannot be seen."""
    char = found[0]
    return char if char.isprintable() else f"\\u{ord(char):04x}" if ord(char) < 2**16 else f"\\U{ord(char):08x}"


@dataclass(frozen=True)
class FlatConfig:
    """A job as data, for many comparisons.

    Attributes:
        table: as in a file.
        leaves: its values by dotted key.
        chosen: the keys that are not at their default; all keys of what was read from a file.
    """

    table: dict[str, Any]
    leaves: dict[str, Any]
    chosen: frozenset[str]

    @classmethod
    def of(cls, config: JobConfig | Mapping[str, Any]) -> FlatConfig:
        table, changed = to_dict(config), as_toml(config, complete=False)
        return cls(table, _flat(table, ""), frozenset(_flat(changed, "")))


def diff(old: JobConfig | Mapping[str, Any], new: JobConfig | Mapping[str, Any] | FlatConfig) -> list[str]:
    """What changed: "train.batch_size: 32 -> 64", sorted by key; a key that one of them lacks is "unset".

    Args:
        old: a job, or the table of one, which may be older than some keys: those that ``new`` leaves at their
            defaults are no change.
    """
    before, after = FlatConfig.of(old).leaves, new if isinstance(new, FlatConfig) else FlatConfig.of(new)
    unknown_then = after.leaves.keys() - before.keys() - after.chosen if isinstance(old, Mapping) else set()
    lines = []
    for key in sorted((before.keys() | after.leaves.keys()) - unknown_then):
        a, b = (_show(flat, key) for flat in (before, after.leaves))
        if a != b:
            lines.append(f"{key}: {a} -> {b}")
    return lines


def _show(flat: dict[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "unset"


def _flat(value: Any, key: str) -> dict[str, Any]:
    """Leaves by dotted key. Arrays of tables count as tables, other arrays and empty tables as leaves."""
    if isinstance(value, dict) and value:
        parts = [(f"{key}.{name}" if key else name, entry) for name, entry in value.items()]
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        parts = [(f"{key}[{index}]", entry) for index, entry in enumerate(value)]
    else:
        return {key: value}
    return {name: leaf for part, entry in parts for name, leaf in _flat(entry, part).items()}
