"""Rows of Hugging Face datasets, through ``datasets``; and rows of whatever a path names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from kempnerforge.config.data import is_csv, is_file_of_rows
from kempnerforge.config.errors import InputError
from kempnerforge.data.fingerprint import digest, file_fingerprint
from kempnerforge.data.sample import SampleError
from kempnerforge.data.sources.rows import CsvRows, Measure, Rows, json_rows
from kempnerforge.data.sources.table import FileSource
from kempnerforge.data.stream import first_line

BUILDERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


class HFRows(Rows):
    """Rows of a dataset: a directory of ``save_to_disk``, a Parquet, CSV or JSON file, or a hub id. Images stay encoded.

    Args:
        measure: characters of a row's texts.
        texts: columns that ``measure`` reads.
        images: column of images, or nothing.
        others: further columns; those that are not there are left out.

    Raises:
        ValueError: it cannot be read, or has no such split.
    """

    def __init__(self, path: str, split: str, measure: Measure, texts: Sequence[str], images: str, others: Sequence[str] = ()) -> None:
        self.path, self.split, self._measure = path, split, measure
        table = load(path, split)
        self.columns = set(table.column_names)
        self._texts = [column for column in texts if column in self.columns]
        self._images = images if images in self.columns else ""
        kept = dict.fromkeys([*self._texts, *([self._images] if self._images else []), *others])
        self._table = undecoded(table.select_columns([column for column in kept if column in self.columns]), self._images)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        try:
            return self._table[index]
        except (UnicodeDecodeError, OSError) as error:
            raise SampleError(f"cannot be read: {error}") from None

    def name(self, index: int) -> str:
        return f"{self.path.rstrip('/')}[{self.split}][{index}]"

    def length(self, index: int) -> int:
        return self._lengths[index]

    def num_images(self, index: int) -> int:
        return self._counts[index] if self._counts else int(bool(self._images))

    @cached_property
    def _lengths(self) -> list[int]:
        return [self._measure(row)[0] for row in self._table.select_columns(self._texts)]

    @cached_property
    def _counts(self) -> list[int]:
        """Images of each row by the lengths of their lists; empty where they are no lists, or rows are chosen from a larger table."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if not self._images or self._table._indices is not None:
            return []
        values = self._table.data.column(self._images)
        if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
            return []
        return [count or 0 for count in pc.list_value_length(values).to_pylist()]  # pyright: ignore[reportAttributeAccessIssue]

    def fingerprint(self) -> str:
        if os.path.exists(self.path):
            return digest(file_fingerprint(self.path), self.split)
        return digest(len(self), self.split, getattr(self._table, "_fingerprint", ""))


def open_rows(source: FileSource, measure: Measure, texts: Sequence[str], images: str, quotes: bool = True) -> Rows:
    """Rows of a JSON, CSV or TSV file by their place in it, of all else through ``datasets``. Arguments as of ``HFRows`` and ``CsvRows``."""
    split, args = source.split_name, (source.path, source.key, measure, (), source.cfg.max_bad_fraction)
    if not is_file_of_rows(source.path):
        return HFRows(source.path, split, measure, texts, images)
    return CsvRows(*args, quotes=quotes) if is_csv(source.path) else json_rows(*args)


def load(path: str, split: str) -> Any:
    """The rows of a split; raises ValueError if it cannot be read, or is not there."""
    import datasets

    try:
        if os.path.isdir(path):
            table = datasets.load_from_disk(path)
        elif os.path.isfile(path):
            suffix = os.path.splitext(path)[1].lower()
            if suffix not in BUILDERS:
                raise InputError(f"data files end in {', '.join(BUILDERS)}")
            table = datasets.load_dataset(BUILDERS[suffix], data_files=path, split="train")
        elif os.path.splitext(path)[1].lower() in (*BUILDERS, ".tsv"):
            raise InputError("no such file")
        else:
            table = datasets.load_dataset(path)
    except Exception as error:
        raise InputError(f"data: cannot read the dataset {path!r}: {first_line(error)}") from None
    if isinstance(table, datasets.Dataset):
        if split not in ("train", str(table.split)):
            raise InputError(f"data: split = {split!r}: the dataset {path!r} has no splits; name held-out rows by data.eval_path")
        return table
    if split not in table:
        raise InputError(f"data: the dataset {path!r} has no split {split!r}; splits: {', '.join(map(str, table))}")
    return table[split]


def undecoded(table: Any, column: str) -> Any:
    """``table`` with the images of ``column`` as stored, so that the guarded decoder gets to see them."""
    import datasets

    feature = table.features.get(column)
    if isinstance(feature, datasets.Image):
        return table.cast_column(column, datasets.Image(decode=False))
    if isinstance(getattr(feature, "feature", None), datasets.Image):
        return table.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return table
