"""Rows of named columns -> samples; what JSONL files and Hugging Face datasets share."""

from __future__ import annotations

import os
import re
from abc import abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from kempnerforge.config.data import DataConfig, TableConfig
from kempnerforge.data.sample import ImageSource, Sample, SampleError, Source, Text

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


class TableSource(Source):
    """A source whose samples are rows. Subclasses set ``path`` and give ``row``.

    Args:
        cfg: names the columns.
        split: "train" or "test".
    """

    cfg: TableConfig

    def __init__(self, cfg: TableConfig, split: str) -> None:
        super().__init__(cfg, split)
        self.path = cfg.path if split == "train" or not cfg.eval_path else cfg.eval_path
        beside = self.path if os.path.isdir(self.path) else os.path.dirname(self.path)
        self.root = os.path.realpath(cfg.root or beside or ".")
        self.text_columns = [cfg.texts_column] if cfg.texts_column else [c for c in (cfg.prompt_column, cfg.answer_column) if c]
        self.columns = self.text_columns + ([cfg.image_column] if cfg.image_column else [])

    @classmethod
    def has(cls, cfg: DataConfig, split: str) -> bool:
        assert isinstance(cfg, TableConfig)
        return split == "train" or bool(cfg.eval_path)

    @abstractmethod
    def row(self, index: int) -> Mapping[str, Any]:
        """The values of ``self.columns`` in row ``index``."""

    @abstractmethod
    def row_id(self, index: int) -> str:
        """Where row ``index`` is, for messages."""

    def __getitem__(self, index: int) -> Sample:
        name = self.row_id(index)
        try:
            row = self.row(index)
            images = self._images(row[self.cfg.image_column]) if self.cfg.image_column else ()
            return Sample(name, images, self._texts(row))
        except SampleError as error:
            raise SampleError(f"{name}: {error}") from None

    def require_columns(self, available: Collection[str], where: str) -> None:
        """
        Raises:
            ValueError: a configured column is not among ``available``.
        """
        keys = ("image_column", "prompt_column", "answer_column", "texts_column")
        missing = [
            f"data.{key} = {getattr(self.cfg, key)!r}" for key in keys if getattr(self.cfg, key) in set(self.columns) - set(available)
        ]
        if missing:
            raise ValueError(f"{where}: no column for {', '.join(missing)}; columns: {', '.join(sorted(available)) or 'none'}")

    def _texts(self, row: Mapping[str, Any]) -> tuple[Text, ...]:
        cfg = self.cfg
        if not cfg.texts_column:
            prompt = row[cfg.prompt_column] if cfg.prompt_column else ""
            return (make_text(prompt, row[cfg.answer_column], cfg.prompt_column, cfg.answer_column),)
        entries = row[cfg.texts_column]
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            raise SampleError(f"column {cfg.texts_column!r}: must be a list of {{prompt, answer}} objects")
        return tuple(make_text(entry.get("prompt") or "", entry.get("answer"), "prompt", "answer") for entry in entries)

    def _images(self, value: Any) -> tuple[ImageSource, ...]:
        if value is None:
            return ()
        if isinstance(value, list):
            return tuple(image for entry in value for image in self._images(entry))
        if isinstance(value, dict):  # an undecoded Image feature of `datasets`
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if isinstance(value, bytes):
            return (value,)
        if isinstance(value, str):
            return (resolve_image(value, self.root),)
        raise SampleError(f"column {self.cfg.image_column!r}: an image is a path or bytes, not {type(value).__name__}")


def make_text(prompt: Any, answer: Any, prompt_column: str, answer_column: str) -> Text:
    """
    Raises:
        SampleError: not strings, or nothing to train.
    """
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
