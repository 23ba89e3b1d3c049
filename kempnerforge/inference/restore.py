"""A checkpoint as a model to use: for evaluation and generation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kempnerforge.checkpoint import load_weights, reading
from kempnerforge.config import load_config
from kempnerforge.config.plugins import plugin_changes, plugins_of
from kempnerforge.distributed.world import compute_dtype
from kempnerforge.model.lora import merge_adapters
from kempnerforge.training.run_state import RunState
from kempnerforge.training.setup import Assembly, assemble, saved_tokenizer
from kempnerforge.util.paths import place_of

LOG = logging.getLogger("kempnerforge")


@dataclass(frozen=True)
class Restored:
    """A trained model in its compute dtype, in evaluation mode, LoRA adapters folded into its weights.

    Attributes:
        path: the checkpoint directory.
        as_written: no override changes how it is asked.
    """

    path: Path
    state: RunState
    assembly: Assembly
    device: torch.device
    as_written: bool = True


def restore(path: Path, overrides: Sequence[str] = ()) -> Restored:
    """Loads a checkpoint, or the newest one of a run directory, without its data.

    Args:
        overrides: of the config that the checkpoint holds.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ValueError: the overrides do not fit.
    """
    return reading(place_of(path), lambda found: _restore(found, overrides))


def _restore(path: Path, overrides: Sequence[str]) -> Restored:
    job = load_config(path / "config.toml", overrides)
    encoder = job.vision_encoder
    assembly = assemble(replace(job, vision_encoder=encoder.without_weights()), saved_tokenizer(path), data=False)
    assembly.job = replace(assembly.job, vision_encoder=encoder)
    manifest = load_weights(path, assembly.model)
    state = RunState.of(manifest, str(path))
    assembly.asked = state.asked
    for span in state.history[-1:]:
        for line in plugin_changes(span.plugins, plugins_of(job.plugins), path):
            LOG.warning("%s: this is not what it was trained with: %s", path, line)
    merge_adapters(assembly.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(job.train.mixed_precision, device)
    assembly.model.to(device, dtype).eval()
    moved = [override for override in overrides if override.startswith("--plugins=")]
    as_written = not overrides or load_config(path / "config.toml", moved).data == job.data
    return Restored(path, state, assembly, device, as_written)
