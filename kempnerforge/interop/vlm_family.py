"""The contract of a vision-language class of transformers that a model of ours can be. ``interop/vlms.py``
has the table of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from kempnerforge.config import registry
from kempnerforge.config.adapter import AdapterConfig
from kempnerforge.config.images import ImagesConfig
from kempnerforge.config.job import JobConfig
from kempnerforge.config.model import ModelConfig
from kempnerforge.config.vision import HFTowerConfig, square_side
from kempnerforge.config.vlm import VLMConfig
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.interop.external import model_parameters
from kempnerforge.model.hf_towers import plain_settings
from kempnerforge.model.image_processor import Normalisation
from kempnerforge.util.errors import InputError, show

BOOKKEEPING = {"initializer_range", "initializer_factor", "projection_dim", "vocab_size", "vision_use_head", "num_image_tokens"}
"""Keys of a tower's config that do not change its patches."""

LLAVA, LLAVA_NEXT, PALIGEMMA = "LlavaProcessor", "LlavaNextProcessor", "PaliGemmaProcessor"
"""The first two write nothing but the tokens of the images into a text."""
FRAMED = ("Idefics3Processor", "SmolVLMProcessor")
"""These write ``FRAME`` in the place of "<image>"."""
FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"
FRAME = f"{FAKE}{GLOBAL}<image>{FAKE}"

Settings = dict[str, bool | int | float | str]
Ids = Mapping[str, int | None]
"""``bos_token_id``, ``eos_token_id`` and ``pad_token_id``."""


class FileLayout(NamedTuple):
    """The parts of a model in its files: prefixes, and the full name of the output head."""

    vision: str
    projector: str
    text: str
    head: str


@dataclass(frozen=True)
class VLMSections:
    """The sections that a ``config.json`` amounts to."""

    model: ModelConfig
    vision_encoder: HFTowerConfig
    adapter: AdapterConfig
    vlm: VLMConfig


@dataclass(frozen=True, kw_only=True)
class VLMFamily(ABC):
    """One vision-language class.

    Attributes:
        kind: its ``model_type``.
        architecture: its name in transformers.
        layouts: the forms that its files have had; the first is written.
        data: keys of ``[data]`` that say how its texts are written, with one image in front of the prompt.
        image_key: the key of ``config.json`` with the token of an image, as it is written; empty: there is
            none.
        processors: classes of processors in transformers that can serve it; its own is the first. Empty: none
            makes single views.
        image_processor: the class of its image processor.
        images_by_row: its ``pixel_values`` have an axis for the images of a row.
        image_is_word: images take no position in the stream; the token of an image is a word of it.
        newline: the last of ``model.new_tokens`` is no token there, but a vector, at the end of each row of image
            tokens.
        text_unread: keys of ``text_config`` that say what ``vlm.attention_mask`` says here.
        notes: what its image processor does otherwise, for people; empty: it is run to find out.
    """

    kind: str
    architecture: str
    layouts: tuple[FileLayout, ...]
    data: Mapping[str, Any]
    image_key: str = ""
    processors: tuple[str, ...] = ()
    image_processor: str = ""
    images_by_row: bool = False
    image_is_word: bool = False
    newline: bool = False
    text_unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    # ---- reading

    @abstractmethod
    def sections(self, config: dict[str, Any], rows: int, normalisation: Normalisation) -> VLMSections:
        """The sections of a ``config.json``, which is given as it is; ``rows`` of the embedding in the files
        are 0 if there is none.

        Raises:
            InputError: a model of the class that ours cannot be.
        """

    def image_id(self, config: Mapping[str, Any]) -> int | None:
        """The token of an image; None: its texts have none."""
        key = next((key for key in ("image_token_index", "image_token_id") if key in config), "image_token_id")
        if not isinstance(found := config.get(key), int) or found < 0:
            raise InputError(f"{key} = {show(found)}: must be the id of a token")
        return found

    def end_id(self, config: dict[str, Any]) -> int | None:
        """The token that its class looks for at the end of a text; None: it looks for none."""
        return None

    def images(self, config: dict[str, Any], fit: str) -> ImagesConfig:
        """``data.images``; ``fit`` is what the files of the image processor say.

        Raises:
            InputError: ours cannot be so.
        """
        return ImagesConfig(fit=fit)

    def parameters(self, job: JobConfig) -> dict[str, Tensor]:
        """The parameters of ``job``'s model on the meta device, by our names."""
        return model_parameters(job)

    @abstractmethod
    def tensor_name(self, name: str, job: JobConfig, text_family: str, layout: FileLayout) -> str:
        """Our parameter name -> the one in files of this layout."""

    def is_unread(self, name: str, layout: FileLayout, used: Collection[str]) -> bool:
        """Whether our model does without a tensor of the files. ``used`` are the tensors that are parameters
        of ours.
        """
        return False

    # ---- writing

    @abstractmethod
    def check(self, job: JobConfig) -> str:
        """``model_type`` of the text model, if the class can be the model of ``job``.

        Raises:
            InputError: it cannot; the message says why.
        """

    def check_built(self, job: JobConfig, encoder: Any, tokenizer: Tokenizer) -> None:
        """Checks of what only the built model knows."""
        return

    @abstractmethod
    def config(self, job: JobConfig, encoder: Any, image_tokens: int, image_id: int | None, ids: Ids) -> dict[str, Any]:
        """The ``config.json`` of ``job``'s model, with ``image_tokens`` of one image. ``encoder`` is a tower
        of transformers; ``image_id`` is None without an ``image_key``.
        """

    @abstractmethod
    def tensors(self, job: JobConfig, encoder: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our parameters under the names of the first layout, and tensors that only the class has. With
        ``newline`` the embedding of new tokens is its vector, (D,).
        """

    # ---- running

    def class_inputs(self, inputs: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Arguments of the class's ``forward``.

        Args:
            inputs: "input_ids" (B, S) with the token of each image, "attention_mask", and "pixel_values" (N,
                3, H, H), row after row; each row has as many images.
            config: of the class.
        """
        inputs = dict(inputs)
        if self.images_by_row and "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].unflatten(0, (len(inputs["input_ids"]), -1))  # (B, images of a row, 3, H, W)
        return inputs


def arch_of(kind: str) -> str:
    """The arch that a class with this ``model_type`` is."""
    return next(name for name in registry.vlm_configs if kind in registry.vlm_configs.get(name).stands_for)


def tower_settings(config: Mapping[str, Any], known: Any) -> Settings:
    """``vision_encoder.settings`` of a tower's ``config.json``, sizes as one number.

    Args:
        known: a config of the tower's class.

    Raises:
        InputError: a size is no square.
    """
    sizes = {key: square_side(f"vision_config.{key}", config[key]) for key in ("image_size", "patch_size") if key in config}
    return {"model_type": known.model_type} | plain_settings(known, {**config, **sizes}, BOOKKEEPING)
