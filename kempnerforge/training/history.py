"""What each span of a run's steps was trained with: in the manifest of every checkpoint, under "history".

A new span begins where a run is continued with something else that matters for what is learned. A run that
was stopped and continued as it was stays one span.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import torch

from kempnerforge.config import diff
from kempnerforge.config.plugins import PluginRecord, plugins_of, record_plugins
from kempnerforge.distributed.world import World
from kempnerforge.training.data import JobData
from kempnerforge.util.version import __version__

LIBRARIES = ("numpy", "pillow", "tokenizers", "transformers", "safetensors")
"""The libraries, in addition to torch, whose versions are recorded: they read data and weights."""


@dataclass(frozen=True)
class StageRecord:
    """A stage in short: its steps, the samples of each step, and their sources."""

    name: str
    start: int
    end: int
    samples: int
    data: list[str]


@dataclass(frozen=True)
class Span:
    """What some steps were trained with, saved as plain JSON.

    Attributes:
        start: its first step.
        config: as it was given, before ``assemble`` resolved what depends on the tokenizer.
        data: fingerprints, by what the data are for.
        world_size: processes.
        versions: of this package, Python and libraries.
        machine: device, threads and compute dtype: they decide the last bits of results.
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


IGNORED = ("run.", "metrics.", "eval.", "checkpoint.", "data.num_workers", "data.image_cache_mib", "distributed.timeout_s", "plugins")
"""Keys that do not begin a new span; the newest values are kept. (Plugins are compared by their source.)"""


def span(config: dict[str, Any], plugins: Sequence[str], data: JobData, world: World, dtype: torch.dtype) -> Span:
    """What the next steps are trained with; its ``start`` is 0.

    Args:
        config: the job as it was given, as a table.
        plugins: their names in the config.
        dtype: of compute.
    """
    stages = [
        StageRecord(
            name=stage.name,
            start=stage.start,
            end=stage.end,
            samples=stage.train.step_rows,
            data=[f"`{section.source}`{_path(section)}" for section in stage.data.sections()],
        )
        for stage in data.stages
    ]
    return Span(
        start=0,
        config=config,
        plugins=record_plugins(plugins_of(plugins)),
        stages=stages,
        data=dict(data.fingerprints),
        world_size=world.size,
        versions=_versions(),
        machine=_machine(world.device) | {"compute dtype": str(dtype).removeprefix("torch.")},
    )


def _versions() -> dict[str, str]:
    versions = {"kempnerforge": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    return versions | {name: version(name) for name in LIBRARIES}


def _machine(device: torch.device) -> dict[str, str]:
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return {"device": f"CPU with {torch.backends.cpu.get_cpu_capability()}", "threads": str(torch.get_num_threads())}


def _path(section: Any) -> str:
    return f" ({section.path})" if getattr(section, "path", "") else ""


def continued(before: Sequence[Span], step: int, now: Span) -> list[Span]:
    """The spans of a run that goes on at ``step`` with ``now``. Spans that began there or later are dropped:
    none of their steps is left.
    """
    done = [span for span in before if span.start < step]
    if done and not changes(done[-1], now):
        return [*done[:-1], replace(now, start=done[-1].start)]
    return [*done, replace(now, start=step)]


def changes(old: Span, new: Span) -> list[str]:
    """What is different between two spans, a line each."""
    lines = [line for line in diff(old.config, new.config) if not line.startswith(IGNORED)]
    plugins = [{entry.sha256: entry.name for entry in span.plugins} for span in (old, new)]
    if plugins[0].keys() != plugins[1].keys():
        a, b = (", ".join(f"{name} ({sha[:8]})" for sha, name in part.items()) or "none" for part in plugins)
        lines.append(f"plugins: {a} -> {b}")
    lines += [f"processes: {old.world_size} -> {new.world_size}"] if old.world_size != new.world_size else []
    other = sorted(name for name in old.data.keys() & new.data.keys() if old.data[name] != new.data[name])
    return [*lines, *machine_changes(old, new), *([f"the data ({', '.join(other)})"] if other else [])]


def machine_changes(old: Span, new: Span) -> list[str]:
    """Differences of machine and libraries, as far as recorded: the last bits of results may differ."""
    records = ((old.machine, new.machine), (old.versions, new.versions))
    return [
        f"{name}: {before[name]} -> {after.get(name, 'none')}"
        for before, after in records
        for name in sorted(before)
        if before[name] != after.get(name)
    ]


def spans_of(history: Sequence[Span], end: int) -> list[tuple[Span, int]]:
    """The spans with steps before ``end``, each with its own end."""
    begun = [span for span in history if span.start < end]
    return [*((a, b.start) for a, b in pairwise(begun)), *((span, end) for span in begun[-1:])]


def trained_with(history: Sequence[Span], end: int) -> list[str]:
    """A line for each stage of each span up to step ``end``: its steps, samples per step, and data."""
    lines, spans = [], spans_of(history, end)
    if spans and spans[0][0].start:
        lines.append(f"steps 0 to {spans[0][0].start}: not recorded")
    for span, stop in spans:
        for stage in span.stages:
            first, last = max(stage.start, span.start), min(stage.end, stop)
            if first < last:
                place = f"`{stage.name}`" if len(spans) == 1 else f"`{stage.name}`, steps {first} to {last}"
                lines.append(f"{place}: {last - first} steps of {stage.samples} samples; {', '.join(stage.data)}")
    return lines


def changed_on_the_way(history: Sequence[Span], end: int) -> list[str]:
    """A line for each span but the first: what changed at its first step."""
    return [f"from step {new.start} on: {'; '.join(changes(old, new))}" for (old, _), (new, _) in pairwise(spans_of(history, end))]
