"""Where samples come from: one file per source, each imported when a config first names it."""

from kempnerforge.data.sources.build import build_source

__all__ = ["build_source"]
