"""Rows of named columns -> samples: what all sources of files share."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar

from kempnerforge.config.data import DataConfig, FileConfig, Splits, TableConfig
from kempnerforge.data.sample import ConvertedText, ImageSource, Sample, SampleError, Text
from kempnerforge.data.source import Source
from kempnerforge.data.sources.keys import (
    ANSWER,
    ANSWERS,
    HINTS,
    ID,
    IMAGES,
    PART,
    PROMPTS,
    TEXTS,
    Ignoring,
    Keys,
    filled_keys,
    refuse,
    unknown_keys,
)
from kempnerforge.data.sources.pictures import count_images, images_of
from kempnerforge.data.sources.row_text import Content, as_text, images_of_row, make_text, nested_size, read_content
from kempnerforge.data.sources.rows import Rows
from kempnerforge.util.errors import InputError, cut
from kempnerforge.util.reading import regular

JUDGED_ROWS = 64
"""Rows whose keys are judged at the start, where not all rows are read then."""
COLUMNS_SHOWN = 20
ADVICE = {"image_column": "write null for a row without images", "prompt_column": 'write "" for a row without a prompt'}
"""For rows that have no such column."""
ENTRY: Keys = {**dict.fromkeys(PROMPTS, PART), **dict.fromkeys(ANSWERS, ANSWER)}
"""Of an entry of ``texts``."""


class FileSource(Source):
    """A source whose samples are rows, of a file or something like it. Subclasses give ``row``, ``known`` and
    what a row means.

    Attributes:
        known: the keys that are read, or belong to the format.
        ignored: whether ``data.ignore_columns`` has a key.
    """

    from_files = True
    cfg: FileConfig
    known: Keys

    def __init__(self, cfg: FileConfig, split: str) -> None:
        super().__init__(cfg, split)
        self.path = cfg.path if split == "train" or not cfg.eval_path else cfg.eval_path
        self.key = "path" if self.path == cfg.path else "eval_path"
        if not os.path.isdir(self.path):
            regular(self.path, f"data.{self.key}")
        beside = self.path if os.path.isdir(self.path) else os.path.dirname(self.path)
        self.root = os.path.realpath(cfg.root or beside or ".")
        self.ignored = Ignoring(tuple(cfg.ignore_columns))

    @classmethod
    def has(cls, cfg: DataConfig, split: str) -> bool:
        assert isinstance(cfg, FileConfig)
        return split == "train" or bool(cfg.eval_path) or (isinstance(cfg, Splits) and bool(cfg.eval_split))

    @property
    def split_name(self) -> str:
        """The split to read, of a dataset that has some. Raises ValueError: training and held-out rows would
        be the same.
        """
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

    def row_key(self, row: Mapping[str, Any]) -> str:
        """The id that ``row`` has; empty if it has none."""
        return "" if ID not in self.known or row.get(ID) is None or self.ignored.takes_out(ID) else cut(str(row[ID]))

    def problems(self, row: Mapping[str, Any]) -> Iterator[str]:
        """What is wrong with the keys of ``row``."""
        return unknown_keys(row, self.known, self.ignored)

    def judge_keys(self, row: Callable[[int], Mapping[str, Any]], count: int) -> None:
        """Raises InputError if the keys of one of the first rows, of ``count``, are wrong."""
        found: dict[str, None] = {}
        for index in range(min(count, JUDGED_ROWS)):
            try:
                found.update(dict.fromkeys(self.problems(row(index))))
            except SampleError:
                continue
        refuse(self.path, found)

    def judge_schema(self, example: Mapping[str, Any], where: str) -> None:
        """Raises InputError if a key of rows like ``example`` is read by nothing; ``where`` is the file."""
        refuse(where, dict.fromkeys(unknown_keys(example, self.known, self.ignored, schema=True)))

    def __getitem__(self, index: int) -> Sample:
        name = self.row_id(index)
        try:
            row = self.row(index)
            for problem in self.problems(row):
                raise SampleError(problem)
            key = self.row_key(row)
            return replace(self.sample(f"{name} ({key})" if key else name, row), key=key)
        except SampleError as error:
            raise SampleError(f"{name}: {error}") from None

    def images_of(self, value: Any, column: str) -> tuple[ImageSource, ...]:
        """The images that a row's ``value`` names; raises SampleError: it names none, or one outside the data
        root.
        """
        return images_of(value, column, self.root, self.cfg.follow_links)

    def ignoring(self) -> Iterator[Ignoring]:
        yield self.ignored

    def content(self, value: Any, where: str) -> Content:
        """As ``read_content``, with the images of this source."""
        return read_content(value, where, self.cfg.image_placeholder, lambda image: self.images_of(image, where))

    def images_in(self, row: Mapping[str, Any], names: Sequence[str] = IMAGES) -> tuple[ImageSource, ...]:
        """The images of the one of the columns ``names`` that has any; raises SampleError: two have."""
        filled = filled_keys(row, names, self.ignored)
        if len(filled) > 1:
            raise SampleError(f"{' and '.join(map(repr, filled))} are both there; one of them must be null, or in data.ignore_columns")
        return self.images_of(row[filled[0]], filled[0]) if filled else ()


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
    """Rows with an image and texts in columns that ``cfg`` names, or that have one of the usual names.

    Attributes:
        text_columns, image_columns: all that may be read.
        usual: whether the usual names count.
    """

    cfg: TableConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    usual: ClassVar[bool] = True

    def __init__(self, cfg: TableConfig, split: str) -> None:
        super().__init__(cfg, split)
        texts, flat = cfg.texts_column, not cfg.texts_column
        any_of = lambda names: [name for name in names if self.usual and not self.ignored.takes_out(name)]
        self._prompts = [cfg.prompt_column] if cfg.prompt_column else any_of(PROMPTS) if flat else []
        self._answers = [cfg.answer_column] if cfg.answer_column else any_of(ANSWERS) if flat else []
        self._texts = [texts] if texts else any_of([TEXTS]) if not (cfg.prompt_column or cfg.answer_column) else []
        self.text_columns = [*self._texts, *self._prompts, *self._answers]
        self.image_columns = list(IMAGES) if self.usual and cfg.image_column == IMAGES[0] else [c for c in (cfg.image_column,) if c]
        flat_keys: Keys = {**dict.fromkeys(self._prompts, PART), **dict.fromkeys(self._answers, ANSWER)}
        self.known = {**dict.fromkeys(self.image_columns), **flat_keys, **dict.fromkeys(self._texts, ENTRY), ID: None}
        self._prompted = bool(cfg.prompt_column)

    @property
    def columns(self) -> list[str]:
        return [*self.text_columns, *self.image_columns, ID]

    def sample(self, name: str, row: Mapping[str, Any]) -> Sample:
        texts, inside = self._texts_of(row)
        return Sample(name, images_of_row(self._images(row), inside, " or ".join(map(repr, self.image_columns))), texts)

    def _images(self, row: Mapping[str, Any]) -> tuple[ImageSource, ...]:
        if self.image_columns and not any(column in row for column in self.image_columns):
            raise SampleError(f"has no column {self.cfg.image_column!r}")
        return self.images_in(row, self.image_columns)

    def measure(self, row: Mapping[str, Any]) -> tuple[int, int]:
        """Characters of texts, and images of a row."""
        characters = sum(nested_size(row.get(column)) for column in self.text_columns)
        return characters, sum(count_images(row.get(column)) for column in self.image_columns)

    def problems(self, row: Mapping[str, Any]) -> Iterator[str]:
        return chain(unknown_keys(row, self.known, self.ignored), self._conflicts(row))

    def _conflicts(self, row: Mapping[str, Any]) -> Iterator[str]:
        texts = filled_keys(row, self._texts, self.ignored)
        flat = filled_keys(row, [*self._prompts, *self._answers], self.ignored)
        if texts and flat:
            yield f"{texts[0]!r} and {', '.join(map(repr, flat))} are both there; name what is read, by data.texts_column or data.answer_column"
        yield from conflicts(row, self._prompts, self._answers, self.ignored)
        entries = row.get(texts[0]) if texts else None
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, dict):
                yield from conflicts(entry, PROMPTS, ANSWERS, self.ignored, f"{texts[0]}.")

    def require_columns(self, where: str, columns: Collection[str], rows: Rows | None = None) -> None:
        """Raises ValueError if there are no columns for what the config needs, or too many ``rows`` lack
        them; ``where`` is the file.
        """
        cfg = self.cfg
        wanted = [(self.image_columns, "image_column")]
        if cfg.texts_column:
            wanted.append((self._texts, "texts_column"))
        else:
            wanted += [(self._answers + ([] if cfg.answer_column else self._texts), "answer_column")]
            wanted += [(self._prompts, "prompt_column")] if cfg.prompt_column else []
        needed = {" or ".join(map(repr, names)): f"data.{key}" for names, key in wanted if names and not set(names) & set(columns)}
        if needed:
            raise missing_columns(where, needed, columns)
        self._prompted = bool(cfg.prompt_column) or any(name in columns for name in self._prompts)
        wanted += [(self._prompts, "prompt_column")] if self._prompted and not set(self._texts) & set(columns) else []
        if rows is not None:
            for names, key in wanted:
                if names:
                    rows.require(names, ADVICE.get(key, "leave such rows out"))
            rows.judge(self)

    def texts_of(self, row: Mapping[str, Any]) -> tuple[Text, ...]:
        """The texts of a row; raises SampleError: it has none."""
        return self._texts_of(row)[0]

    def _texts_of(self, row: Mapping[str, Any]) -> tuple[tuple[Text, ...], tuple[ImageSource | int, ...]]:
        """The texts of a row, and the images in their content lists."""
        column = self.cfg.texts_column or next(iter(filled_keys(row, self._texts, self.ignored)), "")
        if not column:
            text, images = self._text(row, self._prompts, self._answers, "", self._prompted)
            return (text,), images
        entries = _value(row, column)
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            what = "is null" if entries is None else "must be a list of {prompt, answer} objects"
            raise SampleError(f"column {column!r}: {what}")
        found = [self._text(entry, PROMPTS, ANSWERS, f"{column}.", False) for entry in entries]
        if len(found) > 1 and any(images for _, images in found):
            raise SampleError(f"column {column!r}: several texts of which one brings its own images")
        return tuple(text for text, _ in found), tuple(chain.from_iterable(images for _, images in found))

    def _text(
        self, row: Mapping[str, Any], prompts: Sequence[str], answers: Sequence[str], above: str, prompted: bool
    ) -> tuple[Text, tuple[ImageSource | int, ...]]:
        """The text of a row, or of an entry of ``texts``, and its images. ``prompted``: it must have a
        prompt.
        """
        asked, images = self._prompt(row, prompts, above, prompted)
        answer = next(iter(filled_keys(row, answers, self.ignored, above)), None)
        if answer is None:
            raise SampleError(_lacking(row, answers, above))
        value, pictures = self.content(row[answer], f"column {above + answer!r}")
        text = make_text(asked, value, above + prompts[0] if prompts else "", above + answer)
        if pictures and text.listed:
            raise SampleError(f"column {above + answer!r}: several answers beside images in them")
        return text, (*images, *pictures)

    def _prompt(self, row: Mapping[str, Any], names: Sequence[str], above: str, needed: bool) -> tuple[str, tuple[ImageSource | int, ...]]:
        found = filled_keys(row, names, self.ignored, above)
        if not found and needed:
            raise SampleError(_lacking(row, names, above))
        if not found:
            return (ConvertedText("", "null") if any(name in row for name in names) else ""), ()
        pieces = [self.content(row[name], f"column {above + name!r}") for name in found]
        texts = [as_text(value, f"column {above + name!r}") for name, (value, _) in zip(found, pieces, strict=True)]
        written = texts[0] if len(texts) == 1 else "\n".join(filter(None, texts))
        return written, tuple(chain.from_iterable(images for _, images in pieces))


def conflicts(row: Mapping[str, Any], prompts: Sequence[str], answers: Sequence[str], ignored: Ignoring, above: str = "") -> Iterator[str]:
    """Says which keys of ``row`` could all be its prompt, or its answer."""
    for names, what in ((prompts, "prompt"), (answers, "answer")):
        found = filled_keys(row, names, ignored, above)
        if len(found) > 1 and found != ["instruction", "input"]:
            shown = " and ".join(repr(above + name) for name in found)
            yield f"{shown} could each be the {what}; name one in data.{what}_column, or list the others in data.ignore_columns"


def missing_columns(where: str, needed: Mapping[str, str], columns: Collection[str]) -> InputError:
    """The error that columns (as shown, with the key that needs each) are not among ``columns``; ``where`` is
    the file.
    """
    shown = ", ".join(cut(str(name)) for name in sorted(columns)[:COLUMNS_SHOWN]) or "none"
    hint = next((f"; {HINTS[name]}" for name in sorted(columns) if name in HINTS), "")
    return InputError(
        f"{where}: no column {', '.join(f'{column} for {key}' for column, key in needed.items())}; columns: {cut(shown, 400)}{hint}"
    )


def require_columns(where: str, columns: Collection[str], needed: Mapping[str, str]) -> None:
    """Raises ValueError if a column of ``needed`` (column -> the key that needs it) is not among ``columns``;
    ``where`` is the file.
    """
    if missing := {repr(column): key for column, key in needed.items() if column not in columns}:
        raise missing_columns(where, missing, columns)


def _value(row: Mapping[str, Any], column: str) -> Any:
    try:
        return row[column]
    except KeyError:
        raise SampleError(f"has no column {column!r}") from None


def _lacking(row: Mapping[str, Any], names: Sequence[str], above: str) -> str:
    null = next((name for name in names if name in row), None)
    return f"column {above + null!r} is null" if null is not None else f"has no column {' or '.join(repr(above + n) for n in names)}"
