"""L0: what a job is. Dataclasses for the sections of a TOML file, the strict loader, the registries. Imports
no torch.
"""

from __future__ import annotations

from kempnerforge.config import registry
from kempnerforge.config.adapter import AdapterConfig
from kempnerforge.config.data import DataConfig
from kempnerforge.config.dump import diff, to_dict, to_toml
from kempnerforge.config.job import JobConfig
from kempnerforge.config.loader import load_config
from kempnerforge.config.lora import LoRAConfig
from kempnerforge.config.model import ModelConfig, RopeScaling
from kempnerforge.config.optimizer import OptimizerConfig, OptimizerGroup
from kempnerforge.config.schedule import SchedulerConfig
from kempnerforge.config.stages import Stage, StageConfig
from kempnerforge.config.training import (
    CheckpointConfig,
    DistributedConfig,
    EvalConfig,
    HookConfig,
    MetricsConfig,
    RunConfig,
    TrackerConfig,
    TrainConfig,
)
from kempnerforge.config.vision import VisionEncoderConfig
from kempnerforge.config.vlm import CrossAttentionConfig, FreezeSpec, FreezeStage, JointDecoderConfig, MoMaConfig, MoTConfig, VLMConfig
from kempnerforge.config.vlm_dual_encoder import DualEncoderConfig
from kempnerforge.config.vlm_hf import HFConfig
from kempnerforge.util.errors import ConfigError, InputError

__all__ = [
    "AdapterConfig",
    "CheckpointConfig",
    "ConfigError",
    "CrossAttentionConfig",
    "DataConfig",
    "DistributedConfig",
    "DualEncoderConfig",
    "EvalConfig",
    "FreezeSpec",
    "FreezeStage",
    "HFConfig",
    "HookConfig",
    "InputError",
    "JobConfig",
    "JointDecoderConfig",
    "LoRAConfig",
    "MetricsConfig",
    "MoMaConfig",
    "MoTConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OptimizerGroup",
    "RopeScaling",
    "RunConfig",
    "SchedulerConfig",
    "Stage",
    "StageConfig",
    "TrackerConfig",
    "TrainConfig",
    "VLMConfig",
    "VisionEncoderConfig",
    "diff",
    "load_config",
    "registry",
    "to_dict",
    "to_toml",
]
