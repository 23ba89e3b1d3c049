"""A directory of somebody else's, as a job of ours and its weights: language models and whole vision-language models of transformers, and
nanoVLM's. Strict: every tensor of the files has a place or is known to have none, and every parameter of ours has a tensor.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from kempnerforge.config.data import JsonlConfig, TextConfig
from kempnerforge.config.images import ImagesConfig
from kempnerforge.config.job import JobConfig
from kempnerforge.config.training import TrainConfig
from kempnerforge.interop import mllama, nanovlm
from kempnerforge.interop.gguf_file import open_gguf
from kempnerforge.interop.huggingface import CONFIG, read_config, tensor_files
from kempnerforge.interop.names import EMBEDDING, FAMILIES, HF_EMBEDDING, HF_HEAD
from kempnerforge.interop.places import MAX_TEXT, Foreign, Place, matched, shapes
from kempnerforge.interop.settings import complete, model_config
from kempnerforge.interop.vlms import WRAPPERS, FileLayout, Wrapper, read_vlm_config
from kempnerforge.interop.write import text_names
from kempnerforge.model.image_files import read_image_files
from kempnerforge.model.their_config import within_memory
from kempnerforge.model.vision import build_vision_encoder
from kempnerforge.util.errors import InputError, cut, show

UNREAD = re.compile(r"(post_layernorm\.(weight|bias)|head\..*|embeddings\.position_ids)$")
"""Tensors of a tower that may have no place in ours, besides layers after the one that is read: a norm that no patch passes, pooling."""


def open_foreign(path: Path | str) -> Foreign:
    """A directory, or a GGUF file. Reads config and names, not the weights.

    Raises:
        ValueError: the directory cannot be read, or holds a model that we cannot be, or tensors are missing or unknown.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return open_gguf(path)
    config, files = read_config(path), tensor_files(path)
    try:
        with within_memory(config, meta=True):
            if nanovlm.is_one(config):
                return _open_nanovlm(path, config, files)
            if config.get("model_type") in FAMILIES:
                return _open_text(path, config, files)
            if config.get("model_type") == mllama.KIND:
                return _open_mllama(path, config, files)
            if config.get("model_type") in WRAPPERS:
                return _open_vlm(path, config, files)
            raise InputError(_unknown(config.get("model_type")))
    except InputError as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path / CONFIG}: {error}") from None


def _unknown(kind: Any) -> str:
    vlms = [*WRAPPERS, mllama.KIND]
    near = difflib.get_close_matches(str(kind), [*FAMILIES, *vlms], n=1)
    return (
        f"model_type = {cut(repr(kind))}: is not read; language models are read of {', '.join(FAMILIES)}, vision-language models of "
        f"{', '.join(vlms)} and nanoVLM" + (f"; the nearest is {near[0]!r}" if near else "")
    )


def _open_text(path: Path, config: dict[str, Any], files: dict[str, Path]) -> Foreign:
    config = complete(config)
    prefix = _prefix_of(path, HF_EMBEDDING, files)
    model = model_config(config, _rows(files, prefix + HF_EMBEDDING))
    length = min(MAX_TEXT, model.max_seq_len)
    job = JobConfig(
        model=model, data=TextConfig(path="train.txt", prompt_template="{prompt}"), train=TrainConfig(max_steps=1000, seq_len=length)
    )
    names = text_names(model, config["model_type"], prefix)
    places = matched(path, {ours: Place(theirs) for ours, theirs in names.items()}, files, lambda name: name == HF_HEAD)
    return Foreign(path, FAMILIES[config["model_type"]].architecture, job, places, files, tied=_tied(places, files, HF_HEAD))


def _tied(places: dict[str, Place], files: dict[str, Path], head: str) -> tuple[str, str] | None:
    used = {place.name for place in places.values()}
    return (head, places[f"transformer.{EMBEDDING}"].name) if head in files and head not in used else None


def _open_vlm(path: Path, config: dict[str, Any], files: dict[str, Path]) -> Foreign:
    norm, fit = _image_processor(path)
    rows = [name for name in files if name.endswith(HF_EMBEDDING)]
    parts = read_vlm_config(config, _rows(files, rows[0]) if rows else 1, norm)
    wrapper, text = WRAPPERS[config["model_type"]], complete(config)["text_config"]
    job = _vlm_job(JobConfig(**vars(parts)), wrapper.data, ImagesConfig(fit=fit))
    choices = [_names(job, wrapper, text["model_type"], layout) for layout in wrapper.layouts]
    names = max(choices, key=lambda found: sum(place.name in files for place in found.values()))
    layout = wrapper.layouts[choices.index(names)]
    spare = lambda name: name == layout.head or _unread(name, layout, names)
    key = "image_token_index" if "image_token_index" in config else "image_token_id"
    if not isinstance(image_id := config.get(key), int) or image_id < 0:
        raise InputError(f"{key} = {show(image_id)}: must be the id of a token")
    places = matched(path, names, files, spare)
    return Foreign(path, wrapper.architecture, job, places, files, image_id, _tied(places, files, layout.head))


