"""Cases of which a few run each time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def quick(values: Iterable[Any], *chosen: Any) -> list[Any]:
    """``values`` for ``parametrize``; those that are not ``chosen`` are slow."""
    values = list(values)
    assert all(value in values for value in chosen), f"{chosen} are not all among {values}"
    return [
        value if value in chosen else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for value in values
    ]
