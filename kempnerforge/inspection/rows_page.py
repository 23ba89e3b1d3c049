"""What ``inspect`` shows: rows of real training batches with audited labels, as text, values and a page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from kempnerforge.config import DataConfig, JobConfig, Stage
from kempnerforge.data.batching.batch import Batch
from kempnerforge.inspection.audit import audit, render_row
from kempnerforge.inspection.audit_page import row_card, row_facts
from kempnerforge.inspection.audit_rows import AuditRow, rows_of
from kempnerforge.inspection.contact_sheet import contact_sheet
from kempnerforge.inspection.data_remarks import glance
from kempnerforge.report.page import write_page
from kempnerforge.training.setup import Assembly, assemble
from kempnerforge.util.numbers import counted

MAX_BATCHES = 16
"""Micro-batches that are read at most to see samples of each part of a mixture."""
MAX_NUMBERED = 64
"""Images of a sample whose number may be before them."""
SHARES = ("positions", "padding", "image", "prompt", "trained")


@dataclass
class Inspection:
    """What was seen of one stage.

    Attributes:
        shares: positions of all rows read, by kind.
        parts: of each section: samples and texts read, texts shown, and positions by kind.
        facts: the same as plain values, see ``row_facts``.
        findings: what is wrong, over all rows read.
        skipped: (sample, reason) of those that could not be used, each once.
        sheet: the contact sheet, where there are images.
        notes: of ``JobData.notes``, and what was made of values in the user's files.
    """

    name: str
    sources: list[str]
    shares: Counter[str] = field(default_factory=Counter)
    parts: list[Counter[str]] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    cards: list[Markup] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    texts_left_out: int = 0
    sheet: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        useful = self.shares["positions"] - self.shares["padding"]
        return f"{useful / max(self.shares['positions'], 1):.0%} of positions useful, {self.shares['trained']} of {useful} tokens trained"

    def as_json(self) -> dict[str, Any]:
        """All of it but the pictures, as plain values."""
        return {
            "name": self.name,
            "useful_share": 1 - self.shares["padding"] / max(self.shares["positions"], 1),
            "shares": {key: self.shares[key] for key in SHARES},
            "sources": [{"source": source, **counts} for source, counts in zip(self.sources, self.parts, strict=True)],
            "rows": self.facts,
            "findings": self.findings,
            "notes": self.notes,
            "skipped": [{"sample": sample, "reason": reason} for sample, reason in self.skipped],
            "texts_left_out": self.texts_left_out,
            "contact_sheet": str(self.sheet) if self.sheet else None,
        }


def inspect_stages(job: JobConfig, samples: int, step: int, out: Path, *, color: bool) -> Iterator[Inspection]:
    """Inspects each stage from its step ``step`` on: rows with the first ``samples`` samples of each of its
    sources. A row of several samples is shown whole.
    """
    assembly = assemble(job, device="meta")
    for stage in assembly.stages:
        yield _inspect(assembly, stage, samples, step, out, color)


def source_names(cfg: DataConfig) -> list[str]:
    """A name for each section of ``cfg``: its source, with a number where several have the same."""
    kinds = [section.source for section in cfg.sections()]
    return [kind if kinds.count(kind) == 1 else f"{kind} #{kinds[: at + 1].count(kind)}" for at, kind in enumerate(kinds)]


def _inspect(assembly: Assembly, stage: Stage, samples: int, step: int, out: Path, color: bool) -> Inspection:
    sources = source_names(stage.data)
    found = Inspection(stage.name, sources, parts=[Counter(dict.fromkeys(("samples", "texts", "shown", *SHARES), 0)) for _ in sources])
    source = assembly.data.sources[stage.index]
    encoder, tokenizer = assembly.data.encoder(stage), assembly.tokenizer
    made = glance(source, assembly.job.train.seed).remarks.lines() if source.from_files else []
    found.notes = [*assembly.data.notes(stage), *made]
    ends = frozenset[int]().union(*(texts.ends for texts in encoder.texts))
    every_turn = all(texts.template.end or texts.cfg.template != "chat" for texts in encoder.texts)
    markers = encoder.marker_ids.union(*(tokenizer.encode(f"<image: {k}>") for k in range(MAX_NUMBERED)))
    pictures: list[np.ndarray] = []
    captions: list[str] = []
    for batch in _some(assembly.data.batches(stage, stage.start + step), found.parts, samples):
        found.findings += audit(batch, tokenizer.eos_id, ends=ends, every_turn=every_turn, markers=markers)
        found.skipped += [bad for bad in dict.fromkeys(batch.skipped) if bad not in found.skipped]
        found.texts_left_out += batch.texts_left_out
        for number, row in enumerate(rows_of(batch)):
            shown = any(found.parts[part]["shown"] < samples for part in row.parts)
            _count(found, row, shown)
            if not shown:
                continue
            found.rows.append(render_row(row, number, tokenizer, color, tokenizer.special_names))
            facts = row_facts(row, number, tokenizer, tokenizer.special_names)
            found.facts.append(facts)
            found.cards.append(row_card(facts, None if batch.images is None else batch.images.numpy(), sources))
            views, texts = _views(batch, row)
            pictures += views
            captions += texts
    if pictures:
        out.mkdir(parents=True, exist_ok=True)
        name = stage.name if re.fullmatch(r"[\w .-]{1,50}", stage.name) else f"stage-{stage.index + 1}"
        found.sheet = out / f"contact-sheet-{name}.png"
        contact_sheet(np.stack(pictures), captions).save(found.sheet)
    return found


def _some(batches: Iterator[Batch], parts: Sequence[Counter[str]], samples: int) -> Iterator[Batch]:
    """Batches until enough is seen of each part, or ``MAX_BATCHES``."""
    for batch, _ in zip(batches, range(MAX_BATCHES), strict=False):
        yield batch
        if all(part["shown"] >= samples for part in parts):
            return


def _count(found: Inspection, row: AuditRow, shown: bool) -> None:
    found.shares.update(row.shares())
    for sample, part in enumerate(row.parts):
        texts = {segment.text for segment in row.segments if segment.sample == sample and segment.text}
        found.parts[part].update(row.shares(sample))
        found.parts[part].update(samples=1, texts=len(texts), shown=int(shown))


def _views(batch: Batch, row: AuditRow) -> tuple[list[np.ndarray], list[str]]:
    """The images of a row, each once, and the samples that they are of."""
    assert batch.images is not None or not row.images
    owners = {image.picture: row.samples[image.sample] for image in reversed(row.images)}
    views = [] if batch.images is None else [batch.images[picture].numpy() for picture in sorted(owners)]
    return views, [owners[picture] for picture in sorted(owners)]


# ---- the page ------------------------------------------------------------------------------------


def write_inspection(path: Path, title: str, stages: Sequence[Inspection]) -> Path:
    """Writes what was found of ``stages`` as a page."""
    wrong = sum(len(stage.findings) for stage in stages)
    sections = [_section(stage) for stage in stages]
    return write_page(
        path, "inspect.html", title=f"{title}: what is trained", wrong=counted(wrong, "finding") if wrong else "", stages=sections
    )


def _section(stage: Inspection) -> dict[str, Any]:
    columns = ("samples", "texts", "positions", "image", "prompt", "trained")
    total = max(stage.shares["positions"], 1)
    return {
        "name": stage.name,
        "summary": stage.summary,
        "notes": stage.notes,
        "kinds": [
            (kind, 100 * stage.shares[kind] / total, f"{stage.shares[kind]:,}") for kind in ("image", "prompt", "trained", "padding")
        ],
        "findings": stage.findings,
        "head": ("source", *columns),
        "rows": [(name, *(f"{part[key]:,}" for key in columns)) for name, part in zip(stage.sources, stage.parts, strict=True)],
        "skipped": stage.skipped,
        "left_out": counted(stage.texts_left_out, "text") if stage.texts_left_out else "",
        "cards": stage.cards,
    }
