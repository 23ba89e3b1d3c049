"""Where samples come from: one file per source, each imported when a config first names it."""
