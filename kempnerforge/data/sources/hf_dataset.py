"""Hugging Face datasets, through ``datasets``."""

from __future__ import annotations

from kempnerforge.config import registry
from kempnerforge.config.data import HFDatasetConfig
from kempnerforge.data.sources.hf_rows import HFRows
from kempnerforge.data.sources.table import RowSource, TableSource


@registry.register_source("hf_dataset")
class HFDataset(RowSource, TableSource):
    """Rows of a dataset: a directory of ``save_to_disk``, a Parquet, CSV or JSON file, or a hub id. Images stay encoded until they are used.

    Raises:
        ValueError: it cannot be read, has no such split, or lacks a configured column.
    """

    cfg: HFDatasetConfig

    def __init__(self, cfg: HFDatasetConfig, split: str) -> None:
        super().__init__(cfg, split)
        self.rows = HFRows(self.path, self.split_name, self.measure, self.text_columns, cfg.image_column)
        self.require_columns(self.rows.columns, self.path)
