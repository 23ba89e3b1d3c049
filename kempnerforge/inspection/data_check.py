"""``kempnerforge data check``: whole sources read in parallel, and what their sizes say about the job."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kempnerforge.config import DataConfig, JobConfig, Stage
from kempnerforge.data.source import Source
from kempnerforge.data.text.encode import Encoder
from kempnerforge.data.traces import KINDS, shared
from kempnerforge.eval.questions import HeldOut, examine
from kempnerforge.inspection.check_facts import Batching, RowLimits, batching_modes, distribution, recommended, row_limits
from kempnerforge.inspection.read_all import Found, SampleReader, is_stream, read_all, spread
from kempnerforge.inspection.rows_page import source_names
from kempnerforge.training.setup import Assembly, assemble
from kempnerforge.util.files import write_text

HELD_OUT = "held out"
SIZES = ("texts", "images", "views", "text_tokens", "trained", "positions")


@dataclass(frozen=True)
class CheckedPart:
    """One source of a mixture, or all there is.

    Attributes:
        totals: of ``SIZES``, over the samples that have a size.
    """

    name: str
    samples: int
    bad: int
    totals: dict[str, int]


@dataclass(frozen=True)
class Checked:
    """One source after reading.

    Attributes:
        name: the stages that train on it, or what is held out.
        total: samples that there are.
        now: the limits of the job; ``advice``: those that are recommended.
        modes: what each batching mode would make of it.
        held_out: its questions and answers, if it is held out.
    """

    name: str
    split: str
    total: int
    found: Found
    parts: list[CheckedPart]
    now: RowLimits
    advice: RowLimits
    modes: list[Batching]
    batching: str
    max_bad_fraction: float
    held_out: HeldOut | None = None

    @property
    def remarks(self) -> list[str]:
        """What keeps a score on it from being what it seems."""
        return self.held_out.remarks() if self.held_out is not None else []

    @property
    def bad_fraction(self) -> float:
        return len(self.found.bad) / max(len(self.found.indices), 1)

    @property
    def usable(self) -> bool:
        """Whether training would go through. A question may be asked that is too long to be trained on."""
        counted = [bad for bad in self.found.bad if self.held_out is None or bad.kind != "length"]
        most = self.max_bad_fraction * len(self.found.indices)
        return len(counted) <= most and not any(bad.kind == "crash" for bad in counted)

    @property
    def kinds(self) -> dict[str, int]:
        """Unusable samples by what is wrong with them."""
        return dict(Counter(bad.kind for bad in self.found.bad).most_common())

    def lengths(self, column: str) -> np.ndarray:
        """A column of ``Found.sizes``, of the samples that have one."""
        return self.found.column(column)[self.found.has_size]

    def as_json(self) -> dict[str, Any]:
        """All facts as plain values; unusable samples by kind alone."""
        return {
            "name": self.name,
            "split": self.split,
            "samples": self.total,
            "read": len(self.found.indices),
            "bad": len(self.found.bad),
            "bad_kinds": self.kinds,
            "bad_fraction": self.bad_fraction,
            "max_bad_fraction": self.max_bad_fraction,
            "usable": self.usable,
            "totals": {name: int(self.lengths(name).sum()) for name in SIZES},
            "distinct_images": self.found.distinct_images,
            "sources": [asdict(part) for part in self.parts],
            "text_tokens": distribution(self.lengths("text_tokens")),
            "positions": distribution(self.lengths("positions")),
            "limits": asdict(self.now),
            "recommended": asdict(self.advice),
            "made_of_values": self.found.remarks.lines(),
            "batching": self.batching,
            "modes": [asdict(mode) for mode in self.modes],
            **({"held_out": self.held_out.counts(), "remarks": self.remarks} if self.held_out is not None else {}),
        }


@dataclass(frozen=True)
class Leak:
    """Held-out samples that training has seen something of.

    Attributes:
        kind: of ``KINDS``, what they share; images byte by byte.
        count: how many; of images, how many of different content.
        pairs: (training sample, held-out sample) of all these held-out samples.
    """

    stages: str
    kind: str
    count: int
    pairs: list[tuple[str, str]]

    @property
    def warning(self) -> str:
        what = "images are in the training data, byte by byte" if self.kind == "image" else f"samples share {KINDS[self.kind]} with it"
        return f"stages {self.stages}: {self.count:,} of the held-out {what}"


def check_data(
    job: JobConfig, workers: int, limit: int, images: bool, begin: Callable[[str, int], Callable[[int], object]]
) -> tuple[list[Checked], list[Leak]]:
    """Reads the data of all stages, and what is held out.

    Args:
        limit: samples of each source, drawn by ``train.seed``, or the first ones of a stream; 0 reads all.
        begin: told the name of each source and how many samples are read; returns what is told of progress.

    Raises:
        ValueError: the data cannot be read at all.
    """
    assembly = assemble(job, device="meta")
    groups: list[list[Stage]] = []  # stages that train on the same
    for stage in assembly.stages:
        same = (g for g in groups if (g[0].data, g[0].train.seq_len) == (stage.data, stage.train.seq_len))
        group = next(same, None)
        groups.append([stage]) if group is None else group.append(stage)
    read = lambda name, source, stage: _check(assembly, name, source, stage, workers, limit, images, begin)
    checked = [read(", ".join(stage.name for stage in group), assembly.data.sources[group[0].index], group[0]) for group in groups]
    if assembly.data.held_out is None:
        return checked, []
    held_out = read(HELD_OUT, assembly.data.held_out, assembly.stages[-1])
    leaks = []
    for group, one in zip(groups, checked, strict=True):
        leaks += _leaks(one, held_out, assembly.data.sources[group[0].index], assembly.data.held_out)
    return [*checked, held_out], leaks


def _leaks(one: Checked, held_out: Checked, source: Source, tested: Source) -> Iterator[Leak]:
    for kind in KINDS:
        marks = one.found.marks[kind], held_out.found.marks[kind]
        if pairs := shared(*marks):
            count = len(np.intersect1d(marks[0].digests, marks[1].digests)) if kind == "image" else len(pairs)
            yield Leak(one.name, kind, count, [(source[a].id, tested[b].id) for a, b in pairs])


def _check(
    assembly: Assembly,
    name: str,
    source: Source,
    stage: Stage,
    workers: int,
    limit: int,
    images: bool,
    begin: Callable[[str, int], Callable[[int], object]],
) -> Checked:
    encoder, layout, job = assembly.data.encoder(stage), assembly.data.layouts[stage.index], assembly.job
    indices = spread(source, limit, job.train.seed)
    found = read_all(SampleReader(source, encoder, images), indices, 1 if is_stream(source) else workers, begin(name, len(indices)))
    return Checked(
        name=name,
        split=source.split,
        total=len(source),
        found=found,
        parts=_parts(source, stage.data, found),
        now=row_limits(found, layout.max_text_len, layout.seq_len),
        advice=recommended(found, layout),
        modes=batching_modes(found, source, layout, stage.train, stage.data.max_images_per_row) if source.split == "train" else [],
        batching=stage.data.batching,
        max_bad_fraction=stage.data.max_bad_fraction,
        held_out=_examined(source, encoder, job, found) if name == HELD_OUT else None,
    )


def _examined(source: Source, encoder: Encoder, job: JobConfig, found: Found) -> HeldOut:
    """The questions of what was read, without what would end an evaluation, too."""
    crashed = {bad.index for bad in found.bad if bad.kind == "crash"}
    chosen = [index for index in found.indices.tolist() if index not in crashed]
    return examine(source, encoder, job.eval, chosen=chosen, pictures=0)


def _parts(source: Source, cfg: DataConfig, found: Found) -> list[CheckedPart]:
    part_of = np.array([source.part(index) for index in found.indices.tolist()], dtype=np.int64)
    bad = {bad.index for bad in found.bad}
    is_bad = np.array([index in bad for index in found.indices.tolist()], dtype=bool)
    parts = []
    for number, name in enumerate(source_names(cfg)):
        in_part = part_of == number
        totals = {column: int(found.column(column)[in_part].sum()) for column in SIZES}
        parts.append(CheckedPart(name, int(in_part.sum()), int((is_bad & in_part).sum()), totals))
    return parts


def write_leaks(path: Path, leaks: list[Leak]) -> Path:
    """Writes all leaks, one JSON object a line."""
    found = [
        {"stages": leak.stages, "shared": leak.kind, "trained_on": trained, "held_out": tested}
        for leak in leaks
        for trained, tested in leak.pairs
    ]
    return write_text(path, "".join(json.dumps(line) + "\n" for line in found))


def write_bad_samples(path: Path, checked: list[Checked]) -> Path:
    """Writes all unusable samples, one JSON object a line."""
    about = [({"stages": one.name, "split": one.split}, asdict(bad)) for one in checked for bad in one.found.bad]
    return write_text(path, "".join(json.dumps(source | bad) + "\n" for source, bad in about))
