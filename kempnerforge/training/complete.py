"""``complete.json``, written last of all: of which checkpoint, config and evaluation the results in a run directory are. Without one that fits,
a run is not complete, whatever else lies there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kempnerforge.checkpoint.manifest import NAME as MANIFEST
from kempnerforge.checkpoint.manifest import Manifest, checksum
from kempnerforge.config import diff
from kempnerforge.config.build import build_record
from kempnerforge.util.files import move_aside, write_text
from kempnerforge.util.reading import read_object

NAME = "complete.json"
SUMMARY, REPORT = "summary.json", "report.html"
WITHOUT_EFFECT = (
    "run.", "metrics.", "checkpoint.", "distributed.", "plugins", "data.num_workers", "data.image_cache_mib", "train.grad_accum_steps",
)  # fmt: skip
"""Keys that the results do not depend on."""


@dataclass(frozen=True)
class Complete:
    """What was complete.

    Attributes:
        step: the last one.
        checkpoint: CRC-32 of its manifest, and so of all that is in it.
        config: by which it was trained and evaluated.
        files: CRC-32 of each result.
    """

    step: int
    checkpoint: int
    config: dict[str, Any]
    files: dict[str, int]


def write_complete(run_dir: Path, step: int, config: Mapping[str, Any]) -> None:
    """Says that the results of ``step`` are there. Its checkpoint is, too."""
    manifest = Manifest.decode((run_dir / "checkpoints" / f"step-{step:08d}" / MANIFEST).read_bytes())
    record = Complete(step, manifest.crc32, dict(config), {name: checksum(run_dir / name).crc32 for name in (SUMMARY, REPORT)})
    write_text(run_dir / NAME, json.dumps(asdict(record), indent=1) + "\n")


def is_complete(run_dir: Path, manifest: Manifest, config: Mapping[str, Any]) -> bool:
    """Whether the results in ``run_dir`` are those of the checkpoint with ``manifest``, evaluated as ``config`` says."""
    try:
        record = build_record(Complete, "complete", read_object(run_dir / NAME), NAME)
        there = {name: checksum(run_dir / name).crc32 for name in (SUMMARY, REPORT)}
    except (OSError, ValueError):
        return False
    evaluated = not [line for line in diff(record.config, config) if not line.startswith(WITHOUT_EFFECT)]
    return evaluated and (record.step, record.checkpoint, record.files) == (manifest.step, manifest.crc32, there)


def remove_results(run_dir: Path) -> None:
    """Takes the results away before the run goes on: those of fewer steps, or of another evaluation, are not its own."""
    for name in (NAME, SUMMARY, REPORT):  # in this order: a kill in between leaves no record
        if (path := run_dir / name).is_dir():
            move_aside(path)
        else:
            path.unlink(missing_ok=True)
