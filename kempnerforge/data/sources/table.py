"""Rows of named columns -> samples: what all sources of files share."""

from __future__ import annotations

import os
import re
from abc import abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from kempnerforge.config.data import DataConfig, FileConfig, Splits, TableConfig
from kempnerforge.config.errors import InputError
from kempnerforge.data.sample import ImageSource, Sample, SampleError, Source, Text
from kempnerforge.data.sources.rows import Rows

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def resolve_image(value: str, root: str) -> Path:
    """The file that a row means by ``value``. Rows come from anywhere, so they may name files below ``root`` only.

    Args:
        value: a path, relative to ``root`` or absolute below it.
        root: an absolute directory without links in it.

    Raises:
        SampleError: the path leaves ``root`` (also through a link), or is a URL, which would be fetched from wherever it says.
    """
    if not value or "\0" in value:
        raise SampleError(f"image path {value!r}: empty or with a NUL character")
    if URL.match(value):
        raise SampleError(f"image {value[:200]!r}: URLs are not fetched; name a file below data.root")
    try:
        path = os.path.realpath(os.path.join(root, value))
    except (OSError, ValueError) as error:
        raise SampleError(f"image path {value!r}: {error}") from None
    if os.path.commonpath((root, path)) != root:
        raise SampleError(f"image path {value!r} leaves the data root {root}")
    return Path(path)


class FileSource(Source):
    """A source whose samples are rows, of a file or something like it. Subclasses give ``row`` and what a row means."""

    cfg: FileConfig

    def __init__(self, cfg: FileConfig, split: str) -> None:
        super().__init__(cfg, split)
        self.path = cfg.path if split == "train" or not cfg.eval_path else cfg.eval_path
        self.key = "path" if self.path == cfg.path else "eval_path"
        beside = self.path if os.path.isdir(self.path) else os.path.dirname(self.path)
        self.root = os.path.realpath(cfg.root or beside or ".")

    @classmethod
    def has(cls, cfg: DataConfig, split: str) -> bool:
        assert isinstance(cfg, FileConfig)
        return split == "train" or bool(cfg.eval_path) or (isinstance(cfg, Splits) and bool(cfg.eval_split))

    @property
    def split_name(self) -> str:
        """The split to read, of a dataset that has some. Raises ValueError: training and held-out rows would be the same."""
        if not isinstance(self.cfg, Splits):
            return ""
        asked = self.cfg.eval_split if self.split == "test" else ""
        if asked and os.path.isfile(self.path):
            raise InputError(f"data.eval_split = {asked!r}: {self.path} is a file and has no splits; name held-out rows by data.eval_path")
        if asked == self.cfg.split and self.path == self.cfg.path:
            raise InputError(f"data.eval_split = {asked!r}: is data.split, so training rows would be evaluated on")
        return asked or self.cfg.split

    @abstractmethod
    def row(self, index: int) -> Mapping[str, Any]:
        """Row ``index``, with at least the columns that are needed."""

    @abstractmethod
    def row_id(self, index: int) -> str:
        """Where row ``index`` is, for messages."""

    @abstractmethod
    def sample(self, name: str, row: Mapping[str, Any]) -> Sample:
        """What a row means. Raises SampleError: it means nothing usable."""

    def __getitem__(self, index: int) -> Sample:
        name = self.row_id(index)
        try:
            return self.sample(name, self.row(index))
        except SampleError as error:
            raise SampleError(f"{name}: {error}") from None

    def images_of(self, value: Any, column: str) -> tuple[ImageSource, ...]:
        """The images that a row's ``value`` names: a path, bytes, an undecoded image of `datasets`, a list of these, or None.

        Raises:
            SampleError: it names none, or one outside the data root.
        """
        if value is None:
            return ()
        if isinstance(value, list):
            return tuple(image for entry in value for image in self.images_of(entry, column))
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if isinstance(value, bytes):
            return (value,)
        if isinstance(value, str):
            return (resolve_image(value, self.root),)
        raise SampleError(f"column {column!r}: an image is a path or bytes, not {type(value).__name__}")


