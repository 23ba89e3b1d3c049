"""One TOML file and command-line overrides -> a checked ``JobConfig``.

defaults < ``extends = "other.toml"`` < the TOML < ``--section.key=value``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kempnerforge.config.build import INVALID, SECTIONS, UNIONS, convert, convert_fields, without_arguments
from kempnerforge.config.files import (
    COMMAND_LINE,
    Argument,
    Key,
    Layer,
    assign,
    merge_layers,
    parse_overrides,
    read_layers,
    switch_recorded,
)
from kempnerforge.config.job import JobConfig
from kempnerforge.config.plugins import check_trust, load_plugins
from kempnerforge.config.stages import STAGED, StageConfig
from kempnerforge.util.errors import ConfigError, Problems
from kempnerforge.util.paths import PathText, place_of

_UNION_SECTIONS = {name: UNIONS[cls] for name, cls in SECTIONS.items() if cls in UNIONS}


def load_config(path: Path | str | None, overrides: Sequence[str] = ()) -> JobConfig:
    """Reads, merges, builds and checks a job.

    Args:
        path: the TOML file; None takes the defaults.
        overrides: "--section.key=value", or "--section.key" and "value" after each other. Values are TOML;
            where a string is wanted, or where it is no TOML, the bare text counts. An entry of an array goes
            by its index: "--stages.0.steps=10".

    Raises:
        ConfigError: with one line for each thing that is wrong.
    """
    origin = COMMAND_LINE if path is None else str(path)
    return load_layers([] if path is None else read_layers(place_of(path)), origin, overrides)


def load_layers(layers: Sequence[Layer], origin: str, overrides: Sequence[str] = ()) -> JobConfig:
    """As ``load_config``, of tables that have been read already.

    Args:
        layers: the most basic one first.
        origin: the file, for messages about what is in none of them.
    """
    arguments = Problems(COMMAND_LINE)
    given = parse_overrides(overrides, arguments)
    plugins = _load_plugins(layers, given)
    table, origins = merge_layers(layers, _UNION_SECTIONS)
    arguments.origins, arguments.records = origins, {str(layer.path) for layer in layers if layer.record}
    for key, value in given:
        switch_recorded(table, key, value, _UNION_SECTIONS, arguments)
        assign(table, key, value, arguments)
    problems = Problems(origin, origins, arguments.records)
    problems.lines = arguments.lines
    sections = convert_fields(JobConfig, table | {"plugins": plugins}, (), problems)
    broken = {name for name, section in sections.items() if section is INVALID}
    job = JobConfig(**{name: section for name, section in sections.items() if name not in broken}, origins=Problems(origin, origins))
    if "stages" in broken:
        job.stages = _overrides_alone(table["stages"])
    job.check(problems, broken)
    problems.raise_if_any()
    return job


def _overrides_alone(stages: Any) -> list[StageConfig]:
    """Stages that could not be built, with nothing but their overrides, so that what is wrong with those is
    reported, too.
    """
    tables = [stage if isinstance(stage, dict) else {} for stage in stages] if isinstance(stages, list) else []
    staged = [{name: without_arguments(table[name]) for name in STAGED if isinstance(table.get(name), dict)} for table in tables]
    return [StageConfig("unreadable", sys.maxsize, **overrides) for overrides in staged]


def _load_plugins(layers: Sequence[Layer], given: Sequence[tuple[Key, Argument]]) -> list[str]:
    """Imports the plugins of the topmost layer that names any; ``.py`` files are relative to that layer.
    Plugins that the config of a run or an export names have to be trusted.
    """
    layer = next((layer for layer in reversed(layers) if "plugins" in layer.table), None)
    value, folder = (layer.table["plugins"], layer.path.parent) if layer is not None else ([], Path())
    origin = str((layer or layers[-1]).path) if layers else COMMAND_LINE
    for argument in [argument for key, argument in given if key == ("plugins",)]:
        layer, folder, origin = None, Path(), COMMAND_LINE
        value = [argument.text] if isinstance(argument.value, str) else argument  # --plugins=FILE
    names = convert(list[PathText], value, ("plugins",), problems := Problems(origin))
    if names is INVALID:
        raise ConfigError(problems.lines)
    if layer is not None and layer.is_record:
        check_trust(names, folder, origin)
    return load_plugins(names, folder, origin)
