"""Rows of files, by number: JSON lines, JSON lists, CSV and TSV. Only the position of each row is kept in
memory.

A row that cannot be parsed is a row nevertheless, and an error when it is asked for, so that it is skipped,
counted and listed like any other sample that cannot be used. A file that has too many of them is refused.
"""

from __future__ import annotations

import csv
import io
import mmap
import os
import re
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol

from kempnerforge.data.fingerprint import file_fingerprint
from kempnerforge.data.sample import SampleError
from kempnerforge.data.sources.keys import refuse
from kempnerforge.util import reading
from kempnerforge.util.digest import digest
from kempnerforge.util.errors import InputError, show
from kempnerforge.util.paths import start_of

BOM = b"\xef\xbb\xbf"
SHOWN_ROWS = 5
FIELD_BYTES = 2**26
"""A field of a CSV file is not longer: a quote that is never closed would take the rest of the file."""
Measure = Callable[[Mapping[str, Any]], tuple[int, int]]
"""Of a row: characters of its texts, and images. Must take all that a row may hold."""
Problems = Callable[[Mapping[str, Any]], Iterable[str]]
"""What is wrong with the keys of a row."""


class ScannedRow(NamedTuple):
    """A row as it was found in a file.

    Attributes:
        begin, size: in bytes.
        number: of the line, the entry or the row, from 1, for messages.
        values: by column, or why the row cannot be parsed.
    """

    begin: int
    size: int
    number: int
    values: dict[str, Any] | ValueError


class Judge(Protocol):
    """Knows which keys rows may have: a source."""

    def judge_schema(self, example: Mapping[str, Any], where: str) -> None: ...

    def judge_keys(self, row: Callable[[int], Mapping[str, Any]], count: int) -> None: ...


MOST_OUTLINES = 10_000
"""That are kept, of one file."""


