"""Values of rows -> texts: what is a string already, what is taken as one, and what is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from kempnerforge.data.sample import ConvertedText, ImageSource, SampleError, Text
from kempnerforge.data.sources.keys import PART, Ignoring, unknown_keys
from kempnerforge.data.sources.rows import WrittenNumber
from kempnerforge.util.errors import show

OpenImage = Callable[[Any], tuple[ImageSource, ...]]
"""From a value in a content list to its image."""


class Content(NamedTuple):
    """A value of a row in the place of a text.

    Attributes:
        value: one text, with a placeholder for each image, if the row has a content list; else what the row
            has.
        images: those in the content list: images, or numbers of images in the columns of the row.
    """

    value: Any
    images: tuple[ImageSource | int, ...] = ()


def as_text(value: Any, where: str) -> str:
    """``value`` as a text. Numbers and booleans become what JSON writes for them.

    Args:
        where: the place of the value, for messages: "column 'answer'".

    Raises:
        SampleError: it is null, or something else that is no text.
    """
    if isinstance(value, str):
        return value
    if value is None:
        raise SampleError(f"{where} is null")
    if isinstance(value, bool):
        return ConvertedText("true" if value else "false", "a boolean")
    if isinstance(value, int):
        return ConvertedText(str(value), "a number")
    if isinstance(value, float) and math.isfinite(value):
        return ConvertedText(value.written if isinstance(value, WrittenNumber) else repr(value), "a number")
    what = "NaN or infinity" if isinstance(value, float) else type(value).__name__
    raise SampleError(f"{where}: must be a string, not {what}")


def make_text(prompt: Any, answer: Any, prompt_column: str, answer_column: str) -> Text:
    """A text of one turn. Of a list of answers the first is trained and the others are right as well.

    Raises:
        SampleError: no text, or nothing to train.
    """
    asked, answers = as_text(prompt, f"column {prompt_column!r}"), f"column {answer_column!r}"
    if isinstance(answer, Mapping) and isinstance(answer.get("answer"), list):  # as columns, from older versions of `datasets`
        answer = answer["answer"]
    several = is_list_of_answers(answer)
    if several and not answer:
        raise SampleError(f"{answers}: an empty list of answers")
    first, *others = [
        as_text(entry.get("answer") if isinstance(entry, Mapping) and "answer" in entry else entry, answers)
        for entry in (answer if several else [answer])
    ]
    if not first.strip():
        raise SampleError(f"{answers}: empty answer")
    return Text(asked, first, references=tuple(other for other in others if other.strip()), listed=several)


def is_list_of_answers(value: Any) -> bool:
    """Whether ``value`` is a list, and not a content list."""
    return isinstance(value, list) and not is_content(value)


def is_content(value: Any) -> bool:
    """Whether ``value`` is a content list of OpenAI's API or of chat templates."""
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) and "type" in part for part in value)


def read_content(value: Any, where: str, placeholder: str, open_image: OpenImage) -> Content:
    """Reads the value of a text column, which may be a list of content parts; ``images_of_row`` reads the
    images of such a list.

    Raises:
        SampleError: a part of a content list that is neither text nor image.
    """
    if not is_content(value):
        return Content(value)
    written, images = "", []
    has_images = any(part["type"] != "text" for part in value)
    for part in value:
        for problem in unknown_keys(part, PART, Ignoring()):
            raise SampleError(f"{where}: {problem}")
        if part["type"] == "text":
            if part.get("index") is not None:
                raise SampleError(f"{where}: a part of type text with an index; it numbers images")
            text = as_text(part.get("text"), f"{where}, a part of type text,")
            if has_images and placeholder in text:
                raise SampleError(f"{where}: {placeholder!r} in a text beside parts that are images")
            written += text
        elif part["type"] in ("image", "image_url"):
            written += placeholder
            images += _image_of_part(part, open_image)
        else:
            raise SampleError(f"{where}: a part of type {show(part['type'])}; known are text, image, image_url")
    return Content(written, tuple(images))


def images_of_row(beside: tuple[ImageSource, ...], inside: Sequence[ImageSource | int], columns: str) -> tuple[ImageSource, ...]:
    """The images of a row, in the order of their places.

    Args:
        beside: the images in its ``columns``.
        inside: ``Content.images`` of its texts.

    Raises:
        SampleError: there are images in both, or a number is of no image, or an image has no number.
    """
    numbers = [image for image in inside if isinstance(image, int)]
    if not numbers:
        if beside and inside:
            raise SampleError(f"images both in {columns} and in the texts")
        return beside or tuple(image for image in inside if not isinstance(image, int))
    if len(numbers) < len(inside):
        raise SampleError("some parts of type image have an index, others an image")
    if wrong := [number for number in numbers if not 0 <= number < len(beside)]:
        raise SampleError(f"a part of type image has index {wrong[0]}, and {columns} {len(beside)} images, from 0")
    if missing := set(range(len(beside))) - set(numbers):
        raise SampleError(f"no part of type image has index {min(missing)}, and {columns} {len(beside)} images, from 0")
    return tuple(beside[number] for number in numbers)


def _image_of_part(part: dict[str, Any], open_image: OpenImage) -> Sequence[ImageSource | int]:
    """The image of ``part``, or its number; none where it only marks a place."""
    url = part.get("image_url")
    given = [part.get("image"), url.get("url") if isinstance(url, dict) else url, part.get("path"), part.get("url")]
    found = [value for value in given if value is not None]
    if len(found) > 1:
        raise SampleError("a part of a content list that names two images")
    if (index := part.get("index")) is None:
        return open_image(found[0]) if found else ()
    if found or isinstance(index, bool) or not isinstance(index, int):
        raise SampleError(
            f"a part of a content list with index = {show(index)}: must be the number of an image beside the texts, and name no other"
        )
    return (index,)


def nested_size(value: Any) -> int:
    """Characters of all strings in ``value``."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(nested_size(entry) for entry in value)
    return sum(nested_size(entry) for entry in value.values()) if isinstance(value, dict) else 0