def _unread(name: str, layout: FileLayout, names: dict[str, Place]) -> bool:
    """Whether a tensor is one of the tower that ours does without."""
    part = name.removeprefix(layout.vision)
    if part == name:
        return False
    if found := re.match(r"encoder\.layers\.\d+\.", part):
        return not any(place.name.startswith(layout.vision + found[0]) for place in names.values())
    return UNREAD.match(part) is not None


def _names(job: JobConfig, wrapper: Wrapper, family: str, layout: FileLayout) -> dict[str, Place]:
    """Our parameter -> its place, in files of this layout."""
    text = text_names(job.model, family, layout.text, layout.head)
    adapter = {f"adapter.{ours}": layout.projector + theirs for ours, theirs in wrapper.adapter_names.items()}
    names: dict[str, Place] = {}
    for ours in shapes(job):
        tower = layout.vision + ours.removeprefix("vision_encoder.")
        names[ours] = Place(text.get(ours) or adapter.get(ours) or tower)
    return names


def _open_mllama(path: Path, config: dict[str, Any], files: dict[str, Path]) -> Foreign:
    norm, fit = _image_processor(path)
    rows = [name for name in files if name.endswith(HF_EMBEDDING)]
    parts = mllama.read_mllama_config(config, _rows(files, rows[0]) if rows else 0, norm)
    job = _vlm_job(JobConfig(**vars(parts)), mllama.DATA, ImagesConfig(fit=fit))
    every = vars(job.vlm)["cross_attention_every_n_layers"]
    ours = shapes(job)
    choices = [{name: Place(mllama.tensor_name(name, every, layout)) for name in ours} for layout in mllama.LAYOUTS]
    names = max(choices, key=lambda found: sum(place.name in files for place in found.values()))
    places = matched(path, names, files, lambda name: False)
    return Foreign(path, mllama.ARCHITECTURE, job, places, files, complete(config)["image_token_index"], image_is_word=True)


def _open_nanovlm(path: Path, config: dict[str, Any], files: dict[str, Path]) -> Foreign:
    texts = nanovlm.texts_of(config)
    job = _vlm_job(nanovlm.job_of(config), texts.data, ImagesConfig(), texts.views)
    places = {ours: Place(*nanovlm.tensor_place(ours)) for ours in shapes(job)}
    for kept, other in nanovlm.SHARED.items():
        if other not in files and kept in files:
            places = {ours: Place(kept) if place.name == other else place for ours, place in places.items()}
    places = matched(path, places, files, nanovlm.is_spare)
    tied = _tied(places, files, nanovlm.HEAD)
    return Foreign(path, "", job, places, files, tied=tied, added_tokens=texts.tokens, notes=texts.notes)


def _vlm_job(job: JobConfig, texts: Mapping[str, Any], images: ImagesConfig, views: int = 1) -> JobConfig:
    """With data and training sections that suit the model, for rows with an image of ``views`` views."""
    encoder, assumed = job.vision_encoder, job.image_tokens()
    if assumed is None:
        with torch.device("meta"):
            assumed = job.adapter.num_tokens(build_vision_encoder(encoder).num_tokens)
    assert job.vlm is not None
    assumed = job.vlm.residual_stream_image_tokens(assumed)
    if job.model.max_seq_len <= assumed:
        raise InputError(f"an image takes {assumed} positions and the text model has {job.model.max_seq_len} (max_position_embeddings)")
    text = min(MAX_TEXT, job.model.max_seq_len - assumed)
    data = JsonlConfig(path="train.jsonl", prompt_column="prompt", **{"images": images, **texts})
    length = min(job.model.max_seq_len, views * (assumed + data.images.has_markers) + text)
    return replace(job, vlm=replace(job.vlm, max_text_len=text), data=data, train=TrainConfig(max_steps=1000, seq_len=length))


def _image_processor(path: Path) -> tuple[tuple[list[float], list[float]] | None, str]:
    """Mean and std (None: nothing is said), and how an image becomes a square: "squash" or "crop"."""
    files = read_image_files(path)
    return (files.normalisation, files.fit) if files else (None, "squash")


def _prefix_of(path: Path, name: str, files: dict[str, Path]) -> str:
    found = [there.removesuffix(name) for there in files if there == name or there.endswith("." + name)]
    if len(found) != 1:
        raise InputError(f"{path}: needs one text model, but {len(found)} tensors are called {name}")
    return found[0]


def _rows(files: dict[str, Path], name: str) -> int:
    with safe_open(files[name], framework="pt") as opened:
        return opened.get_slice(name).get_shape()[0]