class RowSource(FileSource):
    """A ``FileSource`` with ``rows`` to read from."""

    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Mapping[str, Any]:
        return self.rows[index]

    def row_id(self, index: int) -> str:
        return self.rows.name(index)

    def length(self, index: int) -> int:
        return self.rows.length(index)

    def num_images(self, index: int) -> int:
        return self.rows.num_images(index)

    def fingerprint(self) -> str:
        return self.rows.fingerprint()


class TableSource(FileSource):
    """Rows with an image and texts in columns that ``cfg`` names."""

    cfg: TableConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, cfg: TableConfig, split: str) -> None:
        super().__init__(cfg, split)
        self.text_columns = [cfg.texts_column] if cfg.texts_column else [c for c in (cfg.prompt_column, cfg.answer_column) if c]
        self.columns = self.text_columns + ([cfg.image_column] if cfg.image_column else [])

    def sample(self, name: str, row: Mapping[str, Any]) -> Sample:
        images = self.images_of(_value(row, self.cfg.image_column), self.cfg.image_column) if self.cfg.image_column else ()
        return Sample(name, images, self.texts_of(row))

    def measure(self, row: Mapping[str, Any]) -> tuple[int, int]:
        """Characters of texts, and images of a row."""
        characters = sum(nested_size(row.get(column)) for column in self.text_columns)
        return characters, count_images(row.get(self.cfg.image_column)) if self.cfg.image_column else 0

    def require_columns(self, where: str, there: Collection[str]) -> None:
        """As the function, of the configured columns."""
        keys = {getattr(self.cfg, key): f"data.{key}" for key in ("texts_column", "answer_column", "prompt_column", "image_column")}
        require_columns(where, there, {column: keys[column] for column in self.columns})

    def texts_of(self, row: Mapping[str, Any]) -> tuple[Text, ...]:
        cfg = self.cfg
        if not cfg.texts_column:
            prompt = _value(row, cfg.prompt_column) if cfg.prompt_column else ""
            return (make_text(prompt, _value(row, cfg.answer_column), cfg.prompt_column, cfg.answer_column),)
        entries = _value(row, cfg.texts_column)
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            raise SampleError(f"column {cfg.texts_column!r}: must be a list of {{prompt, answer}} objects")
        return tuple(make_text(entry.get("prompt") or "", entry.get("answer"), "prompt", "answer") for entry in entries)


def require_columns(where: str, there: Collection[str], needed: Mapping[str, str]) -> None:
    """Raises ValueError if a column of ``needed`` (column -> the key that needs it) is not ``there``; ``where`` is the file."""
    if missing := [f"{column!r} for {key}" for column, key in needed.items() if column not in there]:
        raise InputError(f"{where}: no column {', '.join(missing)}; columns: {', '.join(sorted(there)[:20]) or 'none'}")


def _value(row: Mapping[str, Any], column: str) -> Any:
    try:
        return row[column]
    except KeyError:
        raise SampleError(f"has no column {column!r}") from None


def make_text(prompt: Any, answer: Any, prompt_column: str, answer_column: str) -> Text:
    """A text of one turn; raises SampleError for what is no string, or nothing to train."""
    for column, value in ((prompt_column, prompt), (answer_column, answer)):
        if not isinstance(value, str):
            raise SampleError(f"column {column!r}: must be a string, not {type(value).__name__}")
    if not answer.strip():
        raise SampleError(f"column {answer_column!r}: empty answer")
    return Text(prompt, answer)


def nested_size(value: Any) -> int:
    """Characters of all strings in ``value``."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(nested_size(entry) for entry in value)
    return sum(nested_size(entry) for entry in value.values()) if isinstance(value, dict) else 0


def count_images(value: Any) -> int:
    """Images that a row's ``value`` names, as ``TableSource`` reads it."""
    return sum(count_images(entry) for entry in value) if isinstance(value, list) else int(value is not None)
