"""Checks of a ``config.json`` from elsewhere: a value that no model can have is refused by name, before a
class computes with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from kempnerforge.config.model import MAX_LAYERS
from kempnerforge.model.memory import HINT, TooLargeError, within_memory
from kempnerforge.util.errors import InputError, library_call, show
from kempnerforge.util.reading import entries

LARGEST, LONGEST = 2**31 - 1, 1 << 16
"""The largest integer, and the most characters of a text."""
BOOKKEEPING = ("dtype", "model_type", "transformers_version", "_name_or_path")
POSITIVE = re.compile(
    r"hidden_size|intermediate_size|vocab_size|image_size|patch_size|spatial_merge_size|(resampler_)?head_dim|max_position_embeddings"
    r"|num_channels|scale_factor|embed_dim|resampler_n_latents|num_(heads|hidden_layers|attention_heads|key_value_heads|patches|position_embeddings)|attention_heads|max_num_tiles|projection_dim|query_pre_attn_scalar"
)
SIZE = re.compile(r"(num|n|max_num)_\w+|\w+_(size|dim|heads|length|embeddings|channels|ratio|width|prob|rate|eps)|depth")
ROPE = re.compile(r"(low_freq_|high_freq_)?factor|rope_theta|original_max_position_embeddings")
DEEP = re.compile(r"(\w+_)?(n_|num_)?(layers|blocks|depth|tiles)")
"""Names of keys, whichever class has them: sizes of at least 1, sizes that may be 0, numbers of rotary
positions, numbers of layers."""


def check_config(where: str, config: Mapping[str, Any]) -> None:
    """
    Args:
        where: the file, for messages.

    Raises:
        InputError: naming a key that has no meaning in any class: a size below 0, beyond 2^31 or no number, a
            part that is no table.
    """
    for name, key, value in entries(dict(config)):
        in_rope = re.search(r"\b(rope_parameters|rope_scaling)\.", name)
        if why := _wrong_of_rope(key, value) if in_rope else _wrong(key, value):
            raise InputError(f"{where}: {name} = {show(value)}: {why}")


def _wrong(key: str, value: Any) -> str:
    if key == "model_type" and not isinstance(value, str | None):
        return "must be a text"
    if key in ("dtype", "torch_dtype"):
        known = isinstance(value, str) and isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype)
        return "" if value is None or known else "must be the name of a dtype, or null"
    if POSITIVE.fullmatch(key) and (value in ([], {}) or isinstance(value, str | bool)):
        return "must be a number above 0"
    if key == "vision_feature_layer" and value in ([], 0):
        return "must be a layer, counted from 1 or from the end, or a list of them"
    if isinstance(value, str):
        return f"has {len(value):,} characters; at most {LONGEST:,} are read" if len(value) > LONGEST else ""
    if (key.endswith("_config") or key in ("rope_parameters", "rope_scaling")) and not isinstance(value, dict | None):
        return "must be a table"
    if isinstance(value, list):
        return next((why for part in value if (why := _wrong(key, part))), "")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if not math.isfinite(value) or abs(value) > (LARGEST if isinstance(value, int) else 1e30):
        return f"must be at most {LARGEST}" if isinstance(value, int) else "must be a finite number of usual size"
    if key.endswith("dropout") and not 0 <= value <= 1:
        return "must be a number from 0 to 1"
    low = 1 if POSITIVE.fullmatch(key) else 0 if SIZE.fullmatch(key) else -LARGEST
    if value < low and not key.endswith(("_id", "_ids")):
        return f"must be at least {low}"
    return f"must be at most {MAX_LAYERS}" if DEEP.fullmatch(key) and value > MAX_LAYERS else ""


def _wrong_of_rope(key: str, value: Any) -> str:
    if ROPE.fullmatch(key):
        return "" if isinstance(value, int | float) and 0 < value <= LARGEST else f"must be a number above 0, at most {LARGEST}"
    if key in ("rope_type", "type") and not isinstance(value, str):
        return "must be a text"
    return "must be a table" if key.endswith("_attention") and not isinstance(value, dict) else _wrong(key, value)


@contextmanager
def class_call(where: str, what: str, config: Mapping[str, Any]) -> Iterator[None]:
    """As ``library_call``, for a class that is given ``config``: to an error that names no key it adds the
    keys that the error is about.
    """
    try:
        with names_keys(config), library_call(where, what):
            yield
    except TooLargeError as error:
        raise TooLargeError(f"{where}: {error}") from error


@contextmanager
def names_keys(config: Mapping[str, Any], start: str = "") -> Iterator[None]:
    """Adds to an error of the user's input the keys of ``config`` that it is about, and ``start`` in front."""
    try:
        yield
    except TooLargeError as error:
        raise TooLargeError(f"{start}{error.largest_of(config)}") from error
    except InputError as error:
        raise InputError(f"{start}{error}{_about(config, str(error))}") from error


def _about(config: Mapping[str, Any], message: str) -> str:
    """The keys whose value an error quotes, or that it can be about; empty if it names a key itself."""
    message = re.sub(r"\S*/\S*", " ", message)  # a path may hold the name of a key, or a number
    found = [
        entry
        for entry in entries(dict(config))
        if entry.key.isidentifier() and entry.key not in BOOKKEEPING and not isinstance(entry.value, bool)
    ]
    if HINT in message or any(re.search(rf"(?<!\w){re.escape(entry.key)}(?!\w)", message) for entry in found):
        return ""
    numbers = {*re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", message)}
    picks: list[Callable[[str, Any], bool]] = [
        lambda key, value: value is None and "NoneType" in message and key.endswith("_config"),
        lambda key, value: value is None and "NoneType" in message and bool(POSITIVE.fullmatch(key) or key.endswith("dropout")),
        lambda key, value: value in ([], {}) and bool(re.search("list|dict|IndexError", message)),
        lambda key, value: str(value) in numbers if isinstance(value, int | float) else isinstance(value, str) and value[:99] in message,
    ]
    picked = next((kept for pick in picks if (kept := [e for e in found if e.value != "" and pick(e.key, e.value)])), [])
    named = [f"{name} = {'null' if value is None else show(value)}" for name, _, value in picked]
    return f"{HINT}{', '.join(named[:4])}" if named else ""


def check_room(make: Callable[[], object], where: str, what: str, config: Mapping[str, Any]) -> None:
    """Builds a class of transformers on the meta device, so that one too large for this machine is refused
    before anything is allocated.

    Args:
        make: builds it.
        where, what, config: as of ``class_call``.
    """
    with class_call(where, what, config), torch.device("meta"), within_memory(config, meta=True):
        make()


def pinpoint_grids(path: str, pairs: Any, side: int) -> list[tuple[int, int]]:
    """Rows and columns of each of ``image_grid_pinpoints``.

    Args:
        path: of the model, for messages.
        pairs: height and width in pixels.
        side: of a view.

    Raises:
        InputError: these are no multiples of ``side``.
    """
    if not pairs or any(
        not isinstance(pair, list | tuple)
        or len(pair) != 2
        or any(type(length) is not int or length < 1 or length % side for length in pair)
        for pair in pairs
    ):
        raise InputError(
            f"{path}image_grid_pinpoints = {show(pairs)}: must be pairs of height and width that are multiples of {side}, "
            "the side of a view"
        )
    return [(height // side, width // side) for height, width in pairs]
