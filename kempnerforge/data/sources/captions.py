"""Tables of images and captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kempnerforge.config import registry
from kempnerforge.config.checks import only_if
from kempnerforge.config.data import RowsConfig, is_csv
from kempnerforge.data.sample import Sample, SampleError, Text
from kempnerforge.data.sources.hf_rows import open_rows
from kempnerforge.data.sources.keys import ANSWERS, IMAGES, METADATA, filled_keys, unknown_keys
from kempnerforge.data.sources.pictures import count_images
from kempnerforge.data.sources.row_text import as_text, nested_size
from kempnerforge.data.sources.table import RowSource, require_columns
from kempnerforge.util.errors import InputError

DEFAULT = ("caption",)
USUAL = ("captions", *(name for name in ANSWERS if name not in DEFAULT))
COCO = (
    *("file_name", "license", "coco_url", "flickr_url", "date_captured", "image_id", "caption_id"),
    *("split", "filename", "filepath", "imgid", "img_id", "cocoid", "sentids"),
)
"""What COCO and its splits (Karpathy and Fei-Fei 2015; Flickr30k, too) have beside images and captions."""


@registry.register_data_config
@dataclass
class CaptionsConfig(RowsConfig):
    """JSON lines or a JSON list, CSV, TSV, Parquet, or a directory of ``save_to_disk``: an image and one or
    several captions a row.

    Attributes:
        image_column: a path, bytes or base64. "image" finds "images" as well.
        caption_columns: each holds a caption, a list of captions, or nothing. Several captions of an image
            share its tokens. If there is no "caption" the default finds "captions" or one of the usual names
            of answers.
        prompt: what the model is asked for every caption; may be empty.
        quotes: whether fields of a CSV or TSV file may be quoted.
    """

    source: str = "captions"
    image_column: str = "image"
    caption_columns: list[str] = field(default_factory=lambda: list(DEFAULT))
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
    """One sample per row, a text per caption. Captions are text through and through: "<image>" in one is no
    place of an image.
    """

    captions = True
    cfg: CaptionsConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, cfg: CaptionsConfig, split: str) -> None:
        super().__init__(cfg, split)
        self._usual = [name for name in USUAL if not self.ignored.takes_out(name)] if tuple(cfg.caption_columns) == DEFAULT else []
        self._images = list(IMAGES) if cfg.image_column == IMAGES[0] else [cfg.image_column]
        columns = [*cfg.caption_columns, *self._usual]
        self.known = dict.fromkeys((*self._images, *columns, *METADATA, *COCO))
        self.rows = open_rows(self, self._measure, columns, self._images, cfg.quotes)
        present = self.rows.columns
        if not set(self._images) & set(present) or not (set(self._usual) & set(present) or set(cfg.caption_columns) <= set(present)):
            named = {cfg.image_column: "data.image_column", **dict.fromkeys(cfg.caption_columns, "data.caption_columns")}
            require_columns(self.path, present, named)
        self.rows.judge(self)

    def problems(self, row: Mapping[str, Any]) -> Iterator[str]:
        yield from unknown_keys(row, self.known, self.ignored)
        captions = filled_keys(row, (*self.cfg.caption_columns, *self._usual) if self._usual else (), self.ignored)
        if len(captions) > 1:
            yield f"{' and '.join(map(repr, captions))} could each be the caption; name one or all in data.caption_columns"

    def _columns(self, row: Mapping[str, Any]) -> list[str]:
        return filled_keys(row, self._usual, self.ignored) or self.cfg.caption_columns

    def _measure(self, row: Mapping[str, Any]) -> tuple[int, int]:
        images = sum(count_images(row.get(column)) for column in self._images)
        return sum(nested_size(row.get(column)) for column in self._columns(row)), images

    def sample(self, name: str, row: Mapping[str, Any]) -> Sample:
        images = self.images_in(row, self._images)
        if not images:
            raise SampleError(f"column {self.cfg.image_column!r}: no image")
        columns = self._columns(row)
        captions = [caption for column in columns for caption in _captions(row.get(column), column)]
        if not captions:
            null = " (null)" if all(row.get(column) is None for column in columns) else ""
            raise SampleError(f"no caption in {', '.join(map(repr, columns))}{null}")
        return Sample(name, images, tuple(Text(self.cfg.prompt, caption, leading=0) for caption in captions))


def _captions(value: Any, column: str) -> list[str]:
    """Those that are not empty; raises SampleError for a null in a list."""
    if value is None:
        return []
    return [text for entry in (value if isinstance(value, list) else [value]) if (text := as_text(entry, f"column {column!r}")).strip()]
