"""LLaVA's JSON (Liu et al. 2023, "Visual Instruction Tuning"): conversations about images, or about none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from kempnerforge.config import registry
from kempnerforge.config.data import RowsConfig, is_file_of_rows
from kempnerforge.data.sample import ImageSource, Sample, SampleError, Text
from kempnerforge.data.sources.hf_rows import HFRows, is_dataset
from kempnerforge.data.sources.keys import ID, IMAGES, NULL, PART, Keys, filled_keys, unknown_keys
from kempnerforge.data.sources.pictures import count_images
from kempnerforge.data.sources.row_text import as_text, images_of_row, is_content, nested_size
from kempnerforge.data.sources.rows import json_rows
from kempnerforge.data.sources.table import RowSource, require_columns
from kempnerforge.util.errors import InputError, show

SYSTEM = "system"
SPARE = ("name", "tool_calls", "tool_call_id", "function_call", "refusal", "audio", "annotations", "reasoning_content", "weight")
"""Keys of a message in OpenAI's exports and in sets that follow them; they must be null."""
TURN: Keys = {"from": None, "value": PART, "role": None, "content": PART, **dict.fromkeys(SPARE, NULL)}
METADATA = (
    *(ID, "image_id", "question_id", "model", "source", "data_source", "dataset", "split", "url"),
    *("width", "height", "width_list", "height_list"),
)
"""Keys beside images and conversations in the files of LLaVA and of its descendants."""
KNOWN: Keys = {"image": None, "images": None, "conversations": TURN, "messages": TURN, SYSTEM: None, **dict.fromkeys(METADATA)}
ROLES = {"human": "prompt", "user": "prompt", "gpt": "answer", "assistant": "answer", "system": "system"}


@registry.register_data_config
@dataclass
class LlavaConfig(RowsConfig):
    """A JSON list, one object a line, or a dataset (Parquet, a directory of ``save_to_disk``, a hub id):
    ``image`` or ``images`` (a path or base64, a list of these, null, or missing) and ``conversations``, a
    list of ``{from: human|gpt, value}``; ``messages`` with ``{role: user|assistant, content}`` is the same.
    What is said may be a content list, ``[{type: text, text}, {type: image_url, image_url}, ...]``; an image
    in it is at its place, and ``{type: image, index}`` is the image of that number among ``images``. A row's
    ``system`` is the system prompt, in front of those among the turns.

    Attributes:
        image_token: what marks the place of an image in the file; it becomes ``data.image_placeholder``.
        image_first: as LLaVA does it: images of the first question move to its head, each text after them on
            a new line.
    """

    source: str = "llava"
    image_token: str = "<image>"
    image_first: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.image_token.strip():
            raise InputError(f"image_token = {self.image_token!r}: must not be blank")


class Message(NamedTuple):
    """An entry of a conversation.

    Attributes:
        role: "system", "prompt" or "answer".
        images: those in its content list, as in ``Content``.
    """

    role: str
    text: str
    images: tuple[ImageSource | int, ...]


@registry.register_source("llava")
class Llava(RowSource):
    """One sample per conversation, all of it one text. An answer in front of the first question is left out,
    as LLaVA does it, and so is an unanswered question at the end.
    """

    cfg: LlavaConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    known = KNOWN

    def __init__(self, cfg: LlavaConfig, split: str) -> None:
        super().__init__(cfg, split)
        if is_file_of_rows(self.path) or not is_dataset(self.path):
            self.rows = json_rows(self.path, self.key, self._measure, self.problems, cfg.max_bad_fraction)
        else:
            self.rows = HFRows(self, self._measure, ["conversations", "messages", SYSTEM], IMAGES, [ID])
        if "messages" not in self.rows.columns:
            require_columns(self.path, self.rows.columns, {"conversations": "data.source = 'llava'"})
        self.rows.judge(self)

    def sample(self, name: str, row: Mapping[str, Any]) -> Sample:
        text, inside = self._conversation(_entries(row))
        text = self._with_system(text, row)
        if self.cfg.image_first:
            text = replace(text, prompt=_to_the_head(text.prompt, self.cfg.image_placeholder))
        return Sample(name, images_of_row(self.images_in(row), inside, "'image' or 'images'"), (text,))

    def problems(self, row: Mapping[str, Any]) -> Iterator[str]:
        yield from unknown_keys(row, self.known, self.ignored)
        for names in (IMAGES, ("conversations", "messages")):
            both = filled_keys(row, names, self.ignored)
            if len(both) > 1:
                yield f"{' and '.join(map(repr, both))} are both there; one of them must be null, or in data.ignore_columns"

    def _measure(self, row: Mapping[str, Any]) -> tuple[int, int]:
        return nested_size([row.get(SYSTEM), _entries(row)]), sum(count_images(row.get(name)) for name in IMAGES)

    def _conversation(self, entries: Any) -> tuple[Text, tuple[ImageSource | int, ...]]:
        """The conversation as a text, and the images in its content lists."""
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            what = "is null" if entries is None else "must be a list of {from, value} objects"
            raise SampleError(f"'conversations': {what}")
        messages = [self._message(entry) for entry in entries]
        system = "\n".join(message.text for message in messages if message.role == "system")
        turns = [message for message in messages if message.role != "system"]
        first = int(bool(turns) and turns[0].role == "answer")
        last = len(turns) - (len(turns) - first) % 2
        unused, turns = (*turns[:first], *turns[last:]), turns[first:last]
        if [message.role for message in turns] != ["prompt", "answer"] * (len(turns) // 2):
            raise SampleError("'conversations': questions and answers do not alternate")
        if not turns:
            raise SampleError("'conversations': no question with an answer")
        texts = [message.text for message in turns]
        pairs = list(zip(texts[0::2], texts[1::2], strict=True))
        text = Text(*pairs[0], more=tuple(pairs[1:]), system=system, unused=tuple(message.text for message in unused))
        return text, tuple(image for message in messages for image in message.images)

    def _with_system(self, text: Text, row: Mapping[str, Any]) -> Text:
        if not filled_keys(row, (SYSTEM,), self.ignored):
            return text
        return replace(text, system="\n".join(filter(None, (as_text(row[SYSTEM], f"{SYSTEM!r}"), text.system))))

    def _message(self, entry: dict[str, Any]) -> Message:
        found = {names: filled_keys(entry, names, self.ignored) for names in (("from", "role"), ("value", "content"))}
        if twice := next((names for names in found.values() if len(names) > 1), None):
            raise SampleError(f"'conversations': {' and '.join(map(repr, twice))} are both there")
        role, value = (entry[names[0]] if names else None for names in found.values())
        if not isinstance(role, str) or role not in ROLES:
            raise SampleError(f"'conversations': {show(role)} says something; known are {', '.join(ROLES)}")
        content, images = self.content(value, f"what {role!r} says")
        text = as_text(content, f"what {role!r} says")
        if not is_content(value) and self.cfg.image_token in text:
            text = text.replace(self.cfg.image_token, self.cfg.image_placeholder)
        return Message(ROLES[role], text, images)


def _entries(row: Mapping[str, Any]) -> Any:
    conversations = row.get("conversations")
    return row.get("messages") if conversations is None else conversations


def _to_the_head(prompt: str, placeholder: str) -> str:
    count = prompt.count(placeholder)
    return f"{placeholder * count}\n{prompt.replace(placeholder, '').strip()}" if count else prompt
