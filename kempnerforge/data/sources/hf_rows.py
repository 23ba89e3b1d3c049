"""Rows of Hugging Face datasets, through ``datasets``; and rows of whatever a path names."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from kempnerforge.config.data import is_csv, is_file_of_rows
from kempnerforge.data.fingerprint import file_fingerprint
from kempnerforge.data.sample import SampleError
from kempnerforge.data.sources.arrow import Labels, example
from kempnerforge.data.sources.keys import ID
from kempnerforge.data.sources.rows import CsvRows, Judge, Measure, Rows, json_rows
from kempnerforge.data.sources.table import FileSource
from kempnerforge.data.stream import first_line
from kempnerforge.util.digest import digest
from kempnerforge.util.errors import InputError
from kempnerforge.util.paths import is_no_hub_id, start_of
from kempnerforge.util.reading import check_files

ENDINGS = (".parquet", ".csv", ".tsv", ".json", ".jsonl")


class HFRows(Rows):
    """Rows of a dataset: a directory of ``save_to_disk``, a Parquet file, or a hub id. Images stay encoded,
    class labels have their names.

    Args:
        source: what they are for.
        measure: characters of a row's texts.
        texts: columns that ``measure`` reads.
        images: columns of images.
        others: further columns. Of all columns those that are not there are left out.

    Raises:
        ValueError: it cannot be read, or has no such split.
    """

    def __init__(
        self, source: FileSource, measure: Measure, texts: Sequence[str], images: Sequence[str], others: Sequence[str] = ()
    ) -> None:
        self.path, self.split, self._measure = source.path, source.split_name, measure
        table = load_rows(self.path, self.split)
        self.columns = set(table.column_names)
        self._schema = table.data.schema
        self._texts = [column for column in texts if column in self.columns]
        self._images = [column for column in images if column in self.columns]
        kept = dict.fromkeys([*self._texts, *self._images, *others])
        table = table.select_columns([column for column in kept if column in self.columns])
        self._labels = Labels({column: feature for column, feature in table.features.items() if column in self._texts})
        for column in self._images:
            table = undecoded(table, column)
        self._table = table

    def judge(self, source: Judge) -> None:
        source.judge_schema(example(self._schema, self.path), self.path)
        source.judge_keys(self.__getitem__, len(self))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        try:
            return self._labels(self._table[index])
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
        return [self._measure(self._labels(row))[0] for row in self._table.select_columns(self._texts)]

    @cached_property
    def _counts(self) -> list[int]:
        """Images of each row by the lengths of their lists; empty where they are no lists, or rows are chosen
        from a larger table.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        if len(self._images) != 1 or self._table._indices is not None:
            return []
        values = self._table.data.column(self._images[0])
        if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
            return []
        return [count or 0 for count in pc.list_value_length(values).to_pylist()]  # pyright: ignore[reportAttributeAccessIssue]

    def fingerprint(self) -> str:
        if os.path.exists(self.path):
            return digest(file_fingerprint(self.path), self.split)
        return digest(len(self), self.split, getattr(self._table, "_fingerprint", ""))


def open_rows(
    source: FileSource, measure: Measure, texts: Sequence[str], images: Sequence[str], quotes: bool = True, others: Sequence[str] = (ID,)
) -> Rows:
    """Rows of a JSON, CSV or TSV file by their place in it, of all else through ``datasets``: types of text
    are never guessed. Arguments as of ``HFRows`` and ``CsvRows``.
    """
    if not is_file_of_rows(source.path):
        return HFRows(source, measure, texts, images, others)
    if source.split_name != "train":
        raise InputError(f"data: split = {source.split_name!r}: {source.path} has no splits; name held-out rows by data.eval_path")
    args = source.path, source.key, measure, source.problems, source.cfg.max_bad_fraction
    return CsvRows(*args, quotes=quotes) if is_csv(source.path) else json_rows(*args)


def is_dataset(path: str) -> bool:
    """Whether ``path`` is no file, or a Parquet file."""
    return not os.path.isfile(path) or path.lower().endswith(".parquet")


def load_rows(path: str, split: str) -> Any:
    """The rows of a split; raises ValueError if it cannot be read, or is not there."""
    import datasets

    try:
        if os.path.isdir(path):
            check_files(path, "*/*")
            table = datasets.load_from_disk(path)
        elif os.path.isfile(path):
            if not path.lower().endswith(".parquet"):
                raise InputError(f"data files end in {', '.join(ENDINGS)}")
            import pyarrow.parquet

            example(pyarrow.parquet.read_schema(path), path)
            table = datasets.load_dataset("parquet", data_files=glob.escape(path), split="train")
        elif path.lower().endswith(ENDINGS) or is_no_hub_id(path):
            raise InputError(f"no such file or directory{start_of(path)}")
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
