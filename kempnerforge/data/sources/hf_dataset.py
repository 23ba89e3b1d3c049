"""Hugging Face datasets, through ``datasets``."""

from __future__ import annotations

from kempnerforge.config import registry
from kempnerforge.config.data import HFDatasetConfig
from kempnerforge.data.sources.hf_rows import HFRows
from kempnerforge.data.sources.table import RowSource, TableSource


@registry.register_source("hf_dataset")
class HFDataset(RowSource, TableSource):
    """Rows of a dataset."""

    cfg: HFDatasetConfig

    def __init__(self, cfg: HFDatasetConfig, split: str) -> None:
        super().__init__(cfg, split)
        self.rows = HFRows(self.path, self.split_name, self.measure, self.text_columns, cfg.image_column)
        self.require_columns(self.path, self.rows.columns)
