"""What each span of a run's steps was trained with: in the manifest of every checkpoint, under "history".

A span begins where the run began or went on with something that matters for what is learned; it ends where the next one begins. A run that was
stopped and continued as it was stays one span.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import torch

from kempnerforge.config import JobConfig, diff, to_dict
from kempnerforge.config.plugins import PluginRecord, plugins_of, record_plugins
from kempnerforge.distributed.world import World, compute_dtype
from kempnerforge.training.setup import Assembly
from kempnerforge.util.version import __version__

LIBRARIES = ("numpy", "pillow", "tokenizers", "transformers", "safetensors")
"""Besides torch: those through which data and weights go."""


@dataclass(frozen=True)
class StageRecord:
    """A stage in short: its steps, the samples of each, and where they are from."""

    name: str
    start: int
    end: int
    samples: int
    data: list[str]


@dataclass(frozen=True)
class Span:
    """What some steps were trained with. It is kept as plain JSON.

    Attributes:
        start: its first step.
        config: as it was given, before ``assemble`` resolved what depends on the tokenizer.
        data: fingerprints, by what the data are for.
        world_size: processes.
        versions: of this package, Python and libraries.
        machine: the device, its threads and what it computes in: with others the last bits of a result may be others.
    """

    start: int
    config: dict[str, Any]
    plugins: list[PluginRecord]
    stages: list[StageRecord] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)
    world_size: int = 1
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.start < 0 or self.world_size < 1:
            raise ValueError(f"start = {self.start}, world_size = {self.world_size}: must be at least 0 and 1")


ASIDE = ("run.", "metrics.", "eval.", "checkpoint.", "data.num_workers", "data.image_cache_mib", "distributed.timeout_s", "plugins")
"""Keys that make no span of their own; of them the newest are kept. (Plugins are compared by their source.)"""


def span(job: JobConfig, assembly: Assembly, world: World) -> Span:
    """What the next steps are trained with; its ``start`` is 0.

    Args:
        job: as it was given.
    """
    stages = [
        StageRecord(
            name=stage.name,
            start=stage.start,
            end=stage.end,
            samples=stage.train.batch_size,
            data=[f"`{section.source}`{_path(section)}" for section in stage.data.sections()],
        )
        for stage in assembly.stages
    ]
    dtype = str(compute_dtype(job.train.mixed_precision, world.device)).removeprefix("torch.")
    return Span(
        start=0,
        config=to_dict(job),
        plugins=record_plugins(plugins_of(job.plugins)),
        stages=stages,
        data=dict(assembly.fingerprints),
        world_size=world.size,
        versions=_versions(),
        machine=_machine(world.device) | {"compute dtype": dtype},
    )


def _versions() -> dict[str, str]:
    own = {"kempnerforge": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    return own | {name: version(name) for name in LIBRARIES}


def _machine(device: torch.device) -> dict[str, str]:
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return {"device": f"CPU with {torch.backends.cpu.get_cpu_capability()}", "threads": str(torch.get_num_threads())}


def _path(section: Any) -> str:
    return f" ({section.path})" if getattr(section, "path", "") else ""


def continued(before: Sequence[Span], step: int, now: Span) -> list[Span]:
    """The spans of a run that goes on at ``step`` with ``now``. Spans that began there or later have left no trace."""
    kept = [span for span in before if span.start < step]
    if kept and not changes(kept[-1], now):
        return [*kept[:-1], replace(now, start=kept[-1].start)]
    return [*kept, replace(now, start=step)]


def changes(old: Span, new: Span) -> list[str]:
    """What is different between two spans, a line each."""
    lines = [line for line in diff(old.config, new.config) if not line.startswith(ASIDE)]
    plugins = [{entry.sha256: entry.name for entry in span.plugins} for span in (old, new)]
    if plugins[0].keys() != plugins[1].keys():
        a, b = (", ".join(f"{name} ({sha[:8]})" for sha, name in part.items()) or "none" for part in plugins)
        lines.append(f"plugins: {a} -> {b}")
    lines += [f"processes: {old.world_size} -> {new.world_size}"] if old.world_size != new.world_size else []
    other = sorted(name for name in old.data.keys() & new.data.keys() if old.data[name] != new.data[name])
    return [*lines, *otherwise(old, new), *([f"the data ({', '.join(other)})"] if other else [])]


def otherwise(old: Span, new: Span) -> list[str]:
    """What is different of machine and libraries, as far as the older span says: the last bits of all results may be others there."""
    lines: list[str] = []
    for before, after in ((old.machine, new.machine), (old.versions, new.versions)):
        both = [(name, before[name], after.get(name, "none")) for name in sorted(before)]
        lines += [f"{name}: {a} -> {b}" for name, a, b in both if a != b]
    return lines


def spans_of(history: Sequence[Span], end: int) -> list[tuple[Span, int]]:
    """The spans that have steps before ``end``, each with its own end."""
    begun = [span for span in history if span.start < end]
    return [*((a, b.start) for a, b in pairwise(begun)), *((span, end) for span in begun[-1:])]


def trained_with(history: Sequence[Span], end: int) -> list[str]:
    """A line for each stage of each span up to step ``end``: which steps, how many samples each, of what."""
    found, spans = [], spans_of(history, end)
    if spans and spans[0][0].start:
        found.append(f"steps 0 to {spans[0][0].start}: not recorded")
    for span, stop in spans:
        for stage in span.stages:
            first, last = max(stage.start, span.start), min(stage.end, stop)
            if first < last:
                place = f"`{stage.name}`" if len(spans) == 1 else f"`{stage.name}`, steps {first} to {last}"
                found.append(f"{place}: {last - first} steps of {stage.samples} samples; {', '.join(stage.data)}")
    return found


def changed_on_the_way(history: Sequence[Span], end: int) -> list[str]:
    """A line for each span but the first: what was different from its first step on."""
    return [f"from step {new.start} on: {'; '.join(changes(old, new))}" for (old, _), (new, _) in pairwise(spans_of(history, end))]
