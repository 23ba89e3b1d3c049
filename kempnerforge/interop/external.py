"""A model of another project as a job of ours, and the tensors of its files that are our parameters."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kempnerforge.config.data import JsonlConfig, TextConfig
from kempnerforge.config.images import ImagesConfig
from kempnerforge.config.job import JobConfig
from kempnerforge.config.model import ModelConfig
from kempnerforge.config.training import TrainConfig
from kempnerforge.interop.families import EMBEDDING, HF_EMBEDDING, HF_HEAD, IGNORED
from kempnerforge.interop.write import Progress, nothing
from kempnerforge.model.adapters import build_adapter
from kempnerforge.model.hf_files import CONFIG, read_tensors, some
from kempnerforge.model.transformer import Transformer
from kempnerforge.model.vision import build_vision_encoder
from kempnerforge.util.errors import InputError

log = logging.getLogger("kempnerforge")

MAX_TEXT = 512
"""Tokens of a text in the config that is made, if the model has room for so many."""


class FileTensor(NamedTuple):
    """The tensor in the files that is a parameter of ours, or the one of its ``parts`` equal groups of rows
    that is.
    """

    name: str
    part: int = 0
    parts: int = 1


class TiedHead(NamedTuple):
    """Names of output head and embedding in files that have both, of a model that has one parameter for both."""

    head: str
    embedding: str


@dataclass(frozen=True)
class ExternalModel:
    """What a directory or file holds.

    Attributes:
        path: the directory, or file.
        architecture: its class in transformers; empty: there is none.
        job: the sections that make the model, and data and training sections to begin with.
        parameters: our parameter name -> tensor on the meta device.
        file_tensors: our parameter name -> its tensor in the files.
        files: tensor name -> file.
        image_id: the token at the positions of an image; None: the text has no token for images.
        image_is_word: images take no position, and that token is in the stream as a word, the first one that
            sees its image.
        added_tokens: tokens that the code of these files adds after the tokenizer's vocabulary, in the order
            of their ids.
        end_id: the token that its class looks for at the end of a text; None: it looks for none.
        notes: differences between that code and ours, for people.
        tied: both names of a tied head, if the files have both.
    """

    path: Path
    architecture: str
    job: JobConfig
    parameters: Mapping[str, Tensor]
    file_tensors: Mapping[str, FileTensor]
    files: Mapping[str, Path]
    image_id: int | None = None
    tied: TiedHead | None = None
    image_is_word: bool = False
    added_tokens: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    end_id: int | None = None

    @property
    def can_be_compared(self) -> bool:
        """Whether transformers loads it as it is."""
        return bool(self.architecture) and self.path.is_dir()

    def read(self, progress: Progress = nothing) -> dict[str, Tensor]:
        """All parameters, by our names, in fp32.

        Raises:
            InputError: a tensor is quantised, has another shape than our parameter, or a tied head is not the
                embedding.
        """
        by_tensor: dict[str, list[str]] = {}
        for name, source in self.file_tensors.items():
            by_tensor.setdefault(source.name, []).append(name)
        tensors: dict[str, Tensor] = {}
        for source, whole in read_tensors(self.files, by_tensor):
            for name in by_tensor[source]:
                _, part, parts = self.file_tensors[name]
                tensor, wanted = torch.atleast_1d(whole).chunk(parts)[part], self.parameters[name]
                if tensor.dim() == wanted.dim() + 1 and len(tensor) == 1:
                    tensor = tensor[0]
                elif tensor.dim() == wanted.dim() - 1 and len(wanted) == 1:
                    tensor = tensor[None]
                check_tensor(self.path, f"{source} ({name})", tensor, wanted)
                tensors[name] = tensor.float().contiguous()
            progress(f"reading {self.files[source].name}", len(tensors), len(self.file_tensors))
        if self.tied is not None:
            check_tied(self.path, self.files, self.tied)
        return {name: tensors[name] for name in self.parameters}


# ---- names and shapes ----------------------------------------------------------------------------


def backbone_parameters(cfg: ModelConfig) -> dict[str, Tensor]:
    """The parameters of a text model on the meta device, by our names."""
    with torch.device("meta"):
        return {f"transformer.{name}": parameter for name, parameter in Transformer(cfg).named_parameters()}


def model_parameters(job: JobConfig) -> dict[str, Tensor]:
    """The parameters of text model, vision encoder and adapter of ``job`` on the meta device, by our names."""
    parts = nn.Module()
    with torch.device("meta"):
        encoder = parts.vision_encoder = build_vision_encoder(job.vision_encoder)
        count, width = len(job.vision_encoder.deepstack_layers), encoder.layer_dim
        adapter = parts.adapter = build_adapter(job.adapter, encoder.dim - count * width, job.model.dim, encoder.num_tokens)
        adapter.deepstack.extend(build_adapter(job.adapter.of_layers, width, job.model.dim, encoder.num_tokens) for _ in range(count))
    return {**backbone_parameters(job.model), **dict(parts.named_parameters())}


def match_tensors(
    path: Path, wanted: Mapping[str, FileTensor], files: Mapping[str, Path], unread: Callable[[str], bool]
) -> Mapping[str, FileTensor]:
    """``wanted``, if the files have all of these tensors, and no others but those that are ``unread``.

    Raises:
        InputError: tensors are missing, or are none of the model's.
    """
    used = {source.name for source in wanted.values()}
    missing, others = used - files.keys(), {name for name in files.keys() - used if not IGNORED.search(name)}
    unknown = {name for name in others if not unread(name)}
    if missing or unknown:
        kinds = (("lacks", missing), ("has no place for", unknown))
        raise InputError(f"{path}: " + "; ".join(f"{kind} {len(names)}: {some(names)}" for kind, names in kinds if names))
    if others:
        log.info("%s: %d tensors that the model does not read are left aside: %s", path, len(others), some(others))
    return wanted


def text_prefix(path: Path, files: Iterable[str]) -> str:
    """What the names of the text model's tensors begin with.

    Raises:
        InputError: there is no text model, or more than one.
    """
    found = [name.removesuffix(HF_EMBEDDING) for name in files if name == HF_EMBEDDING or name.endswith("." + HF_EMBEDDING)]
    if len(found) != 1:
        raise InputError(f"{path}: needs one text model, but {len(found)} tensors are called {HF_EMBEDDING}")
    return found[0]


def tied_head(tensors: Mapping[str, FileTensor], files: Mapping[str, Path], head: str) -> TiedHead | None:
    """The names of both, if the files have a head and none of our parameters is read from it."""
    used = {source.name for source in tensors.values()}
    return TiedHead(head, tensors[f"transformer.{EMBEDDING}"].name) if head in files and head not in used else None


# ---- checks --------------------------------------------------------------------------------------


def check_tensor(path: Path, name: str, tensor: Tensor, wanted: Tensor) -> None:
    """
    Raises:
        InputError: ``tensor`` is quantised, or has another shape than ``wanted``.
    """
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise InputError(f"{path}: {name} is {tensor.dtype}; quantised weights are not read")
    if tensor.shape != wanted.shape:
        rows = "; model.vocab_size must be the number of rows" if HF_EMBEDDING in name or HF_HEAD in name else ""
        raise InputError(f"{path}: {name} has shape {tuple(tensor.shape)}, the model's has {tuple(wanted.shape)}{rows}")


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether the values are not the same. On the meta device there are none, and nothing differs."""
    return not a.is_meta and not torch.equal(a, b)


