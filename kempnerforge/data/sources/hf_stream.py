"""Datasets that are read as streams, through ``datasets``: files that are too large to index, and hub ids
where there is a network.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from glob import glob, has_magic
from itertools import accumulate, chain, groupby, islice
from typing import Any

from kempnerforge.config import registry
from kempnerforge.config.checks import at_least, only_if
from kempnerforge.config.data import HFDatasetConfig
from kempnerforge.data.batching.order import Order, Windowed
from kempnerforge.data.fingerprint import file_fingerprint
from kempnerforge.data.sample import SampleError
from kempnerforge.data.sources.arrow import Labels, example, labels_of, same_columns
from kempnerforge.data.sources.row_text import nested_size
from kempnerforge.data.sources.rows import parse_line, refuse_array
from kempnerforge.data.sources.table import FileSource, TableSource
from kempnerforge.data.stream import BLOCK, RowStream, first_line
from kempnerforge.util.digest import digest
from kempnerforge.util.errors import InputError
from kempnerforge.util.paths import is_no_hub_id, start_of
from kempnerforge.util.reading import regular

KEPT_WINDOWS = 4
"""Shuffle windows in memory: samplers read three at once at most, and at the end of an epoch the next one
begins.
"""


@registry.register_data_config
@dataclass
class HFStreamConfig(HFDatasetConfig):
    """Rows of Parquet or JSONL files (one, a directory, or a pattern with ``*``), or of a hub id where there
    is a network, read from front to back. Every process reads all of the stream and uses its own share of it.
    Files are read in the order of their names; a run that resumes skips forward, whole Parquet files at once.

    Attributes:
        shuffle_buffer: rows that are shuffled together; about four times as many are in memory, in each
            process. 1 leaves the order alone.
        num_samples: of the training data. 0: as many as the data say; JSONL files do not say it.
        eval_num_samples: the same of the held-out data.
    """

    source: str = "hf_stream"
    shuffle_buffer: int = 1000
    num_samples: int = 0
    eval_num_samples: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "shuffle_buffer")
        at_least(self, 0, "num_samples", "eval_num_samples")
        only_if(self, self.eval_path or self.eval_split, "a job with eval_path or eval_split", "eval_num_samples")
        if "://" in self.path or "://" in self.eval_path:
            raise InputError(f"path = {self.path!r}: URLs are not fetched; name local files, or a hub id")


class Tables(ABC):
    """What a stream is read from.

    Attributes:
        rows: how many, where that is known.
        by_column: whether a column that is not asked for is not read either.
    """

    rows: int | None = None
    by_column = False

    @abstractmethod
    def names(self) -> Collection[str]:
        """The columns that there are."""

    @abstractmethod
    def open_at(self, row: int, columns: Sequence[str]) -> tuple[int, Iterator[Any]]:
        """A row at or before ``row`` where reading may begin, and the Arrow tables of ``columns`` from there
        on.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Of the content, as far as it can be looked at without reading all of it."""

    def judge(self, source: FileSource, columns: Sequence[str]) -> None:
        """Raises InputError if keys are read by nothing or in conflict, as far as the first rows show it, or
        shards differ in ``columns``.
        """
        first = next(self.open_at(0, columns)[1], None)
        rows = first.slice(0, BLOCK).to_pylist() if first is not None else []
        source.judge_keys(lambda index: self.values(rows[index]), len(rows))

    def values(self, row: dict[str, Any]) -> Mapping[str, Any]:
        """The values by column in ``row`` of a table; raises SampleError if it cannot be parsed."""
        return row


class Files(Tables):
    """Local files, one after the other."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = files

    def fingerprint(self) -> str:
        """Of the sizes of all files and the content of the outermost ones."""
        return digest(*map(os.path.getsize, self.files), file_fingerprint(self.files[0]), file_fingerprint(self.files[-1]))


