"""JSONL: one JSON object a line."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kempnerforge.config import registry
from kempnerforge.config.data import JsonlConfig
from kempnerforge.data.sample import SampleError
from kempnerforge.data.sources.table import TableSource, count_images, nested_size

BOM = b"\xef\xbb\xbf"
SHOWN_LINES = 5


@registry.register_source("jsonl")
class Jsonl(TableSource):
    """Rows of a JSONL file. All lines are read once and judged; afterwards only where each begins and its size is kept.

    Raises:
        ValueError: no such file, no rows, lines that are not JSON objects (named by number), rows without a configured column.
    """

    def __init__(self, cfg: JsonlConfig, split: str) -> None:
        super().__init__(cfg, split)
        self._offsets, self._lengths, self._numbers, self._num_images = array("q"), array("q"), array("q"), array("q")
        bad: list[tuple[int, str]] = []
        lacking: Counter[str] = Counter()
        available: set[str] = set()
        try:
            with open(self.path, "rb") as file:
                offset = 0
                for number, line in enumerate(file, 1):
                    begin, offset = offset, offset + len(line)
                    if not line.removeprefix(BOM if number == 1 else b"").strip():
                        continue
                    try:
                        row = _parse(line)
                    except ValueError as error:
                        bad.append((number, str(error)))
                        continue
                    available.update(row)
                    lacking.update(set(self.columns) - set(row))
                    self._offsets.append(begin)
                    self._numbers.append(number)
                    self._lengths.append(sum(nested_size(row.get(column)) for column in self.text_columns))
                    self._num_images.append(count_images(row.get(cfg.image_column)) if cfg.image_column else 0)
        except OSError as error:
            key = "path" if self.path == cfg.path else "eval_path"
            raise ValueError(f"data.{key} = {self.path!r}: {error.strerror or error}") from None
        if bad:
            shown = "; ".join(f"line {number}: {reason}" for number, reason in bad[:SHOWN_LINES])
            raise ValueError(f"{self.path}: {len(bad)} bad lines: {shown}")
        if not self._offsets:
            raise ValueError(f"{self.path}: no rows")
        self.require_columns(available, self.path)
        if lacking:
            column, count = lacking.most_common(1)[0]
            raise ValueError(f"{self.path}: {count} of {len(self)} rows have no column {column!r}; write null for a row without images")

    def __len__(self) -> int:
        return len(self._offsets)

    def length(self, index: int) -> int:
        return self._lengths[index]

    def num_images(self, index: int) -> int:
        return self._num_images[index]

    def row_id(self, index: int) -> str:
        return f"{Path(self.path).name}:{self._numbers[index]}"

    def row(self, index: int) -> Mapping[str, Any]:
        try:
            with open(self.path, "rb") as file:  # opened anew: an offset shared with forked workers would move under them
                file.seek(self._offsets[index])
                row = _parse(file.readline())
        except (OSError, ValueError) as error:
            raise SampleError(f"no longer readable: {error}") from None
        if not set(self.columns) <= set(row):
            raise SampleError("has lost a column since it was first read")
        return row


def _parse(line: bytes) -> dict[str, Any]:
    """
    Raises:
        ValueError: not UTF-8, not JSON, not an object.
    """
    try:
        row = json.loads(line.removeprefix(BOM).decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    if type(row) is not dict:
        raise ValueError(f"a JSON object is needed, not {type(row).__name__}")
    return row
