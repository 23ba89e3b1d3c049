"""What a client asks, as JSON from outside: checked field by field, images only as bytes."""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import dataclass, field
from typing import Any

from kempnerforge.eval.generate import Sampling
from kempnerforge.util.errors import InputError
from kempnerforge.util.reading import parse_json

MAX_BODY = 64 * 2**20
MAX_IMAGES = 16
MAX_PROMPT = 100_000
KEYS = ("prompt", "images", "history", "max_new_tokens", "temperature", "top_k", "top_p", "seed")


@dataclass(frozen=True)
class Question:
    """A prompt about images.

    Attributes:
        images: encoded, as they were sent; not decoded yet.
        history: (prompt, answer) of the turns before.
        max_new_tokens: None: the model's default.
    """

    prompt: str
    images: tuple[bytes, ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)


def read_question(body: bytes) -> Question:
    """The question in ``body``, a JSON object with ``KEYS``, each optional: ``images`` is a list of base64,
    ``history`` a list of [prompt, answer].

    Raises:
        InputError: it is not a question; the message says why.
    """
    given = parse_json(body, "the request")
    if not isinstance(given, dict):
        raise InputError("the request is not a JSON object")
    if unknown := sorted(given.keys() - set(KEYS)):
        raise InputError(f"{unknown[0][:40]!r} is not a key of a question: {', '.join(KEYS)}")
    prompt = given.get("prompt", "")
    if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
        raise InputError(f"prompt: must be text of at most {MAX_PROMPT} characters")
    wanted = _number(given, "max_new_tokens", None, whole=True)
    sampling = Sampling(
        _number(given, "temperature", 0.0),
        _number(given, "top_k", 0, whole=True),
        _number(given, "top_p", 1.0),
        _number(given, "seed", 0, whole=True) % 2**63,
    )
    return Question(prompt, _images(given.get("images", [])), _history(given.get("history", [])), wanted, sampling)


def _number(given: dict[str, Any], key: str, default: Any, whole: bool = False) -> Any:
    value = given.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or abs(value) > 1e18 or math.isnan(value):
        raise InputError(f"{key} = {str(value)[:40]}: must be a {'whole ' if whole else ''}number")
    return value


def _history(given: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(given, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in given):
        raise InputError("history: must be a list of [prompt, answer]")
    if not all(isinstance(text, str) for turn in given for text in turn):
        raise InputError("history: prompts and answers must be text")
    return tuple((prompt, answer) for prompt, answer in given)


def _images(given: object) -> tuple[bytes, ...]:
    if not isinstance(given, list) or len(given) > MAX_IMAGES:
        raise InputError(f"images: must be a list of at most {MAX_IMAGES}")
    images = []
    for number, image in enumerate(given, 1):
        try:
            images.append(base64.b64decode(image, validate=True))
        except (TypeError, ValueError, binascii.Error):
            raise InputError(f"image {number}: is not base64") from None
    return tuple(images)
