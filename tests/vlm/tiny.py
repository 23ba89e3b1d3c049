"""A job of every arch that is small enough to try everything on, and real batches for it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from kempnerforge.config import JobConfig, ModelConfig, Stage, TrainConfig, VLMConfig
from kempnerforge.config.adapter import MLPAdapterConfig
from kempnerforge.config.data import TextConfig
from kempnerforge.config.vision import ViTConfig
from kempnerforge.config.vlm import MASKS
from kempnerforge.data.batch import Batch
from kempnerforge.data.encode import Encoded, Encoder, collate, prompt_batch
from kempnerforge.data.images import load_image
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.tokenizer import Tokenizer
from kempnerforge.training.setup import assemble
from kempnerforge.vlm.base import VLM

SIZE = 16
"""Pixels of an image's side."""
VISION = ViTConfig(image_size=SIZE, patch_size=8, dim=16, n_layers=2, n_heads=2)  # 4 tokens
MODEL = ModelConfig(dim=32, n_layers=4, n_heads=2, max_seq_len=128)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["what colour is it?\n", "red", "blue", "is there a circle?\n", "yes", "no"] * 4, 300)


def picture(seed: int) -> bytes:
    """A PNG of noise."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


ONE = Sample("one image, one text", (picture(0),), (Text("what colour is it?", "red"),))
THREE = Sample("one image, three texts", (picture(1),), (Text("what colour?", "blue"), Text("is it red?", "no"), Text("is there a circle?", "yes")))
TWO_IMAGES = Sample("two images", (picture(2), picture(3)), (Text("what colour is it?", "blue red"),))
NO_IMAGE = Sample("no image, two texts", (), (Text("what?", "no"), Text("", "yes yes")))
SAMPLES = (ONE, THREE, TWO_IMAGES, NO_IMAGE)


def accepted_masks(arch: str | None) -> list[str]:
    """The values of ``attention_mask`` that the arch's config takes."""
    if arch is None:
        return ["causal"]
    found = []
    for mask in MASKS:
        try:
            VLMConfig.for_arch(arch, attention_mask=mask)
        except ValueError:
            continue
        found.append(mask)
    return found


def tiny_job(arch: str | None, mask: str = "causal", **sections: Any) -> JobConfig:
    """A job that any arch takes with its own defaults; None is a pure text run."""
    vlm = None if arch is None else VLMConfig.for_arch(arch, max_text_len=64, attention_mask=mask)
    train = TrainConfig(max_steps=4, seq_len=96, mixed_precision="fp32")
    fixed = {"model": MODEL, "vision_encoder": VISION, "adapter": MLPAdapterConfig(), "data": TextConfig(path="unread.txt"), "train": train}
    return JobConfig(**{"vlm": vlm, **fixed, **sections})


@dataclass
class Tiny:
    """A job put together, and what makes batches for it."""

    job: JobConfig
    model: VLM
    stages: list[Stage]
    encoder: Encoder

    @cached_property
    def patterns(self) -> dict[str, list[str]]:
        return self.job.vlm.module_patterns if self.job.vlm is not None else {}

    def encode(self, sample: Sample) -> Encoded:
        return self.encoder.encode(sample, seed=0)

    def batch(self, *samples: Sample, pad_to: int | None = None) -> Batch:
        """One row a sample, as in training."""
        return collate([self.encode(sample) for sample in samples], tokenizer().pad_id, pad_to)

    def prompts(self, rows: Iterable[tuple[str, Sequence[int]]], images: Sequence[bytes]) -> Batch:
        """A batch to generate from: each row has a prompt and indices into ``images``."""
        asked = list(rows)
        pixels = [torch.from_numpy(load_image(image, SIZE).copy()).permute(2, 0, 1) for image in images]
        return prompt_batch(
            [self.encoder.encode_prompt(prompt) for prompt, _ in asked],
            torch.stack(pixels) if self.model.has_images else None,
            [list(which) for _, which in asked],
            self.encoder.layout,
            tokenizer().pad_id,
        )


def tiny(arch: str | None, mask: str = "causal", *, device: str | None = None, noise: float = 0.1, **sections: Any) -> Tiny:
    """Builds a tiny job.

    Args:
        noise: added to all parameters, so that gates that start at zero are open and no two weights are the same by accident.
    """
    assembly = assemble(tiny_job(arch, mask, **sections), tokenizer(), device=device, data=False)
    if noise and device != "meta":
        shake(assembly.model, noise)
    return Tiny(assembly.job, assembly.model, assembly.stages, assembly.encoder(assembly.stages[0]))


@torch.no_grad()
def shake(model: nn.Module, noise: float) -> None:
    """Adds noise that depends on a parameter's name and shape alone."""
    for name, parameter in model.named_parameters():
        parameter += noise * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(sum(name.encode())))


def everywhere(batch: Batch) -> Batch:
    """The batch, asking for the logits of every position."""
    return replace(batch, targets=torch.arange(batch.input_ids.numel()))


@torch.no_grad()
def all_logits(model: nn.Module, batch: Batch) -> Tensor:
    """(B, S, V) of a full forward pass."""
    return model(everywhere(batch)).logits.unflatten(0, batch.input_ids.shape)


def gradients(model: nn.Module, *batches: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss over all trained tokens of ``batches``, and what it sends back to each parameter that it reaches."""
    targets = max(1, sum(batch.num_targets for batch in batches))
    loss = torch.zeros(())
    for batch in batches:
        part = model(batch).loss / targets
        part.backward()
        loss += part.detach()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