class Parquet(Files):
    """Parquet files. Their footers say how many rows each row group has, so that reading may begin with any
    of them.

    NOTE: read by Arrow directly. With ``datasets`` the memory of a process grows while it reads a file, until
    the end of the file.
    """

    by_column = True

    def __init__(self, files: Sequence[str]) -> None:
        import pyarrow.parquet

        super().__init__(files)
        self.schemas: list[tuple[str, Any]] = []
        self._groups, self._begins = [], [0]  # (file, number in it) of all row groups, and the first row of each
        for file in files:
            about = pyarrow.parquet.read_metadata(file)
            self.schemas.append((file, about.schema.to_arrow_schema()))
            self._groups += [(file, number) for number in range(about.num_row_groups)]
            self._begins += [about.row_group(number).num_rows for number in range(about.num_row_groups)]
        self._begins = list(accumulate(self._begins))
        self.rows = self._begins[-1]
        self._labels = labels_of(self.schemas[0][1])

    def names(self) -> Collection[str]:
        return set(chain.from_iterable(schema.names for _, schema in self.schemas))

    def judge(self, source: FileSource, columns: Sequence[str]) -> None:
        for file, schema in self.schemas:
            source.judge_schema(example(schema, file), file)
            if labels_of(schema) != self._labels:
                raise InputError(f"{file} has other class labels than {self.files[0]}")
        same_columns(self.schemas, columns)
        if any(source.problems(example(self.schemas[0][1], self.files[0]))):  # two names for one thing: of which the rows may use one
            super().judge(source, columns)

    def values(self, row: dict[str, Any]) -> Mapping[str, Any]:
        return self._labels(row)

    def open_at(self, row: int, columns: Sequence[str]) -> tuple[int, Iterator[Any]]:
        first = max(0, min(bisect_right(self._begins, row), len(self._groups)) - 1)
        return self._begins[first], self._read(first, list(columns))

    def _read(self, first: int, columns: list[str]) -> Iterator[Any]:
        import pyarrow
        import pyarrow.parquet

        for file, groups in groupby(self._groups[first:], key=lambda group: group[0]):
            with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as rows:  # a buffer would hold all that was read
                numbers = [number for _, number in groups]
                left = sum(rows.metadata.row_group(number).num_rows for number in numbers)
                for batch in rows.iter_batches(BLOCK, row_groups=numbers, columns=columns, use_threads=False):
                    left -= batch.num_rows
                    yield pyarrow.Table.from_batches([batch])
                if left:
                    raise InputError(f"{file}: {left} rows fewer than its footer says")


class Lines(Files):
    """JSONL files, line by line, so that one bad line is one bad sample. Tables have one column, "line";
    blank lines are no rows.
    """

    def names(self) -> Collection[str]:
        """The names of the first lines that can be read."""
        for file in self.files:
            refuse_array(file)
        found, reason, first = set[str](), "no lines", next(self._read(), None)
        for row in first.to_pylist() if first is not None else ():
            try:
                found.update(self.values(row))
            except SampleError as error:
                reason = str(error)
        if not found:
            raise InputError(reason)
        return found

    def open_at(self, row: int, columns: Sequence[str]) -> tuple[int, Iterator[Any]]:
        return 0, self._read()

    def _read(self) -> Iterator[Any]:
        import pyarrow

        for path in self.files:
            with open(path, "rb") as file:
                lines = (line for line in file if line.strip())
                while block := list(islice(lines, BLOCK)):
                    yield pyarrow.table({"line": block})

    def values(self, row: dict[str, Any]) -> Mapping[str, Any]:
        try:
            return parse_line(row["line"])
        except ValueError as error:
            raise SampleError(str(error)) from None


class Hub(Tables):
    """A split of a dataset on the hub."""

    def __init__(self, path: str, split: str) -> None:
        import datasets

        self.path, self.split = path, split
        self._dataset = datasets.load_dataset(path, split=split, streaming=True)
        self._labels = Labels(self._dataset.features or {})
        about = self._dataset.info.splits
        self.rows = about[split].num_examples if about and split in about else None

    def names(self) -> Collection[str]:
        return self._dataset.column_names or next(_tables(self._dataset)).column_names

    def open_at(self, row: int, columns: Sequence[str]) -> tuple[int, Iterator[Any]]:
        return 0, _tables(self._dataset.select_columns(list(columns)))

    def fingerprint(self) -> str:
        return digest(self.path, self.split, self.rows)

    def judge(self, source: FileSource, columns: Sequence[str]) -> None:
        if self._dataset.features is not None:
            source.judge_schema(example(self._dataset.features.arrow_schema, self.path), self.path)
        super().judge(source, columns)

    def values(self, row: dict[str, Any]) -> Mapping[str, Any]:
        return self._labels(row)


def _tables(dataset: Any) -> Iterator[Any]:
    """Arrow tables of ``BLOCK`` rows; images stay as they are stored."""
    return dataset.with_format("arrow").iter(batch_size=BLOCK)


