"""Numbers as text for people."""

from __future__ import annotations

import math


def format_number(value: float) -> str:
    """Short text for a tick or a legend: ``1.5k``, ``0.012``, ``3e-5``."""
    size = abs(value)
    if not math.isfinite(value):
        return "–"
    if size and (size < 1e-2 or size >= 1e12):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    scales: tuple[tuple[float, str], ...] = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
    for number, (scale, unit) in enumerate(scales):
        if size >= scale:
            shown = f"{value / scale:.3g}"
            if "e" in shown:  # 999.6 rounds up to the next unit
                larger, larger_unit = scales[max(number - 1, 0)]
                return f"{value / larger:.3g}{larger_unit}"
            return f"{shown}{unit}"
    return f"{value:.3g}"


def format_percent(value: float) -> str:
    """``0.9931`` -> ``99.3 %``."""
    shown = f"{100 * value:.1f}"
    return f"{shown.removesuffix('.0')}\u00a0%"  # a space that does not break


def format_duration(seconds: float) -> str:
    """``"350 ms"``, ``"12.5 s"``, ``"3 min 04 s"``, ``"2 h 05 min"``, ``"1 d 3 h"``."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def counted(number: int, noun: str) -> str:
    """``"1 image"``, ``"1,234 images"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def wilson_interval(right: float, total: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927): stays inside [0, 1], also near its ends."""
    assert total > 0
    z = 1.96  # the 97.5 % quantile of a normal distribution
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(centre - half, 0.0), min(centre + half, 1.0)
