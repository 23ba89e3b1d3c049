"""What each span of a run's steps was trained with: in the manifest of every checkpoint, under "history".

A span begins where the run began or went on with something that matters for what is learned; it ends where the next one begins. A run that was
stopped and continued as it was stays one span.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

import kempnerforge
from kempnerforge.config import JobConfig, diff, to_dict
from kempnerforge.config.plugins import plugins_of, record_plugins
from kempnerforge.training.setup import Assembly

Span = dict[str, Any]
"""Plain JSON: "start" and what ``facts`` gives."""

ASIDE = ("run.", "metrics.", "eval.", "checkpoint.", "data.num_workers", "data.image_cache_mib", "distributed.timeout_s", "plugins")
"""Keys that make no span of their own; of them the newest are kept. (Plugins are compared by their source.)"""


def facts(job: JobConfig, assembly: Assembly, world_size: int) -> dict[str, Any]:
    """What a span is trained with: the config, its stages in short, the data's fingerprints, plugins, processes, versions.

    Args:
        job: as it was given, before ``assemble`` resolved what depends on the tokenizer.
    """
    stages = [
        {
            "name": stage.name,
            "start": stage.start,
            "end": stage.end,
            "samples": stage.train.batch_size,
            "data": [f"`{section.source}`{_path(section)}" for section in stage.data.sections()],
        }
        for stage in assembly.stages
    ]
    return {
        "config": to_dict(job),
        "stages": stages,
        "data": dict(assembly.fingerprints),
        "plugins": record_plugins(plugins_of(job.plugins)),
        "world_size": world_size,
        "versions": {"kempnerforge": kempnerforge.__version__, "torch": str(torch.__version__)},
    }


def _path(section: Any) -> str:
    return f" ({section.path})" if getattr(section, "path", "") else ""


def continued(before: Sequence[Span], step: int, now: dict[str, Any]) -> list[Span]:
    """The spans of a run that goes on at ``step`` with ``now``. Spans that began there or later have left no trace."""
    kept = [span for span in before if span["start"] < step]
    if kept and not changes(kept[-1], now):
        return [*kept[:-1], {**now, "start": kept[-1]["start"]}]
    return [*kept, {**now, "start": step}]


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What is different between two spans, a line each."""
    lines = [line for line in diff(old["config"], new["config"]) if not line.startswith(ASIDE)]
    lines += [f"processes: {old['world_size']} -> {new['world_size']}"] if old["world_size"] != new["world_size"] else []
    for name in sorted(old["versions"].keys() | new["versions"].keys()):
        a, b = (span["versions"].get(name, "unknown") for span in (old, new))
        lines += [f"{name}: {a} -> {b}"] if a != b else []
    plugins = [{entry["sha256"]: entry["name"] for entry in span["plugins"]} for span in (old, new)]
    if plugins[0].keys() != plugins[1].keys():
        a, b = (", ".join(f"{name} ({sha[:8]})" for sha, name in part.items()) or "none" for part in plugins)
        lines.append(f"plugins: {a} -> {b}")
    other = sorted(name for name in old["data"].keys() & new["data"].keys() if old["data"][name] != new["data"][name])
    return [*lines, f"the data ({', '.join(other)})"] if other else lines


def spans_of(history: Sequence[Span], end: int) -> list[tuple[Span, int]]:
    """The spans that have steps before ``end``, each with its own end."""
    begun = [span for span in history if span["start"] < end]
    return [*((a, b["start"]) for a, b in pairwise(begun)), *((span, end) for span in begun[-1:])]


def trained_with(history: Sequence[Span], end: int) -> list[str]:
    """A line for each stage of each span up to step ``end``: which steps, how many samples each, of what."""
    found, spans = [], spans_of(history, end)
    if spans and spans[0][0]["start"]:
        found.append(f"steps 0 to {spans[0][0]['start']}: not recorded")
    for span, stop in spans:
        for stage in span["stages"]:
            first, last = max(stage["start"], span["start"]), min(stage["end"], stop)
            if first < last:
                place = f"`{stage['name']}`" if len(spans) == 1 else f"`{stage['name']}`, steps {first} to {last}"
                found.append(f"{place}: {last - first} steps of {stage['samples']} samples; {', '.join(stage['data'])}")
    return found


def changed_on_the_way(history: Sequence[Span], end: int) -> list[str]:
    """A line for each span but the first: what was different from its first step on."""
    return [f"from step {new['start']} on: {'; '.join(changes(old, new))}" for (old, _), (new, _) in pairwise(spans_of(history, end))]