def _find(path: str, split: str) -> Tables:
    """What ``path`` names; raises ValueError for no such files, files of several kinds, or nothing on the
    hub.
    """
    kinds: dict[str, type[Files]] = {".parquet": Parquet, ".jsonl": Lines}
    suffix = lambda file: os.path.splitext(file)[1].lower()
    if os.path.isdir(path):
        files = [file for file in glob(os.path.join(path, "**"), recursive=True) if suffix(file) in kinds]
    else:
        files = [path] if os.path.isfile(path) else glob(path, recursive=True)
    found = sorted({suffix(file) for file in files})
    named = [file for file in files if re.match(rf"{re.escape(split)}[-_.]", os.path.basename(file))]
    if os.path.isdir(path) and named and len(named) < len(files):
        others = sorted(set(files) - set(named))
        raise InputError(
            f"{os.path.basename(others[0])} is not of split {split!r}, as {os.path.basename(named[0])} is; give a pattern, as {split}-*"
        )
    if len(found) == 1 and found[0] in kinds:
        return kinds[found[0]](sorted(str(regular(file)) for file in files))
    if files or os.path.exists(path):
        raise InputError(f"files end in {', '.join(found)}; a stream is of files that all end in one of {', '.join(kinds)}")
    if is_no_hub_id(path) or has_magic(path) or suffix(path) in kinds:
        raise InputError(f"no such files{start_of(path)}")
    return Hub(path, split)


@registry.register_source("hf_stream")
class HFStream(TableSource):
    """Sample k is row k of the stream."""

    cfg: HFStreamConfig

    def __init__(self, cfg: HFStreamConfig, split: str) -> None:
        super().__init__(cfg, split)
        name = self.split_name
        if not cfg.root and has_magic(self.path):
            self.root = os.path.realpath(os.path.dirname(re.split(r"[*?[]", self.path)[0]) or ".")
        try:
            tables = _find(self.path, name)
            names = tables.names()
        except Exception as error:  # whatever files, Arrow or a network raise
            raise InputError(f"data: cannot read the stream {self.path!r}: {first_line(error)}") from None
        if not isinstance(tables, Hub):
            if cfg.eval_split and (split == "test" or not cfg.eval_path):
                raise InputError(f"data.eval_split = {cfg.eval_split!r}: files have no splits; name held-out files in eval_path")
            if cfg.split != "train" and (split == "train" or not cfg.eval_split):
                raise InputError(f"data.split = {cfg.split!r}: files have no splits; name the files of one by a pattern in data.path")
        self.require_columns(self.path, names)
        columns = [column for column in self.columns if column in names]
        tables.judge(self, columns)
        if not tables.by_column:  # not all keys are in a schema, nor all rows looked at
            self.ignored.used.update(self.ignored.patterns)
        self._tables, self._length = tables, self._count(tables.rows)
        keep = KEPT_WINDOWS * cfg.shuffle_buffer
        self._whole_rows = RowStream(partial(tables.open_at, columns=columns), keep)
        texts = [column for column in columns if column in self.text_columns]
        self._text_rows = RowStream(partial(tables.open_at, columns=texts), keep) if tables.by_column else self._whole_rows

    def _count(self, rows: int | None) -> int:
        train = self.split == "train"
        key, asked = ("num_samples", self.cfg.num_samples) if train else ("eval_num_samples", self.cfg.eval_num_samples)
        if not asked and rows is None:
            raise InputError(f"data.{key} = 0: {self.path} does not say how many rows it has; say it")
        if rows is not None and asked > rows:
            raise InputError(f"data.{key} = {asked}: {self.path} has {rows} rows")
        return asked or rows or 0

    def __len__(self) -> int:
        return self._length

    def order(self, seed: int) -> Order:
        return Windowed(len(self), seed, self.cfg.shuffle_buffer)

    def peers(self, index: int) -> range:
        """The samples of its shuffle window, which are in memory."""
        begin = index // self.cfg.shuffle_buffer * self.cfg.shuffle_buffer
        return range(begin, min(begin + self.cfg.shuffle_buffer, len(self)))

    def length(self, index: int) -> int:
        try:
            row = self._tables.values(self._text_rows.row(index))
        except SampleError:
            return 0
        return sum(nested_size(row.get(column)) for column in self.text_columns)

    def num_images(self, index: int) -> int:
        return int(bool(self.image_columns))

    def fingerprint(self) -> str:
        return self._tables.fingerprint()

    def shards(self) -> Sequence[str]:
        return self._tables.files if isinstance(self._tables, Files) else ()

    def row_id(self, index: int) -> str:
        return f"{self.path}[{index}]"

    def row(self, index: int) -> Mapping[str, Any]:
        return self._tables.values(self._whole_rows.row(index))
