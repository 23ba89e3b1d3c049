"""One batch through a class of transformers and through our model: whether they are the same function.

Shapes: B rows, S positions, N images, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kempnerforge.config.errors import InputError, library_call
from kempnerforge.data.batch import Batch, Kind
from kempnerforge.data.collate import prompt_batch
from kempnerforge.data.interleave import Prompt
from kempnerforge.interop import mllama
from kempnerforge.interop.vlms import WRAPPERS
from kempnerforge.model.quiet import quiet
from kempnerforge.training.setup import Assembly
from kempnerforge.vlm.base import VLM

ROWS, WORDS, ANSWER, BEFORE = 2, 11, 4, 3
"""Of the batch: rows, tokens of a row, how many of them are the answer, and how many stand before the image."""
TOLERANCE = 1e-4
"""Of the largest difference between two logits, in units of the largest logit, both computed in fp32."""


@dataclass(frozen=True)
class Agreement:
    """How far two models are apart on a batch.

    Attributes:
        difference: the largest one of two logits.
        scale: the largest logit.
    """

    difference: float
    scale: float

    def require(self, what: str, tolerance: float = TOLERANCE) -> str:
        """A line that says so.

        Raises:
            ValueError: they are further apart than ``tolerance`` times ``scale``.
        """
        line = f"logits of {what}: max|difference| {self.difference:.2g}, max|logit| {self.scale:.3g}"
        if not self.difference <= tolerance * self.scale:
            raise InputError(f"{line}; more than {tolerance:g} of it: these are two different models")
        return line


@dataclass(frozen=True)
class Probe:
    """A batch for our model, and the same for transformers."""

    batch: Batch
    inputs: dict[str, Tensor]


def make_probe(assembly: Assembly, image_id: int | None, vocab_size: int) -> Probe:
    """Random words, an answer at their end, and a random image in each row: in front where image and prompt see each other (as the classes
    have it), else behind a few words.

    Args:
        image_id: what stands at the positions of an image in transformers. Where images take no position it is a word of the stream.
        vocab_size: words are drawn from so many.
    """
    rng = torch.Generator().manual_seed(0)
    allowed = torch.tensor([i for i in range(min(vocab_size, 10_000)) if i != image_id])
    words = allowed[torch.randint(len(allowed), (ROWS, WORDS), generator=rng)]  # (B, words)
    model, layout = assembly.model, assembly.layout
    images = None
    if model.has_images:
        images = torch.randint(256, (ROWS, 3, layout.image_size, layout.image_size), generator=rng, dtype=torch.uint8)
    prefix = model.attention_mask == "prefix"
    at = () if images is None else (0 if prefix else BEFORE,)
    if at and image_id is not None and not layout.image_tokens:
        words = torch.cat([words[:, : at[0]], words.new_full((ROWS, 1), image_id), words[:, at[0] :]], dim=1)
    batch = prompt_batch([Prompt(row.tolist(), at) for row in words], images, None, layout, 0)
    kinds = batch.kinds.clone()
    kinds[:, -ANSWER:] = Kind.ANSWER
    batch = replace(batch, kinds=kinds, targets=torch.arange(kinds.numel()))
    ids = batch.input_ids
    inputs = {"attention_mask": torch.ones_like(ids)}
    if images is not None and image_id is not None:
        ids = ids.masked_fill(kinds == Kind.IMAGE, image_id)
        inputs["pixel_values"] = model.normalise(images)
        if model.attention_mask != "causal":  # what their classes go by
            inputs["token_type_ids"] = (kinds == (Kind.ANSWER if prefix else Kind.IMAGE)).long()
    return Probe(batch, inputs | {"input_ids": ids})


def load_class(path: Path, architecture: str) -> Any:
    """A model of transformers in fp32, every one of whose parameters has been read.

    Raises:
        ValueError: it cannot be loaded, or keys are missing, left over or of another shape.
    """
    import transformers

    cls = getattr(transformers, architecture)
    with library_call(str(path), f"{architecture} of transformers does not load it"), quiet():
        model, info = cls.from_pretrained(path, dtype=torch.float32, output_loading_info=True, local_files_only=True)
    kinds = {"missing": info["missing_keys"], "left over": info["unexpected_keys"], "of another shape": info["mismatched_keys"]}
    if wrong := [f"{kind}: {', '.join(map(str, sorted(keys)[:3]))}" for kind, keys in kinds.items() if keys]:
        raise InputError(f"{path}: {architecture} finds keys {'; '.join(wrong)}")
    return model.eval()


@torch.no_grad()
def our_logits(model: VLM, batch: Batch) -> Tensor:
    """(B, S, V) of a model on the CPU in fp32."""
    return model(batch).logits.view(*batch.input_ids.shape, -1)


@torch.no_grad()
def their_logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, S, V)."""
    inputs, wrapper = dict(inputs), WRAPPERS.get(model.config.model_type)
    if model.config.model_type == mllama.KIND:
        inputs = mllama.class_inputs(inputs, model.config)
    if wrapper is not None and wrapper.images_by_row:
        inputs["pixel_values"] = inputs["pixel_values"][:, None]  # (B, images of a row, 3, H, W)
    with library_call(model.config.model_type, f"{type(model).__name__} of transformers cannot run what it has loaded"):
        return model(**inputs, use_cache=False).logits.float()


def agreement(ours: Tensor, theirs: Tensor) -> Agreement:
    """Of (B, S, V) logits; rows of the vocabulary that only one of them has are left out."""
    size = min(ours.shape[-1], theirs.shape[-1])
    difference = (ours[..., :size] - theirs[..., :size]).abs().max()
    return Agreement(difference.item(), ours[..., :size].abs().max().item())