class Rows(ABC):
    """Rows by number.

    Attributes:
        columns: names that any of them has.
    """

    columns: set[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Row ``index``; raises SampleError if it cannot be read."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The place of a row, for messages."""

    @abstractmethod
    def length(self, index: int) -> int:
        """Characters of its texts."""

    @abstractmethod
    def num_images(self, index: int) -> int: ...

    @abstractmethod
    def fingerprint(self) -> str: ...

    @abstractmethod
    def judge(self, source: Judge) -> None:
        """Raises ValueError if a key is wrong, as ``source`` knows it."""

    def require(self, columns: Sequence[str], advice: str) -> None:
        """Raises ValueError, with ``advice``, if more rows than may be bad have none of ``columns``, where
        rows can be without a column.
        """
        return


class IndexedRows(Rows):
    """Rows of a file that is read once and judged; afterwards rows are read where they are.

    Args:
        key: the config key that names it, for messages.
        measure: what to keep of each row for batching.
        problems: what is wrong with the keys of a row; asked once for rows of the same ``outline``.

    Attributes:
        counts: rows that have each column.

    Raises:
        ValueError: no such file, no rows, or too many that cannot be parsed (the first are named by number).
    """

    unit, units = "line", "lines"

    def __init__(self, path: str, key: str, measure: Measure, problems: Problems = lambda row: (), max_bad_fraction: float = 0.0) -> None:
        self.path, self.counts, self._max_bad = path, Counter[str](), max_bad_fraction
        kept = [array("q") for _ in range(5)]
        self._begins, self._sizes, self._numbers, self._lengths, self._images = kept
        bad: list[str] = []
        wrong: dict[str, list[int]] = {}
        found: dict[Any, tuple[str, ...]] = {}
        try:
            with open(path, "rb") as file:
                for begin, size, number, values in self._scan(file):
                    measured = (0, 0) if isinstance(values, ValueError) else measure(values)
                    for column, value in zip(kept, (begin, size, number, *measured), strict=True):
                        column.append(value)
                    if isinstance(values, ValueError):
                        bad.append(f"{self.unit} {number}: {values}" if len(bad) < SHOWN_ROWS else "")
                    else:
                        self.counts.update(values.keys())
                        if (wrong_here := found.get(shape := outline(values))) is None:
                            wrong_here = tuple(dict.fromkeys(problems(values)))
                            if len(found) < MOST_OUTLINES:
                                found[shape] = wrong_here
                        for problem in wrong_here:
                            first_and_count = wrong.setdefault(problem, [number, 0])
                            first_and_count[1] += 1
        except OSError as error:
            raise InputError(f"data.{key} = {path!r}: {error.strerror or error}{start_of(path)}") from None
        self.columns = set(self.counts)
        if len(bad) > max_bad_fraction * len(self) or (bad and len(bad) == len(self)):
            raise InputError(f"{path}: {len(bad)} bad {self.units}: {'; '.join(bad[:SHOWN_ROWS])}")
        if not len(self):
            raise InputError(f"{path}: no rows")
        self._wrong = [f"{self.unit} {first}: {problem}{f' ({n} times)' if n > 1 else ''}" for problem, (first, n) in wrong.items()]

    def judge(self, source: Judge) -> None:
        refuse(self.path, self._wrong)

    def require(self, columns: Sequence[str], advice: str) -> None:
        """Raises ValueError, with ``advice``, if more rows than may be bad have none of ``columns``."""
        lacking = len(self) - sum(self.counts[column] for column in columns)
        if lacking > self._max_bad * len(self):
            names = " or ".join(repr(column) for column in columns if column in self.columns)
            raise InputError(f"{self.path}: {lacking} of {len(self)} rows have no column {names}; {advice}")

    @abstractmethod
    def _scan(self, file: BinaryIO) -> Iterator[ScannedRow]:
        """All rows of ``file``."""

    def _parse(self, content: bytes) -> dict[str, Any]:
        """The row in ``content``; raises ValueError if it is none."""
        return parse_line(content)

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        try:
            file = os.open(self.path, os.O_RDONLY)
            try:
                return self._parse(os.pread(file, self._sizes[index], self._begins[index]))
            finally:
                os.close(file)
        except (OSError, ValueError) as error:
            raise SampleError(f"cannot be read: {error}") from None

    def name(self, index: int) -> str:
        return f"{os.path.basename(self.path)}:{self._numbers[index]}"

    def length(self, index: int) -> int:
        return self._lengths[index]

    def num_images(self, index: int) -> int:
        return self._images[index]

    def fingerprint(self) -> str:
        return digest(file_fingerprint(self.path))


class JsonLines(IndexedRows):
    """One JSON object a line; blank lines are left out."""

    def _scan(self, file: BinaryIO) -> Iterator[ScannedRow]:
        refuse_array(self.path)
        end = 0
        for number, line in enumerate(iter(lambda: file.readline(reading.MAX_JSON + 1), b""), 1):
            if len(line) > reading.MAX_JSON:
                raise InputError(f"{self.path}: line {number} has more than {reading.MAX_JSON:,} bytes")
            begin, end = end, end + len(line)
            if line.removeprefix(BOM if number == 1 else b"").strip():
                yield ScannedRow(begin, len(line), number, _attempt(parse_line, line))


class JsonList(IndexedRows):
    """A file that is one JSON list of objects. It is looked through for where each begins and ends; no more
    than one is in memory.
    """

    unit, units = "entry", "entries"
    _TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.DOTALL)

    def _scan(self, file: BinaryIO) -> Iterator[ScannedRow]:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            depth, begin, number, end = 0, 0, 0, 0
            for match in self._TOKEN.finditer(content):
                token = match[0]
                depth += (token in b"[{") - (token in b"]}")
                opens, closes = depth == 2 and token in b"[{", depth == 1 and token in b"]}"
                if closes:
                    number += 1
                    end = match.end()
                    row = content[begin : min(end, begin + reading.MAX_JSON + 1)]
                    yield ScannedRow(begin, end - begin, number, _attempt(parse_line, row))
                elif depth <= 1 or opens:  # on the level of the list there are objects and commas, and nothing else
                    if not (opens or token in b"[]") or content[end : match.start()].strip(BOM + b", \t\r\n"):
                        raise InputError(f"{self.path}: entry {number + 1} is not an object")
                    begin, end = match.start(), match.end() if depth <= 1 else end
                if depth <= 0:
                    break
            if depth or content[end:].strip():
                raise InputError(f"{self.path}: not a JSON list: it {'is broken off' if depth else 'goes on'} after entry {number}")


