"""LLaVA's JSON (Liu et al. 2023, "Visual Instruction Tuning"): conversations about images, or about none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kempnerforge.config import registry
from kempnerforge.config.data import FileConfig
from kempnerforge.config.errors import InputError
from kempnerforge.data.sample import Sample, SampleError, Text
from kempnerforge.data.sources.rows import json_rows
from kempnerforge.data.sources.table import RowSource, count_images, nested_size, require_columns

ROLES = {"human": "prompt", "user": "prompt", "gpt": "answer", "assistant": "answer", "system": "system"}


@registry.register_data_config
@dataclass
class LlavaConfig(FileConfig):
    """A JSON list, or one object a line: ``image`` (a path, a list of paths, or missing) and ``conversations``, a list of
    ``{from: human|gpt, value}``; ``messages`` with ``{role: user|assistant, content}`` is the same.

    Attributes:
        image_token: what marks the place of an image in the file; it becomes ``data.image_placeholder``.
        image_first: as LLaVA does it: images of the first question move to its head, each text behind them on a new line.
    """

    source: str = "llava"
    image_token: str = "<image>"
    image_first: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.image_token.strip():
            raise InputError(f"image_token = {self.image_token!r}: must not be blank")


@registry.register_source("llava")
class Llava(RowSource):
    """One sample per conversation, all of it one text. An answer in front of the first question is left out, as LLaVA does it, and so is a
    question at the end that nobody answers.
    """

    cfg: LlavaConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, cfg: LlavaConfig, split: str) -> None:
        super().__init__(cfg, split)
        self.rows = json_rows(self.path, self.key, _measure, (), cfg.max_bad_fraction)
        if "messages" not in self.rows.columns:
            require_columns(self.path, self.rows.columns, {"conversations": "data.source = 'llava'"})

    def sample(self, name: str, row: Mapping[str, Any]) -> Sample:
        text = self._conversation(row.get("conversations", row.get("messages")))
        if self.cfg.image_first:
            text = replace(text, prompt=_to_the_head(text.prompt, self.cfg.image_placeholder))
        return Sample(f"{name} ({row['id']})" if "id" in row else name, self.images_of(_images(row), "image"), (text,))

    def _conversation(self, entries: Any) -> Text:
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise SampleError("'conversations': must be a list of {from, value} objects")
        said = [self._said(entry) for entry in entries]
        system = "\n".join(value for role, value in said if role == "system")
        turns = [entry for entry in said if entry[0] != "system"]
        if turns and turns[0][0] == "answer":
            turns = turns[1:]
        if len(turns) % 2:
            turns = turns[:-1]
        if [role for role, _ in turns] != ["prompt", "answer"] * (len(turns) // 2):
            raise SampleError("'conversations': questions and answers do not alternate")
        if not turns:
            raise SampleError("'conversations': no question with an answer")
        values = [value for _, value in turns]
        pairs = list(zip(values[0::2], values[1::2], strict=True))
        return Text(*pairs[0], more=tuple(pairs[1:]), system=system)

    def _said(self, entry: dict[str, Any]) -> tuple[str, str]:
        role, value = entry.get("from", entry.get("role")), entry.get("value", entry.get("content"))
        if not isinstance(role, str) or role not in ROLES:
            raise SampleError(f"'conversations': {role!r} says something; known are {', '.join(ROLES)}")
        if not isinstance(value, str):
            raise SampleError(f"'conversations': what {role!r} says must be a string, not {type(value).__name__}")
        return ROLES[role], value.replace(self.cfg.image_token, self.cfg.image_placeholder)


def _images(row: Mapping[str, Any]) -> Any:
    return row.get("image", row.get("images"))


def _measure(row: Mapping[str, Any]) -> tuple[int, int]:
    return nested_size(row.get("conversations", row.get("messages"))), count_images(_images(row))


def _to_the_head(prompt: str, placeholder: str) -> str:
    count = prompt.count(placeholder)
    return f"{placeholder * count}\n{prompt.replace(placeholder, '').strip()}" if count else prompt
