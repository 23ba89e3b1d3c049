"""``complete.json``, written last: the checkpoint and config that the results in a run directory belong to.

Without one that fits, a run is not complete.
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
"""Keys that do not change the results."""


@dataclass(frozen=True)
class Complete:
    """A complete run.

    Attributes:
        step: the last one.
        checkpoint: CRC-32 of its manifest, which has the checksums of all its files.
        config: of training and evaluation.
        files: CRC-32 of each result.
    """

    step: int
    checkpoint: int
    config: dict[str, Any]
    files: dict[str, int]


def write_complete(run_dir: Path, step: int, config: Mapping[str, Any]) -> None:
    """Records that the results of ``step`` are complete. Its checkpoint must exist."""
    manifest = Manifest.decode((run_dir / "checkpoints" / f"step-{step:08d}" / MANIFEST).read_bytes())
    record = Complete(step, manifest.crc32, dict(config), {name: checksum(run_dir / name).crc32 for name in (SUMMARY, REPORT)})
    write_text(run_dir / NAME, json.dumps(asdict(record), indent=1) + "\n")


def is_complete(run_dir: Path, manifest: Manifest, config: Mapping[str, Any]) -> bool:
    """Whether the results in ``run_dir`` belong to the checkpoint with ``manifest`` and to ``config``."""
    try:
        record = build_record(Complete, "complete", read_object(run_dir / NAME), NAME)
        files = {name: checksum(run_dir / name).crc32 for name in (SUMMARY, REPORT)}
    except (OSError, ValueError):
        return False
    evaluated = not [line for line in diff(record.config, config) if not line.startswith(WITHOUT_EFFECT)]
    return evaluated and (record.step, record.checkpoint, record.files) == (manifest.step, manifest.crc32, files)


def remove_results(run_dir: Path) -> None:
    """Removes the results before the run is continued."""
    for name in (NAME, SUMMARY, REPORT):  # in this order: a kill in between leaves no record
        if (path := run_dir / name).is_dir():
            move_aside(path)
        else:
            path.unlink(missing_ok=True)
