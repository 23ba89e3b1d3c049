"""KempnerForge: vision-language models whose ways of joining image and text can be compared fairly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kempnerforge.util.version import __version__

if TYPE_CHECKING:
    from kempnerforge.inference.pretrained import load_pretrained

__all__ = ["__version__", "load_pretrained"]


def __getattr__(name: str) -> Any:
    """``load_pretrained`` brings torch with it, so it is imported when it is asked for."""
    if name == "load_pretrained":
        from kempnerforge.inference.pretrained import load_pretrained

        return load_pretrained
    raise AttributeError(f"module 'kempnerforge' has no attribute {name!r}")
