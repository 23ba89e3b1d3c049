"""What one section of a job may read of the others."""

from __future__ import annotations

from typing import Protocol

from kempnerforge.config.adapter import AdapterConfig
from kempnerforge.config.freeze import FreezeSpec
from kempnerforge.config.model import ModelConfig
from kempnerforge.config.training import DistributedConfig, RunConfig, TrainConfig
from kempnerforge.config.vision import VisionEncoderConfig


class JobSections(Protocol):
    """What a ``[vlm]`` section may read of its job; a ``JobConfig`` is one."""

    run: RunConfig
    model: ModelConfig
    vision_encoder: VisionEncoderConfig
    adapter: AdapterConfig
    train: TrainConfig
    distributed: DistributedConfig

    def freeze_at(self, step: int) -> tuple[FreezeSpec, ...]:
        """The freeze specs that apply at ``step``."""
        ...
