"""A study of runs that take seconds."""

from __future__ import annotations

from pathlib import Path

from tests.training.tiny import CONFIG, make_job

STUDY = """
[study]
name = "tiny"
dir = "{folder}/study"
seeds = [0, 1]

[study.axes.arch]
joint.vlm.arch = "joint_decoder"
cross.vlm = { arch = "cross_attention", cross_attention_every_n_layers = 1 }
"""


def make_study(folder: Path, study: str = STUDY, *, config: str = CONFIG) -> Path:
    """Writes the data and the study; returns its path."""
    return make_job(folder, config=config, extra=study.replace("{folder}", str(folder)))
