"""Rows and cells of a study. A row is one combination of the levels of all axes; a cell is a row with one
seed: an ordinary job.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from kempnerforge.config import JobConfig, diff, registry, to_toml
from kempnerforge.config.files import Layer, dotted, read_toml
from kempnerforge.config.loader import load_layers
from kempnerforge.study.config import OWN_KEYS, TABLE, Study, check_free
from kempnerforge.training.batch_size import remembered
from kempnerforge.training.complete import WITHOUT_EFFECT
from kempnerforge.util.errors import ConfigError, InputError, show
from kempnerforge.util.files import write_text

CONFIG = "config.toml"


@dataclass(frozen=True)
class Level:
    """One value of an axis.

    Attributes:
        table: a piece of a config that is laid over the common part.
        overrides: what goes into arrays, as on the command line.
    """

    name: str
    table: dict[str, Any]
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """What is compared: one level of each axis."""

    name: str
    levels: tuple[Level, ...]


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        name: as messages call it: "ROW/seed-3" or "ROW/trial-02".
        dir: the run directory; its ``config.toml`` can be trained by itself.
    """

    name: str
    row: Row
    dir: Path
    job: JobConfig

    @property
    def config(self) -> Path:
        return self.dir / CONFIG


def rows_of(study: Study) -> list[Row]:
    """All combinations of levels, the last axis changing fastest.

    Raises:
        ConfigError: an axis cannot be understood, two rows have the same name, or a pair names no row.
    """
    axes = [_levels(study, name, axis) for name, axis in study.cfg.axes.items()]
    rows = [Row("-".join(level.name for level in levels), levels) for levels in product(*axes)]
    names = [row.name for row in rows]
    if twice := next((name for at, name in enumerate(names) if name in names[:at]), None):
        raise ConfigError([f"{study.path}: [{TABLE}] axes: two rows are called {twice!r}; give their levels names"])
    if wrong := next((name for pair in study.cfg.pairs for name in pair if name not in names), None):
        raise ConfigError([f"{study.path}: [{TABLE}] pairs: {wrong!r}: is no row; there are {', '.join(names)}"])
    return rows


def _levels(study: Study, name: str, axis: Any) -> list[Level]:
    where = f"{study.path}: [{TABLE}] axes.{name}"
    if isinstance(axis, list):
        if "." not in name:
            raise ConfigError([f'{where} = {show(axis)}: the axis of an array is called by a whole key, in quotes, as "vlm.arch"'])
        if not axis:
            raise ConfigError([f"{where} = []: must have at least one value"])
        return [_level(where, _label(name, value), {name: value}) for value in axis]
    if not isinstance(axis, dict) or not axis:
        raise ConfigError([f"{where} = {show(axis)}: must be an array of values, or named levels: [{TABLE}.axes.{name}.LEVEL]"])
    for level, table in axis.items():
        if not isinstance(table, dict):
            hint = f'; for an axis of values quote its key: "{name}.{level}" = ...' if isinstance(table, list) else ""
            raise ConfigError([f"{where}.{level} = {show(table)}: must be a piece of a config, a table{hint}"])
    return [_level(where, level, table) for level, table in axis.items()]


def _label(key: str, value: Any) -> str:
    return value if isinstance(value, str) else f"{key.split('.')[-1]}={show(value)}"


def _level(where: str, name: str, table: Mapping[str, Any]) -> Level:
    """``table`` with its dotted keys as tables; those that go through an array become overrides."""
    shown = re.sub(r"[^\w.=+-]+", "_", name).strip("._")
    if not shown:
        raise ConfigError([f"{where}: {name!r} makes no name of a directory; use named levels"])
    found: dict[str, Any] = {}
    overrides = []
    for key, value in table.items():
        parts = dotted(key) if "." in key else (key,)
        if parts is None:
            raise ConfigError([f"{where}: {key!r} is no key"])
        if any(str(part).isdecimal() for part in parts):
            overrides.append(override(key, value))
            continue
        here = found
        for part in parts[:-1]:
            here = here.setdefault(str(part), {})
            if not isinstance(here, dict):
                raise ConfigError([f"{where}: level {name!r}: {key!r} is inside {part!r}, which has the value {show(here)} there"])
        here[str(parts[-1])] = _copy(value)
    for section, key in (own.split(".") for own in OWN_KEYS):
        if isinstance(inside := found.get(section), dict) and key in inside:
            check_free(f"{where}: level {name!r}", f"{section}.{key}")
    return Level(shown, found, tuple(overrides))


