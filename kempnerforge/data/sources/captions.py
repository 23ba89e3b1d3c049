"""Tables of images and captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kempnerforge.config import registry
from kempnerforge.config.checks import only_if
from kempnerforge.config.data import RowsConfig, is_csv
from kempnerforge.config.errors import InputError
from kempnerforge.data.sample import Sample, SampleError, Text
from kempnerforge.data.sources.hf_rows import open_rows
from kempnerforge.data.sources.table import RowSource, count_images, nested_size, require_columns


@registry.register_data_config
@dataclass
class CaptionsConfig(RowsConfig):
    """JSON lines or a JSON list, CSV, TSV, Parquet, or a directory of ``save_to_disk``: an image and one or several captions a row.

    Attributes:
        image_column: a path, or bytes.
        caption_columns: each holds a caption, a list of captions, or nothing. Several captions of an image share its tokens.
        prompt: what the model is asked for every caption; may be empty.
        quotes: whether fields of a CSV or TSV file may be quoted.
    """

    source: str = "captions"
    image_column: str = "image"
    caption_columns: list[str] = field(default_factory=lambda: ["caption"])
    prompt: str = ""
    quotes: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.caption_columns or not all(self.caption_columns):
            raise InputError(f"caption_columns = {self.caption_columns!r}: name at least one column")
        if not self.image_column:
            raise InputError("image_column = '': name the column of the image")
        only_if(self, is_csv(self.path) or is_csv(self.eval_path), "a CSV or TSV file, by path or eval_path,", "quotes")
        only_if(self, self.template != "plain", "a template other than 'plain', which leaves prompts out,", "prompt")


@registry.register_source("captions")
class Captions(RowSource):
    """One sample per row, a text per caption. Captions are text through and through: "<image>" in one is no place of an image."""

    cfg: CaptionsConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, cfg: CaptionsConfig, split: str) -> None:
        super().__init__(cfg, split)
        named = {cfg.image_column: "data.image_column", **dict.fromkeys(cfg.caption_columns, "data.caption_columns")}
        self.rows = open_rows(self, self._measure, cfg.caption_columns, cfg.image_column, cfg.quotes)
        require_columns(self.path, self.rows.columns, named)

    def _measure(self, row: Mapping[str, Any]) -> tuple[int, int]:
        return sum(nested_size(row.get(column)) for column in self.cfg.caption_columns), count_images(row.get(self.cfg.image_column))

    def sample(self, name: str, row: Mapping[str, Any]) -> Sample:
        images = self.images_of(row.get(self.cfg.image_column), self.cfg.image_column)
        if not images:
            raise SampleError(f"column {self.cfg.image_column!r}: no image")
        captions = [caption for column in self.cfg.caption_columns for caption in _captions(row.get(column), column)]
        if not captions:
            raise SampleError(f"no caption in {', '.join(map(repr, self.cfg.caption_columns))}")
        return Sample(name, images, tuple(Text(self.cfg.prompt, caption, leading=0) for caption in captions))


def _captions(value: Any, column: str) -> list[str]:
    """Those that are not empty."""
    entries = value if isinstance(value, list) else [value]
    wrong = next((entry for entry in entries if entry is not None and not isinstance(entry, str)), None)
    if wrong is not None:
        raise SampleError(f"column {column!r}: a caption must be a string, not {type(wrong).__name__}")
    return [entry for entry in entries if entry and entry.strip()]
