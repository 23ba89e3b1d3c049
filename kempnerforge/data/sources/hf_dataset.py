"""Hugging Face datasets, through ``datasets``; JSON, CSV and TSV files are read without it."""

from __future__ import annotations

import os

from kempnerforge.config import registry
from kempnerforge.config.data import HFDatasetConfig
from kempnerforge.data.fingerprint import file_fingerprint
from kempnerforge.data.sources.hf_rows import open_rows
from kempnerforge.data.sources.table import RowSource, TableSource
from kempnerforge.util.digest import digest


@registry.register_source("hf_dataset")
class HFDataset(RowSource, TableSource):
    """Rows of a dataset."""

    cfg: HFDatasetConfig

    def __init__(self, cfg: HFDatasetConfig, split: str) -> None:
        super().__init__(cfg, split)
        self.rows = open_rows(self, self.measure, self.text_columns, self.image_columns)
        self.require_columns(self.path, self.rows.columns, self.rows)

    def fingerprint(self) -> str:
        return digest(file_fingerprint(self.path), self.split_name) if os.path.exists(self.path) else super().fingerprint()
