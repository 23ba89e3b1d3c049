"""What ``inspect`` shows: rows of the real training batches, their labels audited, their images on a contact sheet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kempnerforge.config import JobConfig
from kempnerforge.data.audit import audit, render_rows
from kempnerforge.data.contact_sheet import contact_sheet
from kempnerforge.training.setup import assemble


@dataclass(frozen=True)
class Inspection:
    """One stage's rows as text, what is wrong with them, and where its contact sheet lies."""

    name: str
    summary: str
    rows: list[str]
    findings: list[str]
    skipped: list[tuple[str, str]]
    sheet: Path | None


def inspect_stages(job: JobConfig, samples: int, step: int, out: Path, *, color: bool) -> Iterator[Inspection]:
    """Inspects the first ``samples`` rows of each stage from its step ``step`` on."""
    assembly = assemble(job, device="meta")
    for stage in assembly.stages:
        rows: list[str] = []
        findings: list[str] = []
        skipped: list[tuple[str, str]] = []
        pictures, captions = [], []
        useful = trained = positions = 0
        batches = assembly.batches(stage, stage.start + step)
        while len(rows) < samples:
            batch = next(batches)
            wanted = min(samples - len(rows), len(batch.sample_names))
            rows += render_rows(batch, assembly.tokenizer, color)[:wanted]
            findings += audit(batch, assembly.tokenizer.eos_id)
            skipped += batch.skipped
            useful, trained, positions = useful + batch.useful_tokens, trained + batch.num_targets, positions + batch.input_ids.numel()
            if batch.images is not None:
                placements = zip(batch.image_index.tolist(), batch.image_rows.tolist(), strict=True)
                for picture, row in dict.fromkeys(placements):  # an image that several texts hold is shown once
                    if row < wanted:
                        pictures.append(batch.images[picture].numpy())
                        captions.append(batch.sample_names[row])
        sheet = None
        if pictures:
            out.mkdir(parents=True, exist_ok=True)
            sheet = out / f"contact-sheet-{stage.name}.png"
            contact_sheet(np.stack(pictures), captions).save(sheet)
        summary = f"{useful / positions:.0%} of positions useful, {trained} of {useful} tokens trained"
        yield Inspection(stage.name, summary, rows, findings, skipped, sheet)
