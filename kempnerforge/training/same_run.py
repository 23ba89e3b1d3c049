"""Whether a job continues a run: its config against the run's, its data against the run's.

The old config is a table, as it was saved: plugins of the run are not imported. Nothing is written here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kempnerforge.config import JobConfig, Stage, diff
from kempnerforge.config.build import convert_fields, known_key
from kempnerforge.config.dump import FlatConfig
from kempnerforge.config.plugins import plugin_changes, plugins_of
from kempnerforge.training.run_state import RunState, SavedRun
from kempnerforge.util.errors import InputError, Problems

LOG = logging.getLogger("kempnerforge")

MAY_CHANGE = (
    "run.", "metrics.", "eval.", "checkpoint.", "distributed.", "train.max_steps", "train.total_samples",
    "train.grad_accum_steps",
    "train.logits_at_once", "data.num_workers", "data.image_cache_mib",
)  # fmt: skip
"""Keys that may change when a run continues: none of them changes what is learned from which samples.
``train.max_steps`` does where the
learning rate is planned for it: see ``_changed_plan``.
"""

PLANNED = ("train.max_steps", "scheduler", "optimizer", "stages")
"""Keys and sections that the plan of the learning rate depends on."""


def check_allowed_keys(allow: Sequence[str]) -> None:
    """Raises InputError if an ``--allow-change`` is no key or section of a config."""
    for key in allow:
        if not known_key(key):
            raise InputError(f"--allow-change={key}: no section or key of a config; for instance optimizer, or optimizer.lr")


def check_same_run(job: JobConfig, config: FlatConfig, run: SavedRun, run_dir: Path, allow: Sequence[str]) -> None:
    """Checks that ``run`` was made by the config and plugins of ``job``, up to changes that are allowed.

    Args:
        config: ``job`` as data.
        run_dir: of the run, for messages.
        allow: keys or sections that are meant to differ.

    Raises:
        InputError: with a line for each difference; or the run has more steps than the job; or it has all
            steps of the job, and none would be trained with an allowed change.
    """
    where, step, history = f"run.dir = {str(run_dir)!r}", run.state.step, run.state.history
    if job.total_steps() < step:
        end = "the [[stages]] end at" if job.stages and job.total_steps() != job.train.max_steps else "train.max_steps ="
        raise InputError(
            f"{where}: has done {step} steps already, and {end} {job.total_steps()}; set it to at least {step}, or use --fresh"
        )
    old = run.config()
    changes = config_changes(old, config) + _plugin_changes(job, old, run) + _changed_plan(job, old, step)
    if refused := not_allowed(changes, allow):
        listed = "\n  ".join(refused)
        raise InputError(
            f"{where}: holds a run with another config:\n  {listed}\n"
            "change it back, name another directory, use --fresh, or say --allow-change=KEY for what is meant to change"
        )
    without_steps = [line for line in changes if not line.startswith("train.max_steps")]
    if without_steps and job.total_steps() == step:
        listed = "\n  ".join(without_steps)
        raise InputError(
            f"{where}: has done all of its {step} steps, none of them with\n  {listed}\nchange it back, or train more steps with it"
        )
    for line in changes:
        LOG.warning("changed, as it is meant to be: %s", line)
    if step and not history:
        LOG.warning("%s: its checkpoint is of an earlier version: learning rates and [[vlm.freeze_schedule]] mean otherwise now", run_dir)
    if any(line.startswith(PLANNED) for line in changes) and (rates := _next_rates(job, old, step)):
        LOG.warning("the new plan: %s", rates)
    if step and any(line.startswith(("train.", "stages")) and "batch_size: " in line for line in changes):
        LOG.warning("another batch size: a place in the data is a number of steps, so some samples of this pass are repeated or left out")


def check_same_data(now: Mapping[str, str], run: SavedRun, run_dir: Path, allow: Sequence[str]) -> None:
    """Checks that the data are those at the start of ``run``, wherever they are now.

    Args:
        now: fingerprints, by what the data are for.

    Raises:
        InputError: other data, and ``allow`` does not name them.
    """
    changed = changed_data(now, run.state)
    refused = [name for name in changed if "data" not in allow and not (name.startswith("eval.") and name.startswith(_allowed(allow)))]
    if refused:
        raise InputError(
            f"run.dir = {str(run_dir)!r}: the data are no longer those that the run was begun with ({', '.join(refused)}); put them back, use"
            " --fresh, or say --allow-change=data if it is meant"
        )
    if changed:
        LOG.warning("changed, as it is meant to be: the data (%s)", ", ".join(changed))


def changed_data(now: Mapping[str, str], state: RunState) -> list[str]:
    """Names of the data in ``now`` that are others than at the start of the run with ``state``; ``now`` as in
    ``check_same_data``.
    """
    return [name for name, before in state.data.items() if now.get(name, before) != before]


def config_changes(old: Mapping[str, Any], config: FlatConfig) -> list[str]:
    """A line for each key that differs and is not in ``MAY_CHANGE``. Plugins are compared by their source."""
    return [line for line in diff(old, config) if not line.startswith((*MAY_CHANGE, "plugins"))]


def not_allowed(changes: Sequence[str], allow: Sequence[str]) -> list[str]:
    """The lines of ``changes`` about keys that ``allow`` does not name."""
    return [line for line in changes if not line.startswith(_allowed(allow))]


def _allowed(allow: Sequence[str]) -> tuple[str, ...]:
    """How the lines about the keys and sections in ``allow`` begin."""
    keys = [*allow, *(["train.max_steps"] if "scheduler" in allow else [])]
    return tuple(f"{key}{end}" for key in keys for end in (".", " ", "[", ":"))


def _plugin_changes(job: JobConfig, old: Mapping[str, Any], run: SavedRun) -> list[str]:
    if run.state.history:
        return plugin_changes(run.state.history[-1].plugins, plugins_of(job.plugins), run.path)
    before = old.get("plugins", [])  # an early checkpoint has their names alone
    return [f"plugins: {before} -> {job.plugins}"] if before != job.plugins else []


# ---- the plan of the learning rate ---------------------------------------------------------------


def _changed_plan(job: JobConfig, old: Mapping[str, Any], step: int) -> list[str]:
    """A line if another ``train.max_steps`` would have changed the learning rate of steps that are done.

    Without stages the rate is planned for ``train.max_steps``. Another number is fine where it gives the same
    rates so far: with a constant rate, in a warm-up, before "wsd" decays.
    """
    before, after = old.get("train", {}).get("max_steps", 0), job.train.max_steps
    if job.stages or old.get("stages") or before == after or not step:
        return []
    warmups = {None, *(group.warmup_steps for group in job.optimizer.groups)}
    factor = job.scheduler.factor
    if all(factor(t, before, w) == factor(t, after, w) for w in warmups for t in reversed(range(step))):
        return []
    line = f"train.max_steps: {before} -> {after}: the schedule {job.scheduler.name!r} was planned for {before} steps"
    rates = _next_rates(job, old, step)
    return [f"{line}; {rates}. ([[stages]] keep a plan of their own, which train.max_steps only cuts short.)" if rates else line]


def _next_rates(job: JobConfig, old: Mapping[str, Any], step: int) -> str:
    """The learning rate of the next step by both plans; empty if they agree, or the old one is unknown."""
    stages = [{key: s[key] for key in ("name", "steps", "optimizer", "scheduler") if key in s} for s in old.get("stages", [])]
    tables = {name: old.get(name, {}) for name in ("train", "optimizer", "scheduler")} | {"stages": stages}
    sections = convert_fields(JobConfig, tables, (), problems := Problems(""))
    if problems.lines:
        return ""
    before, after = (_rate(plan.resolved_stages(), step) for plan in (replace(job, **sections), job))
    return f"step {step + 1} has the learning rate {after}, by the old plan {before}" if before != after else ""


def _rate(stages: Sequence[Stage], step: int) -> str:
    stage = next((s for s in stages if step < s.end), stages[-1])
    into = step - stage.start
    rate = stage.optimizer.lr * stage.scheduler.factor(into, stage.planned_steps)
    return f"{rate:.3g} (step {into + 1} of {stage.planned_steps} in stage {stage.name!r})"
