"""``[[stages]]``: what changes while a run goes on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from kempnerforge.config.build import (
    INVALID,
    SECTIONS,
    UNIONS,
    Discriminator,
    class_named,
    construct,
    convert,
    convert_fields,
    fields_of,
    keys_of,
)
from kempnerforge.config.checks import at_least, not_default
from kempnerforge.config.data import DataConfig
from kempnerforge.config.optimizer import OptimizerConfig
from kempnerforge.config.schedule import SchedulerConfig
from kempnerforge.config.training import AUTO, TrainConfig
from kempnerforge.config.vlm import FreezeSpec
from kempnerforge.util.errors import InputError, Key, Problems

_FIXED = {"data": ("tokenizer", "tokenizer_vocab_size", "validation"), "optimizer": ("name",), "scheduler": ()}
"""Keys that hold for the whole run."""
_TRAIN_KEYS = ("batch_size", "rows_per_step", "grad_accum_steps", "seq_len")
STAGED = ("data", "train", "optimizer", "scheduler")


@dataclass
class StageConfig:
    """One ``[[stages]]`` table.

    Attributes:
        name: names the stage in messages, metrics and reports.
        steps: optimizer steps of this stage.
        freeze: replaces ``[vlm].freeze`` during this stage.
        data, train, optimizer, scheduler: keys of these sections that are different in this stage.
    """

    name: str
    steps: int
    freeze: list[FreezeSpec] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise InputError(f"name = {self.name!r}: a stage needs one")
        at_least(self, 1, "steps")


@dataclass(frozen=True)
class Stage:
    """A stage with its overrides resolved. It covers optimizer steps ``start <= step < end``.

    Attributes:
        index: of the ``[[stages]]`` table.
        planned_steps: what the learning rate is a function of: ``steps`` unless ``train.max_steps`` cuts the
            stage short. A run that is cut short and then allowed to go on is the same as one that never was.
        freeze: without ``[vlm].freeze_schedule``, see ``JobConfig.freeze_at``.
    """

    name: str
    index: int
    start: int
    end: int
    planned_steps: int
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    freeze: tuple[FreezeSpec, ...]

    @property
    def steps(self) -> int:
        return self.end - self.start


def override(stage: StageConfig, sections: Mapping[str, Any], key: Key, problems: Problems, broken: Collection[str] = ()) -> dict[str, Any]:
    """``sections`` as ``stage`` changes them.

    Args:
        stage: with overrides as written.
        sections: the sections of ``STAGED`` that could be built, by name.
        key: where the stage is.
        problems: collects what is wrong with the overrides.
        broken: names of sections that could not be built and are there with defaults: only keys and types of
            their overrides are checked.

    Returns:
        The changed sections by name, without those that have a problem.
    """
    changed = {}
    for name, section in sections.items():
        table = getattr(stage, name)
        if name in broken:
            # which class a broken section was meant to have is not known: keys that another class has may be
            # right
            others = keys_of(SECTIONS[name]) - fields_of(type(section)).keys()
            table = {part: value for part, value in table.items() if part not in others}
            result = INVALID if name == "data" else _replace(section, table, (*key, name), problems, keys_only=True)
        else:
            result = _override_section(section, table, (*key, name), problems)
        if result is not INVALID:
            changed[name] = result
    return changed


def _override_section(section: Any, table: dict[str, Any], key: Key, problems: Problems) -> Any:
    union = next((union for base, union in UNIONS.items() if isinstance(section, base)), None)
    if union is not None and union.key in table and union.key not in _FIXED[str(key[-1])]:
        return _other_class(section, union, table, key, problems)
    return _replace(section, table, key, problems)


def _convert(cls: type, table: dict[str, Any], key: Key, problems: Problems) -> dict[str, Any]:
    """The overrides as the types of ``cls``'s fields; ``INVALID`` where a stage may not change the key."""
    section = str(key[-1])
    fixed = {part: INVALID for part in table if part in _FIXED.get(section, ())}
    for part in fixed:
        problems.add((*key, part), ": holds for the whole run, a stage cannot change it")
    allowed = _TRAIN_KEYS if section == "train" else [part for part in fields_of(cls) if part not in _FIXED.get(section, ())]
    return convert_fields(cls, {part: value for part, value in table.items() if part not in fixed}, key, problems, allowed) | fixed


def _replace(section: Any, table: dict[str, Any], key: Key, problems: Problems, keys_only: bool = False) -> Any:
    values = _convert(type(section), table, key, problems)
    if keys_only:
        return INVALID
    if isinstance(section, TrainConfig) and "batch_size" in values:  # keys of the other way to say it do not hold here
        values = {"grad_accum_steps": 1} | values if values["batch_size"] == AUTO else {"rows_per_step": 0} | values
    return construct(type(section), partial(replace, section), values, table, key, problems, complete=True)


def _other_class(section: Any, union: Discriminator, table: dict[str, Any], key: Key, problems: Problems) -> Any:
    """The section of the stage's own source or schedule; other keys stay if the new class has them."""
    name = convert(str, table[union.key], (*key, union.key), problems)
    chosen = None if name is INVALID else class_named(union, name, key, problems)
    if chosen is None:
        return INVALID
    if chosen is type(section):
        return _replace(section, table, key, problems)
    unread = chosen.unread if issubclass(chosen, DataConfig) else ()
    kept = {part: value for part, value in not_default(section).items() if part in fields_of(chosen) and part not in unread}
    values = kept | _convert(chosen, table, key, problems) | {union.key: name}
    return construct(chosen, chosen, values, kept.keys() | table.keys(), key, problems)
