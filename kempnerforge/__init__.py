"""KempnerForge: vision-language models whose ways of joining image and text can be compared fairly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kempnerforge.util.version import __version__

if TYPE_CHECKING:
    from kempnerforge.inference.model import TrainedModel, load_pretrained

__all__ = ["TrainedModel", "__version__", "load_pretrained"]


def __getattr__(name: str) -> Any:
    """Trained models bring torch with them, so they are imported when they are asked for."""
    if name in ("TrainedModel", "load_pretrained"):
        from kempnerforge.inference import model

        return getattr(model, name)
    raise AttributeError(f"module 'kempnerforge' has no attribute {name!r}")
