"""Types of options that are numbers in a range; what is outside of it is refused by name, as other wrong
usage is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

MOST = 2**31 - 1
T = TypeVar("T", int, float)


def whole(low: int, high: int = MOST) -> Callable[[str], int]:
    """An integer from ``low`` to ``high``."""

    def int_(text: str) -> int:
        return _within(int(text), text, low, high)

    int_.__name__ = "int"  # for argparse: "invalid int value"
    return int_


def real(low: float, high: float = MOST) -> Callable[[str], float]:
    """A number from ``low`` to ``high``, which NaN is not."""

    def float_(text: str) -> float:
        return _within(float(text), text, low, high)

    float_.__name__ = "float"
    return float_


def _within(value: T, text: str, low: float, high: float) -> T:
    if not low <= value <= high:
        limits = f"between {low} and {high}" if high != MOST or value > high else f"at least {low}"
        raise argparse.ArgumentTypeError(f"{text}: must be {limits}")
    return value
