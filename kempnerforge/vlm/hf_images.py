"""The contract between ``arch = "hf"`` and a class of transformers about images: all images of a job are
squares of one size, so that each takes the same number of positions.

Shapes: B rows, S positions, N images, F tokens of one image, D width, H pixels along a side.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from kempnerforge.data.batching.batch import Batch, Kind
from kempnerforge.model.transformer import Cache
from kempnerforge.util.errors import InputError

FIRST_POSITION = {"paligemma": 1}
"""``model_type`` -> where it begins to count positions, if not at 0."""


class SquareImages:
    """A class that takes squares of its own size as ``pixel_values`` alone; subclasses are for others.

    Args:
        where: the key of ``image_size``, for messages.
        model: of transformers.
        image_size: pixels along a side.

    Raises:
        ValueError: the class cannot take images of this size.
    """

    any_size: ClassVar[bool] = False
    """The class takes images of any size, so that ``vlm.image_size`` must say it."""

    adds_features: ClassVar[bool] = False
    """Features of inner layers follow the tokens along D."""

    reads_kinds: ClassVar[bool] = False
    """The class itself places images by ``mm_token_type_ids``."""

    counted: ClassVar[tuple[str, ...]] = ("image_seq_length", "mm_tokens_per_image", "num_image_tokens")
    """Keys of ``config.json`` that say F."""

    def __init__(self, where: str, model: Any, image_size: int) -> None:
        self.model = model

    def cut(self, images: Tensor) -> Tensor:
        """The views that the class takes of ``images`` (N, 3, H, H) uint8, their pixels in the last three
        dimensions.
        """
        return images

    def arguments(self, pixels: Tensor) -> dict[str, Any]:
        """The arguments of the class that hold normalised views."""
        return {"pixel_values": pixels}

    def features(self, pixels: Tensor) -> Tensor:
        """Normalised views -> (N, F, D), and with ``adds_features`` what follows D."""
        found = self.model.get_image_features(**self.arguments(pixels), return_dict=True).pooler_output
        return found if isinstance(found, Tensor) else torch.stack(list(found))  # (N, F, D)

    def positions(self, batch: Batch, cache: Cache | None) -> Tensor:
        """(B, S) of the batch, or (3, B, S)."""
        return batch.positions + FIRST_POSITION.get(self.model.config.model_type, 0)

    def ids(self, batch: Batch, image_id: int) -> Tensor:
        """(B, S): the batch's ids with the class's own at the positions of images."""
        return batch.input_ids.masked_fill(batch.kinds == Kind.IMAGE, image_id)


class Framed(SquareImages):
    """Idefics 3 and SmolVLM. Their own method takes rows of images and drops those whose pixels are all 0."""

    def features(self, pixels: Tensor) -> Tensor:
        core = self.model.model
        vision = core.vision_model
        side = pixels.shape[-1] // vision.config.patch_size
        whole = torch.ones(len(pixels), side, side, dtype=torch.bool, device=pixels.device)  # no patch is padding
        x = vision.embeddings(pixel_values=pixels, patch_attention_mask=whole)
        x = vision.encoder(inputs_embeds=x, attention_mask=None).last_hidden_state
        return self.connected(vision.post_layernorm(x))

    def connected(self, x: Tensor) -> Tensor:
        """Patches of the tower -> (N, F, D)."""
        return self.model.model.connector(x)


class Resampled(Framed):
    """Idefics 2, which takes any size and resamples its patches (Laurencon et al. 2024, arXiv 2405.02246)."""

    any_size = True

    def __init__(self, where: str, model: Any, image_size: int) -> None:
        super().__init__(where, model, image_size)
        vision = model.config.vision_config
        check_multiple(where, model, image_size, vision.patch_size, vision.image_size)

    def arguments(self, pixels: Tensor) -> dict[str, Any]:
        return {"pixel_values": pixels[:, None]}

    def connected(self, x: Tensor) -> Tensor:
        connector = self.model.model.connector
        resampler, x = connector.perceiver_resampler, connector.modality_projection(x)
        found = resampler.latents.expand(len(x), -1, -1)  # (N, F, D)
        for layer in resampler.layers:
            found = layer(found, x, attention_mask=None, position_ids=None)
        return resampler.norm(found)


def check_multiple(where: str, model: Any, image_size: int, pixels: int, most: int = 0) -> None:
    """
    Args:
        where: the key of ``image_size``.
        pixels: along the side of the smallest square that a class of any size takes.
        most: that it takes; 0: no limit.

    Raises:
        ValueError: ``image_size`` is no multiple of ``pixels``, or more than ``most``.
    """
    if not image_size or image_size % pixels or (most and image_size > most):
        limit, example = (f", at most {most}", most // pixels) if most else ("", 16)
        raise InputError(
            f"{where} = {image_size}: {type(model).__name__} takes images of any size; choose a multiple of {pixels}{limit}, "
            f"such as {example * pixels}"
        )
