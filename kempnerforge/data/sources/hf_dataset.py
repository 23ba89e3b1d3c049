"""Hugging Face datasets, through ``datasets``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from kempnerforge.config import registry
from kempnerforge.config.data import HFDatasetConfig
from kempnerforge.data.sample import SampleError
from kempnerforge.data.sources.table import TableSource, nested_size

BUILDERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


@registry.register_source("hf_dataset")
class HFDataset(TableSource):
    """Rows of a dataset: a directory of ``save_to_disk``, a Parquet, CSV or JSON file, or a hub id. Images stay encoded until they are used.

    Raises:
        ValueError: it cannot be read, has no such split, or lacks a configured column.
    """

    cfg: HFDatasetConfig

    def __init__(self, cfg: HFDatasetConfig, split: str) -> None:
        super().__init__(cfg, split)
        self.split_name = cfg.split if split == "train" else cfg.eval_split or cfg.split
        table = _load(self.path, self.split_name)
        self.require_columns(table.column_names, self.path)
        table = table.select_columns(self.columns)
        if cfg.image_column:
            table = _undecoded(table, cfg.image_column)
        self._table = table
        self._lengths: list[int] | None = None

    @classmethod
    def has(cls, cfg: Any, split: str) -> bool:
        return super().has(cfg, split) or bool(cfg.eval_split)

    def __len__(self) -> int:
        return len(self._table)

    def length(self, index: int) -> int:
        if self._lengths is None:
            texts = self._table.select_columns(self.text_columns)
            self._lengths = [sum(nested_size(value) for value in row.values()) for row in texts]
        return self._lengths[index]

    def row_id(self, index: int) -> str:
        return f"{self.path.rstrip('/')}[{self.split_name}][{index}]"

    def row(self, index: int) -> Mapping[str, Any]:
        try:
            return self._table[index]
        except (UnicodeDecodeError, OSError) as error:
            raise SampleError(f"cannot be read: {error}") from None


def _load(path: str, split: str) -> Any:
    import datasets

    try:
        if os.path.isdir(path):
            table = datasets.load_from_disk(path)
        elif os.path.isfile(path):
            suffix = os.path.splitext(path)[1].lower()
            if suffix not in BUILDERS:
                raise ValueError(f"data files end in {', '.join(BUILDERS)}")
            return datasets.load_dataset(BUILDERS[suffix], data_files=path, split="train")
        else:
            table = datasets.load_dataset(path)
    except Exception as error:
        raise ValueError(
            f"data: cannot read the dataset {path!r}: {str(error).strip().splitlines()[0] if str(error) else error!r}"
        ) from None
    if isinstance(table, datasets.Dataset):
        return table
    if split not in table:
        raise ValueError(f"data: the dataset {path!r} has no split {split!r}; splits: {', '.join(map(str, table))}")
    return table[split]


def _undecoded(table: Any, column: str) -> Any:
    """``table`` with the images of ``column`` as stored, so that the guarded decoder gets to see them."""
    import datasets

    feature = table.features[column]
    if isinstance(feature, datasets.Image):
        return table.cast_column(column, datasets.Image(decode=False))
    if isinstance(getattr(feature, "feature", None), datasets.Image):
        return table.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return table