class CsvRows(IndexedRows):
    """Comma- or tab-separated values with a line of column names. A field may be quoted, and then hold line
    breaks.

    Args:
        quotes: False: a quote is a character like any other.
    """

    unit, units = "row", "rows"

    def __init__(self, path: str, key: str, measure: Measure, *args: Any, quotes: bool = True) -> None:
        self._names: list[str] = []
        self._style = {"delimiter": "\t" if path.lower().endswith(".tsv") else ",", "strict": True}
        self._style["quoting"] = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
        super().__init__(path, key, measure, *args)

    def _scan(self, file: BinaryIO) -> Iterator[ScannedRow]:
        end, open_at = 0, 0

        def lines() -> Iterator[str]:
            nonlocal end
            for line in file:
                end += len(line)
                # undecodable bytes pass as lone surrogates, and are found when the row is judged
                yield line.removeprefix(BOM if end == len(line) else b"").decode("utf-8", "surrogateescape")

        reader, number = self._reader(lines()), 0
        self._names = next(reader, [])
        twice = [show(name) for name, count in Counter(self._names).items() if count > 1]
        if twice:
            raise InputError(f"{self.path}: the header has the column {', '.join(twice[:SHOWN_ROWS])} twice; rename one of them")
        while True:
            open_at, number = end, number + 1
            try:
                values = next(reader, None)
            except csv.Error as error:
                if "unexpected end" in str(error):
                    raise InputError(f"{self.path}: row {number}: a quote that is never closed") from None
                yield ScannedRow(open_at, end - open_at, number, ValueError(f"not CSV: {error}"))
                continue
            if values is None:
                return
            if values:
                yield ScannedRow(open_at, end - open_at, number, _attempt(self._row, values))

    def _reader(self, lines: Iterator[str]) -> Iterator[list[str]]:
        csv.field_size_limit(FIELD_BYTES)  # of the whole process, which may be a fresh one
        return csv.reader(lines, **self._style)

    def _parse(self, content: bytes) -> dict[str, Any]:
        try:
            lines = (line.decode("utf-8", "surrogateescape") for line in io.BytesIO(content))
            values = next(self._reader(lines), [])
        except csv.Error as error:
            raise InputError(f"not CSV: {error}") from None
        return self._row(values)

    def _row(self, values: list[str]) -> dict[str, Any]:
        if len(values) != len(self._names):
            raise InputError(f"{len(values)} fields, {len(self._names)} column names")
        bad = next((value for value in values if any("\udc80" <= c <= "\udcff" for c in value)), None)
        if bad is not None:
            raise InputError(f"not UTF-8: {bad[:40]!a}")
        return dict(zip(self._names, values, strict=True))


def outline(value: Any) -> Any:
    """Of a row all that says whether its keys are right: their names, what is nested, and what is null."""
    if isinstance(value, dict):
        return tuple([(key, outline(entry)) for key, entry in value.items()])
    return ("list", *dict.fromkeys(map(outline, value))) if isinstance(value, list) else value is None


def parse_line(line: bytes) -> dict[str, Any]:
    """The object in ``line``; raises ValueError if that is not UTF-8, not JSON, not an object."""
    try:
        row = parse_row(line.removeprefix(BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}") from None
    if type(row) is not dict:
        raise InputError(f"a JSON object is needed, not {type(row).__name__}")
    return row


class WrittenNumber(float):
    """A number of a JSON file that knows how it is written there."""

    written: str = ""

    @classmethod
    def parse(cls, text: str) -> WrittenNumber:
        number = cls(text)
        number.written = text
        return number


def parse_row(text: str) -> Any:
    """The value in ``text``, whose numbers know how they are written. Raises ValueError: not JSON, or an
    object has a key twice.
    """
    return reading.parse_json(
        text, "", parse_float=WrittenNumber.parse, parse_constant=WrittenNumber.parse, object_pairs_hook=_no_key_twice
    )


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise InputError(f"the key {show(twice)} is there twice in one object")
    return found


def _attempt(parse: Callable[[Any], dict[str, Any]], content: Any) -> dict[str, Any] | ValueError:
    try:
        return parse(content)
    except ValueError as error:
        return error


def _head(path: str) -> bytes:
    """What a file begins with, without white space."""
    if not os.path.isfile(path):
        return b""
    with open(path, "rb") as file:
        return b"".join(file.read(4096).removeprefix(BOM).split())


def refuse_array(path: str) -> None:
    """Raises ValueError if a file that should have one JSON object a line is one JSON array."""
    if _head(path).startswith(b"[{"):
        raise InputError(
            f"{path}: is a JSON array, not one JSON object a line; data.source = 'hf_dataset' reads it as it is, or convert it:"
            f" jq -c '.[]' {os.path.basename(path)} > lines.jsonl"
        )


def json_rows(path: str, *args: Any) -> IndexedRows:
    """A JSON list or JSON lines, whichever the file is; arguments as of ``IndexedRows``."""
    return (JsonList if _head(path).startswith(b"[") else JsonLines)(path, *args)
