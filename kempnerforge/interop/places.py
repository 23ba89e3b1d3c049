"""Somebody's model as a job of ours, and where in its files each tensor is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kempnerforge.config.job import JobConfig
from kempnerforge.interop import mllama
from kempnerforge.interop.huggingface import CONFIG, check_tensor, some
from kempnerforge.interop.names import IGNORED
from kempnerforge.interop.write import Progress, nothing
from kempnerforge.model.adapters import build_adapter
from kempnerforge.model.transformer import Transformer
from kempnerforge.model.vision import build_vision_encoder
from kempnerforge.util.errors import InputError

log = logging.getLogger("kempnerforge")

MAX_TEXT = 512
"""Tokens of a text in the config that is made, if the model has room for so many."""


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
        image_id: the token at the positions of an image; None: the text has no token for images.
        image_is_word: images take no position, and that token is in the stream as a word, the first one that sees its image.
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
