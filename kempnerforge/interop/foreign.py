"""A directory of somebody else's, as a job of ours and its weights: language models and whole vision-language models of transformers, and
nanoVLM's. Strict: every tensor of the files has a place or is known to have none, and every parameter of ours has a tensor.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kempnerforge.config.data import JsonlConfig, TextConfig
from kempnerforge.config.images import ImagesConfig
from kempnerforge.config.job import JobConfig
from kempnerforge.config.training import TrainConfig
from kempnerforge.interop import mllama, nanovlm
from kempnerforge.interop.huggingface import CONFIG, check_tensor, read_config, some, tensor_files
from kempnerforge.interop.names import EMBEDDING, FAMILIES, HF_EMBEDDING, HF_HEAD, IGNORED
from kempnerforge.interop.settings import complete, model_config
from kempnerforge.interop.vlms import WRAPPERS, Layout, Wrapper, read_parts
from kempnerforge.interop.write import Progress, nothing, text_names
from kempnerforge.model.adapters import build_adapter
from kempnerforge.model.image_files import read_image_files
from kempnerforge.model.their_config import within_memory
from kempnerforge.model.transformer import Transformer
from kempnerforge.model.vision import build_vision_encoder
from kempnerforge.util.errors import InputError, cut, show

log = logging.getLogger("kempnerforge")

MAX_TEXT = 512
"""Tokens of a text in the config that is made, if the model has room for so many."""
UNREAD = re.compile(r"(post_layernorm\.(weight|bias)|head\..*|embeddings\.position_ids)$")
"""Tensors of a tower that may have no place in ours, besides layers behind the one that is read: a norm that no patch passes, pooling."""


class Place(NamedTuple):
    """Where a parameter of ours is in the files: a tensor, or one of the equal parts that its rows make."""

    name: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Foreign:
    """What a directory holds.

    Attributes:
        path: the directory, or file.
        architecture: the class in transformers that it is; empty: there is none.
        job: with the sections that make the model, and data and training sections to begin with.
        places: our parameter name -> where it is.
        files: tensor name -> file.
        image_id: the token that stands for a position of an image; None: the words know of no images.
        image_is_word: images take no position, and that token stands in the stream as a word, the first one that sees its image.
        added_tokens: that the code behind these files puts behind the tokenizer's vocabulary, in the order of their ids.
        notes: what is otherwise here than there.
        tied: head and embedding in the files, where both are there and ours has one for both.
    """

    path: Path
    architecture: str
    job: JobConfig
    places: dict[str, Place]
    files: dict[str, Path]
    image_id: int | None = None
    tied: tuple[str, str] | None = None
    image_is_word: bool = False
    added_tokens: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def can_be_compared(self) -> bool:
        """Whether transformers loads it as it is."""
        return bool(self.architecture) and self.path.is_dir()

    def read(self, progress: Progress = nothing) -> dict[str, Tensor]:
        """All parameters, by our names, in fp32.

        Raises:
            ValueError: a tensor is quantised or has another shape than ours.
        """
        wanted, tensors = shapes(self.job), {}
        by_file: dict[Path, list[str]] = {}
        for ours, place in self.places.items():
            by_file.setdefault(self.files[place.name], []).append(ours)
        for file, names in by_file.items():
            with safe_open(file, framework="pt") as opened:
                for ours in names:
                    name, part, parts = self.places[ours]
                    tensor = opened.get_tensor(name).chunk(parts)[part]
                    if tensor.dim() == wanted[ours].dim() + 1 and len(tensor) == 1:
                        tensor = tensor[0]
                    check_tensor(self.path, f"{name} ({ours})", tensor, wanted[ours])
                    tensors[ours] = tensor.float().contiguous()
            progress(f"reading {file.name}", len(tensors), len(self.places))
        self._check_tied()
        return {name: tensors[name] for name in wanted}

    def _check_tied(self) -> None:
        if self.tied is None:
            return
        pair = []
        for name in self.tied:
            with safe_open(self.files[name], framework="pt") as opened:
                pair.append(opened.get_tensor(name))
        if not torch.equal(*pair):
            raise InputError(f"{self.path}: {self.tied[0]} is not {self.tied[1]}, but its {CONFIG} says that they are tied")


def shapes(job: JobConfig) -> dict[str, Tensor]:
    """The parameters of ``job``'s model on the meta device, by name."""
    parts = nn.Module()
    with torch.device("meta"):
        parts.transformer = Transformer(job.model)
        if job.vlm is not None:
            encoder = parts.vision_encoder = build_vision_encoder(job.vision_encoder)
            parts.adapter = build_adapter(job.adapter, encoder.dim, job.model.dim, encoder.num_tokens)
    found = dict[str, Tensor](parts.named_parameters())
    return found if job.vlm is None or job.vlm.stands_for != mllama.KIND else found | mllama.added_shapes(job)


def open_foreign(path: Path | str) -> Foreign:
    """A directory, or a GGUF file. Reads config and names, not the weights.

    Raises:
        ValueError: the directory cannot be read, or holds a model that we cannot be, or tensors are missing or unknown.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        from kempnerforge.interop.gguf_file import open_gguf

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
    parts = read_parts(config, _rows(files, rows[0]) if rows else 1, norm)
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


def _unread(name: str, layout: Layout, names: dict[str, Place]) -> bool:
    """Whether a tensor is one of the tower that ours does without."""
    part = name.removeprefix(layout.vision)
    if part == name:
        return False
    if found := re.match(r"encoder\.layers\.\d+\.", part):
        return not any(place.name.startswith(layout.vision + found[0]) for place in names.values())
    return UNREAD.match(part) is not None


def _names(job: JobConfig, wrapper: Wrapper, family: str, layout: Layout) -> dict[str, Place]:
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
    parts = mllama.read_parts(config, _rows(files, rows[0]) if rows else 0, norm)
    job = _vlm_job(JobConfig(**vars(parts)), mllama.DATA, ImagesConfig(fit=fit))
    every = vars(job.vlm)["cross_attention_every_n_layers"]
    ours = shapes(job)
    choices = [{name: Place(mllama.name_of(name, every, layout)) for name in ours} for layout in mllama.LAYOUTS]
    names = max(choices, key=lambda found: sum(place.name in files for place in found.values()))
    places = matched(path, names, files, lambda name: False)
    return Foreign(path, mllama.ARCHITECTURE, job, places, files, complete(config)["image_token_index"], image_is_word=True)


def _open_nanovlm(path: Path, config: dict[str, Any], files: dict[str, Path]) -> Foreign:
    texts = nanovlm.texts_of(config)
    job = _vlm_job(nanovlm.job_of(config), texts.data, ImagesConfig(), texts.views)
    places = {ours: Place(*nanovlm.place(ours)) for ours in shapes(job)}
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


def matched(path: Path, places: dict[str, Place], files: dict[str, Path], spare: Callable[[str], bool]) -> dict[str, Place]:
    """``places``, if the files have them all and nothing else but what is ``spare``."""
    wanted = {place.name for place in places.values()}
    missing = wanted - files.keys()
    unknown = {name for name in files.keys() - wanted if not spare(name) and not IGNORED.search(name)}
    if missing or unknown:
        kinds = (("lacks", missing), ("has no place for", unknown))
        raise InputError(f"{path}: " + "; ".join(f"{kind} {len(names)}: {some(names)}" for kind, names in kinds if names))
    if rest := [name for name in files.keys() - wanted if not IGNORED.search(name)]:
        log.info("%s: %d tensors that the model does not read are left aside: %s", path, len(rest), some(rest))
    return places