def check_tied(path: Path, files: Mapping[str, Path], tied: TiedHead) -> None:
    """
    Raises:
        InputError: head and embedding are not equal.
    """
    tensors = dict(read_tensors(files, tied))
    if differ(tensors[tied.head], tensors[tied.embedding]):
        raise InputError(f"{path}: {tied.head} is not {tied.embedding}, but its {CONFIG} says that they are tied")


# ---- the rest of a job ---------------------------------------------------------------------------


def text_job(model: ModelConfig) -> JobConfig:
    """A language model with data and training sections to begin with."""
    train = TrainConfig(max_steps=1000, seq_len=min(MAX_TEXT, model.max_seq_len))
    return JobConfig(model=model, data=TextConfig(path="train.txt", prompt_template="{prompt}"), train=train)


def image_job(job: JobConfig, data: Mapping[str, Any], fit: str = "squash", views: int = 1) -> JobConfig:
    """A vision-language model with data and training sections to begin with.

    Args:
        job: the sections that make the model.
        data: keys of ``[data]``; they may hold ``images``.
        fit: ``data.images.fit``, if they do not.
        views: of one image, at most.

    Raises:
        InputError: an image needs more positions than the text model has.
    """
    encoder, positions = job.vision_encoder, job.image_tokens()
    if positions is None:
        with torch.device("meta"):
            positions = job.adapter.num_tokens(build_vision_encoder(encoder).num_tokens)
    assert job.vlm is not None
    positions, room = job.vlm.residual_stream_image_tokens(positions), job.model.max_seq_len
    if room <= positions:
        raise InputError(f"an image takes {positions} positions and the text model has {room} (max_position_embeddings)")
    text = min(MAX_TEXT, room - positions)
    section = JsonlConfig(path="train.jsonl", **{"prompt_column": "prompt", "images": ImagesConfig(fit=fit), **data})
    besides = math.isqrt(positions) if section.images.rows else section.images.has_markers
    length = min(room, views * (positions + besides) + len(section.images.around) + text)
    return replace(job, vlm=replace(job.vlm, max_text_len=text), data=section, train=TrainConfig(max_steps=1000, seq_len=length))
