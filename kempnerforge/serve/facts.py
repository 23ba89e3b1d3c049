"""What the page says of the model."""

from __future__ import annotations

from pathlib import Path

from kempnerforge.eval.draw import COLOURS
from kempnerforge.inference.model import TrainedModel
from kempnerforge.serve.request import MAX_IMAGES
from kempnerforge.util.numbers import format_number


def facts_of(model: TrainedModel) -> dict[str, object]:
    """Plain values for the page: ``name``, ``about`` (rows that are shown), and what the model takes."""
    job = model.assembly.job
    count = sum(parameter.numel() for parameter in model.assembly.model.parameters())
    about = {
        "checkpoint": model.path.name,
        "architecture": "text" if job.vlm is None else job.vlm.arch,
        "parameters": format_number(count),
        "device": model.device.type,
    }
    return {
        "name": _name(model.path),
        "about": about,
        "has_images": model.has_images,
        "has_turns": model.has_turns,
        "max_images": MAX_IMAGES,
        "colours": list(COLOURS),
    }


def _name(path: Path) -> str:
    """Of the run that a checkpoint belongs to."""
    path = path.resolve()
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.name
