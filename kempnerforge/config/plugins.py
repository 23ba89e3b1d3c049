"""Code outside this package that registers archs, encoders, adapters or data sources, imported before a config is read."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

from kempnerforge.config.errors import ConfigError

ENTRY_POINTS = "kempnerforge.plugins"


def load_plugins(names: Sequence[str], folder: Path, origin: str) -> list[str]:
    """Imports the plugins of a config and those that installed packages announce.

    Args:
        names: modules ("my_lab.arch"), or files that end in ".py", relative to ``folder``.
        folder: the directory of the file that names them.
        origin: that file, for messages.

    Returns:
        The names, files as absolute paths.

    Raises:
        ConfigError: a plugin cannot be imported.
    """
    problems, resolved = [], []
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            problems.append(f"{origin}: entry point {entry.name!r} of {ENTRY_POINTS!r} ({entry.value}): {_describe(error)}")
    for name in names:
        try:
            resolved.append(_load(name, folder))
        except Exception as error:
            problems.append(f"{origin}: plugins: {name!r} cannot be imported: {_describe(error)}")
    if problems:
        raise ConfigError(problems)
    return resolved


def _describe(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _load(name: str, folder: Path) -> str:
    if not name.endswith(".py"):
        importlib.import_module(name)
        return name
    path = (folder / name).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    # NOTE: a fixed name for a fixed path, so that a plugin runs once in a process however often it is named.
    module_name = f"kempnerforge_plugin_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    return str(path)
