"""JSONL: one JSON object a line."""

from __future__ import annotations

from kempnerforge.config import registry
from kempnerforge.config.data import JsonlConfig
from kempnerforge.data.sources.rows import JsonLines
from kempnerforge.data.sources.table import RowSource, TableSource


@registry.register_source("jsonl")
class Jsonl(RowSource, TableSource):
    """Rows of a JSONL file."""

    def __init__(self, cfg: JsonlConfig, split: str) -> None:
        super().__init__(cfg, split)
        self.rows = JsonLines(self.path, self.key, self.measure, self.problems, cfg.max_bad_fraction)
        self.require_columns(self.path, self.rows.columns, self.rows)
