"""FineVision (Wiedmann et al. 2025, "FineVision: Open Data Is All You Need"): conversations about images with
ratings of each turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kempnerforge.config import registry
from kempnerforge.config.data import Splits
from kempnerforge.data.sample import Sample, SampleError, Text
from kempnerforge.data.sources.hf_rows import open_rows
from kempnerforge.data.sources.keys import ID
from kempnerforge.data.sources.row_text import as_text, nested_size
from kempnerforge.data.sources.table import RowSource, require_columns

RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")
TEXTS, IMAGES = "texts", "images"


@registry.register_data_config
@dataclass
class FineVisionConfig(Splits):
    """A Hugging Face dataset with the columns ``images``, ``texts`` (a list of ``{user, assistant}``; in The
    Cauldron with ``source``) and, if it has them, ``relevance_ratings``, ``image_correspondence_ratings``,
    ``visual_dependency_ratings`` and ``formatting_ratings``, one per turn.

    Attributes:
        relevance_min_rating, image_correspondence_min_rating: turns rated below are left out; turns without a
            rating stay.
        visual_dependency_min_rating, formatting_min_rating: the same for the other two ratings.
        images_in_prompt: images are at the head of the first question, inside the template (nanoVLM), and not
            in front of everything.
    """

    source: str = "finevision"
    relevance_min_rating: int = 1
    image_correspondence_min_rating: int = 1
    visual_dependency_min_rating: int = 1
    formatting_min_rating: int = 1
    images_in_prompt: bool = False

    def least(self) -> dict[str, int]:
        """The lowest rating that a turn may have, by column."""
        lowest = (
            self.relevance_min_rating,
            self.image_correspondence_min_rating,
            self.visual_dependency_min_rating,
            self.formatting_min_rating,
        )
        return dict(zip((f"{rating}_ratings" for rating in RATINGS), lowest, strict=True))


@registry.register_source("finevision")
class FineVision(RowSource):
    """One sample per row, its turns one conversation. "<image>" in a text is text."""

    cfg: FineVisionConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, cfg: FineVisionConfig, split: str) -> None:
        super().__init__(cfg, split)
        measure = lambda row: (nested_size(row.get(TEXTS)), 0)
        about = [f"{rating}_{what}" for rating in RATINGS for what in ("ratings", "min")]
        self.known = {IMAGES: None, TEXTS: {"user": None, "assistant": None, "source": None}, **dict.fromkeys((*about, "source", ID))}
        self.rows = open_rows(self, measure, [TEXTS], [IMAGES], others=[*cfg.least(), ID])
        require_columns(self.path, self.rows.columns, {TEXTS: "data.source = 'finevision'", IMAGES: "data.source = 'finevision'"})
        self.rows.judge(self)

    def sample(self, name: str, row: Mapping[str, Any]) -> Sample:
        images = self.images_of(row.get(IMAGES), IMAGES)
        turns = _turns(row.get(TEXTS))
        kept = [turn for k, turn in enumerate(turns) if self._good(row, k, len(turns))]
        if not kept:
            raise SampleError(f"none of {len(turns)} turns is rated high enough" if turns else "no turns")
        (first, answer), *more = [(as_text(turn.get("user"), "column 'user'"), _answer(turn)) for turn in kept]
        return Sample(name, images, (Text(first, answer, tuple(more), leading=len(images) if self.cfg.images_in_prompt else 0),))

    def _good(self, row: Mapping[str, Any], turn: int, turns: int) -> bool:
        for column, least in self.cfg.least().items():
            ratings = row.get(column)
            if ratings is None:
                continue
            if not isinstance(ratings, list) or len(ratings) != turns:
                raise SampleError(f"column {column!r}: must hold a rating for each of {turns} turns")
            if not isinstance(ratings[turn], int | float | None):
                raise SampleError(f"column {column!r}: a rating must be a number, not {type(ratings[turn]).__name__}")
            if ratings[turn] is not None and ratings[turn] < least:
                return False
        return True


def _answer(turn: Mapping[str, Any]) -> str:
    answer = as_text(turn.get("assistant"), "column 'assistant'")
    if not answer.strip():
        raise SampleError("column 'assistant': empty answer")
    return answer


def _turns(value: Any) -> list[Mapping[str, Any]]:
    """A list of {user, assistant}, which older versions of `datasets` give as {user: [...], assistant:
    [...]}.
    """
    if isinstance(value, dict):
        columns = [value.get("user"), value.get("assistant")]
        if not all(isinstance(column, list) for column in columns) or len({len(column or ()) for column in columns}) != 1:
            raise SampleError(f"column {TEXTS!r}: must be a list of {{user, assistant}} objects")
        return [{"user": user, "assistant": assistant} for user, assistant in zip(*columns, strict=True)]  # type: ignore[arg-type]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise SampleError(f"column {TEXTS!r}: must be a list of {{user, assistant}} objects")
    return value
