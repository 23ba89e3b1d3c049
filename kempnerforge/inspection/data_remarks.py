"""What ``check`` and ``inspect`` say of the data after a glance at them: what was made of values, and what
training and evaluation share.
"""

from __future__ import annotations

from dataclasses import dataclass

from kempnerforge.config import Stage
from kempnerforge.data.sample import SampleError
from kempnerforge.data.source import Source
from kempnerforge.data.traces import KINDS, SampleDigests, Traces, image_digest, shared
from kempnerforge.inspection.read_all import is_stream, spread
from kempnerforge.inspection.remarks import Remarks
from kempnerforge.training.setup import Assembly

SAMPLES, OF_STREAMS = 4096, 256
"""Samples of a source that are looked at."""


@dataclass(frozen=True)
class Glance:
    """What some samples of a source show.

    Attributes:
        looked_at: how many, of ``total``.
    """

    remarks: Remarks
    marks: dict[str, SampleDigests]
    looked_at: int
    total: int


def glance(source: Source, seed: int) -> Glance:
    """Looks at samples of ``source`` as they are in its files; images are hashed and not decoded."""
    indices = spread(source, OF_STREAMS if is_stream(source) else SAMPLES, seed)
    remarks, traces = Remarks(), Traces(len(source))
    for index in indices:
        try:
            sample = source[index]
            traces.add(index, sample, [image_digest(image) for image in sample.images])
        except (SampleError, OSError):
            continue
        remarks.add(sample, source.asks(index))
    return Glance(remarks, traces.marks(), len(indices), len(source))


def data_remarks(assembly: Assembly) -> list[str]:
    """Warnings about the user's files: those that a package or a generator makes are not looked at."""
    seen: dict[str, list[Stage]] = {}
    seed = assembly.job.train.seed
    for stage in assembly.stages:
        if assembly.data.sources[stage.index].from_files:
            seen.setdefault(repr(stage.data), []).append(stage)
    held_out = (
        glance(assembly.data.held_out, seed) if assembly.data.held_out is not None and assembly.data.held_out.from_files and seen else None
    )
    found = []
    for stages in seen.values():
        name, one = ", ".join(stage.name for stage in stages), glance(assembly.data.sources[stages[0].index], seed)
        found += [f"data of stages {name}: {line}{_of(one)}" for line in one.remarks.lines()]
        if held_out is not None:
            pairs = {words: shared(one.marks[kind], held_out.marks[kind]) for kind, words in KINDS.items()}
            found += [
                f"stages {name}: {len(both):,} held-out samples share {words} with the training data{_of(one, held_out)}"
                for words, both in pairs.items()
                if both
            ]
    found += [f"held-out data: {line}{_of(held_out)}" for line in held_out.remarks.lines()] if held_out is not None else []
    return found


def _of(*glances: Glance) -> str:
    """How much was looked at, if that is not all."""
    parts = [f"{one.looked_at:,} of {one.total:,}" for one in glances if one.looked_at < one.total]
    return f" (of {' and '.join(parts)} samples that were looked at; data check reads all)" if parts else ""