def override(key: str, value: Any) -> str:
    """``key`` set to ``value`` as on the command line."""
    return f"--{key}={_inline(value)}"


def _inline(value: Any) -> str:
    """``value`` as TOML in one line."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)} = {_inline(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_inline, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else repr(value)


def job_of(study: Study, row: Row, more: Sequence[str] = ()) -> JobConfig:
    """The job of ``row``, before it is matched, with ``more`` overrides.

    Raises:
        ConfigError: it is wrong; each line names the row.
    """
    layers = [*study.layers, *(Layer(study.path, level.table) for level in row.levels if level.table)]
    overrides = [*study.overrides, *(word for level in row.levels for word in level.overrides), *more]
    try:
        job = load_layers([replace(layer, table=_copy(layer.table)) for layer in layers], str(study.path), overrides)
    except ConfigError as error:
        raise ConfigError([f"row {row.name!r}: {line}" for line in error.problems]) from None
    if not job.total_steps():
        raise ConfigError([f"row {row.name!r}: {study.path}: [train] max_steps = 0: a cell needs a number of steps, or [[stages]]"])
    if not job.eval.at_end:
        raise ConfigError([f"row {row.name!r}: {study.path}: [eval] at_end = false: a study compares what the evaluation at the end finds"])
    for score in study.cfg.scores:
        if not job.eval.measures(score.key):
            known = ", ".join(job.eval.scores)
            where = f"row {row.name!r}: {study.path}: [{TABLE}] scores"
            raise ConfigError([f"{where}: key = {score.key!r}: must begin with the name of a score: {known}"])
    return job


def _copy(value: Any) -> Any:
    """Tables and arrays anew: merging writes into them."""
    if isinstance(value, dict):
        return {key: _copy(entry) for key, entry in value.items()}
    return [_copy(entry) for entry in value] if isinstance(value, list) else value


def cell_of(study: Study, row: Row, job: JobConfig, seed: int, directory: Path, name: str) -> Cell:
    """A cell of ``row``; ``job`` is the config of the row."""
    hook = registry.hook_configs.get("study")()
    hooks = [*(each for each in job.hooks if each.type != hook.type), hook]
    return Cell(name, row, directory, replace(
        job, hooks=hooks, train=replace(job.train, seed=seed), run=replace(job.run, dir=str(directory))
    ))  # fmt: skip


def write_config(cell: Cell) -> None:
    """Writes ``config.toml`` of a cell that has none.

    Raises:
        InputError: there is one that says something else.
    """
    text = to_toml(cell.job)
    if not cell.config.exists():
        write_text(cell.config, text)
        return
    if cell.config.read_text(encoding="utf-8") == text:
        return
    if changed := diff(read_toml(cell.config), cell.job):
        raise _of_another_study(cell, changed)


def refuse_changed(cells: Iterable[Cell]) -> None:
    """Refuses cells whose directory has the config of another study; keys without effect on results may differ.

    Raises:
        InputError: with what differs in the first such cell.
    """
    for cell in cells:
        if cell.config.exists():
            before = read_toml(cell.config)
            changed = [line for line in diff(before, remembered(cell.job, before)) if not line.startswith(WITHOUT_EFFECT)]
            if changed:
                raise _of_another_study(cell, changed)


def _of_another_study(cell: Cell, changed: Sequence[str]) -> InputError:
    listed = "\n  ".join(changed[:8])
    return InputError(
        f"{cell.dir}: is there already, of another study:\n  {listed}\nchange the study back, give it another dir, or move that directory away"
    )
