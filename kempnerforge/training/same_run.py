"""Whether a job continues the run that is there. The run's config is read as data, from its newest checkpoint: no plugin of it is imported."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from kempnerforge.config import JobConfig, Stage, diff
from kempnerforge.config.build import convert_fields, known_key
from kempnerforge.config.files import read_toml
from kempnerforge.config.freeze import named
from kempnerforge.config.plugins import plugin_changes, plugins_of
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.training.history import Span
from kempnerforge.training.run_state import RunState
from kempnerforge.training.setup import TOKENIZER, Assembly
from kempnerforge.util.errors import InputError, Problems
from kempnerforge.util.files import same_files

LOG = logging.getLogger("kempnerforge")

MAY_CHANGE = (
    "run.", "metrics.", "eval.", "checkpoint.", "distributed.", "train.max_steps", "train.grad_accum_steps",
    "data.num_workers", "data.image_cache_mib",
)  # fmt: skip
"""Keys that a resumed run may have changed: none of them touches what is learned from which samples. ``train.max_steps`` does where it is what
the learning rate is planned for: see ``_moved_plan``."""

SHOWN, SHOWN_WIDTH = 8, 120
"""Lines, and characters of each, of a difference that is printed."""

PLANNED = ("train.max_steps", "scheduler", "optimizer", "stages")
"""Where the plan of the learning rate is made."""


def check_meant(job: JobConfig, allow: Sequence[str]) -> None:
    """Raises InputError if a config has no key or section of which ``allow`` says that it is meant to differ."""
    for key in allow:
        if not known_key(key):
            raise InputError(f"--allow-change={key}: no section or key of a config; for instance optimizer, or optimizer.lr")


def check_same_run(job: JobConfig, run_dir: Path, path: Path, state: RunState, allow: Sequence[str]) -> None:
    """What is in ``run_dir`` was made by the same config and plugins, up to what may change, and what is meant to.

    Args:
        path, state: its newest checkpoint, verified, and what that says.
        allow: keys or sections that are meant to differ.

    Raises:
        ValueError: with a line for each difference, or as the run has passed the end of the job already, or is there and nothing would be
            trained with what is meant to differ.
    """
    where, step, history = f"run.dir = {str(run_dir)!r}", state.step, state.history
    if job.total_steps() < step:
        end = "the [[stages]] end at" if job.stages and job.total_steps() != job.train.max_steps else "train.max_steps ="
        raise InputError(
            f"{where}: has done {step} steps already, and {end} {job.total_steps()}; set it to at least {step}, or use --fresh"
        )
    old = history[-1].config if history else _with_own_names(read_toml(path / "config.toml"))
    lines = _differences(old, job) + _plugin_changes(job, old, history, path) + _moved_plan(job, old, step)
    changes = [line for line in lines if not line.startswith(_meant(allow))]
    if changes:
        listed = "\n  ".join(changes)
        raise InputError(
            f"{where}: holds a run with another config:\n  {listed}\n"
            "change it back, name another directory, use --fresh, or say --allow-change=KEY for what is meant to change"
        )
    without_steps = [line for line in lines if not line.startswith("train.max_steps")]
    if without_steps and job.total_steps() == step:
        listed = "\n  ".join(without_steps)
        raise InputError(
            f"{where}: has done all of its {step} steps, none of them with\n  {listed}\nchange it back, or train more steps with it"
        )
    for line in lines:
        LOG.warning("changed, as it is meant to be: %s", line)
    if step and not history:
        LOG.warning("%s: its checkpoint is of an earlier version: learning rates and [[vlm.freeze_schedule]] mean otherwise now", run_dir)
    if any(line.startswith(PLANNED) for line in lines) and (told := _next_rate(job, old, step)):
        LOG.warning("the new plan: %s", told)
    if step and any(line.startswith(("train.", "stages")) and "batch_size: " in line for line in lines):
        LOG.warning("another batch size: a place in the data is a number of steps, so some samples of this pass are repeated or left out")


def _differences(old: Mapping[str, Any], job: JobConfig) -> list[str]:
    return [line for line in diff(old, job) if not line.startswith((*MAY_CHANGE, "plugins"))]


def _meant(allow: Sequence[str]) -> tuple[str, ...]:
    """The beginnings of lines about what ``allow`` names."""
    return tuple(f"{key}{end}" for key in (*allow, *(["train.max_steps"] if "scheduler" in allow else [])) for end in (".", " ", "[", ":"))


def check_copies(job: JobConfig, run_dir: Path, path: Path, allow: Sequence[str]) -> None:
    """The config and the tokenizer that lie in ``run_dir`` say what those in its checkpoint ``path`` say. Damaged ones say nothing, and are
    written again later.

    Raises:
        InputError: with what was edited.
    """
    for name, edited in (("config.toml", _edited_config(job, run_dir, allow)), (TOKENIZER, _edited_tokenizer(run_dir, path))):
        if edited:
            listed = "\n  ".join(edited)
            raise InputError(
                f"{run_dir / name}: is not that of the run, by its checkpoint {path.name}:\n  {listed}\n"
                "an edit here changes nothing; put it back, or delete it: it is written again"
            )


def _edited_config(job: JobConfig, run_dir: Path, allow: Sequence[str]) -> list[str]:
    try:
        there = _with_own_names(read_toml(run_dir / "config.toml"))
    except InputError:
        return []
    return [line for line in _differences(there, job) if not line.startswith(_meant(allow))]


def _edited_tokenizer(run_dir: Path, path: Path) -> list[str]:
    """The first lines of the difference, if it can still be used as a tokenizer."""
    there, kept = run_dir / TOKENIZER, path / TOKENIZER
    if not there.is_dir() or same_files(there, kept):
        return []
    try:
        Tokenizer.from_pretrained(str(there))
    except InputError:
        return []
    found = []
    for name in sorted({file.name for folder in (there, kept) for file in folder.iterdir() if file.is_file()}):
        a, b = ((folder / name).read_text("utf-8", "replace").splitlines() if (folder / name).is_file() else [] for folder in (kept, there))
        found += [line[:SHOWN_WIDTH] for line in difflib.unified_diff(a, b, name, name, n=0, lineterm="")]
    return found[:SHOWN]


def _with_own_names(old: dict[str, Any]) -> dict[str, Any]:
    """The config of a run whose checkpoints have no history: its aliases match what is in a module, but not the module's own name."""
    vlm = old.get("vlm")
    aliases = vlm.get("module_patterns") if isinstance(vlm, dict) else None
    if not isinstance(aliases, dict):
        return old
    for alias, patterns in aliases.items():
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            continue
        own = (named(pattern.removesuffix(".*")) if pattern.endswith(".*") else [pattern] for pattern in patterns)
        aliases[alias] = list(dict.fromkeys(chain.from_iterable(own)))
    return old


def check_same_data(assembly: Assembly, before: Mapping[str, str], run_dir: Path, allow: Sequence[str]) -> None:
    """The data are those that the run was begun with (their fingerprints: ``before``), also where the paths that lead to them are.

    Raises:
        ValueError: they are not, and ``allow`` does not say that it is meant.
    """
    now = assembly.fingerprints
    changed = [name for name, kept in before.items() if now.get(name, kept) != kept]
    meant = lambda name: "data" in allow or (name.startswith("eval.") and name.startswith(_meant(allow)))
    refused = [name for name in changed if not meant(name)]
    if refused:
        raise InputError(
            f"run.dir = {str(run_dir)!r}: the data are no longer those that the run was begun with ({', '.join(refused)}); put them back, use"
            " --fresh, or say --allow-change=data if it is meant"
        )
    if changed:
        LOG.warning("changed, as it is meant to be: the data (%s)", ", ".join(changed))


def _plugin_changes(job: JobConfig, old: Mapping[str, Any], history: Sequence[Span], path: Path) -> list[str]:
    if history:
        return plugin_changes(history[-1].plugins, plugins_of(job.plugins), path)
    before = old.get("plugins", [])  # a checkpoint that knows them by name alone
    return [f"plugins: {before} -> {job.plugins}"] if before != job.plugins else []


# ---- the plan of the learning rate -----------------------------------------------------------------------------------


def _moved_plan(job: JobConfig, old: Mapping[str, Any], step: int) -> list[str]:
    """Without stages the rate is planned for ``train.max_steps``. Another number is fine as long as it would have given the steps that are
    done the rates that they had: with a constant rate, in a warm-up, before "wsd" decays. The run is then one that was planned so.
    """
    before, after = old.get("train", {}).get("max_steps", 0), job.train.max_steps
    if job.stages or old.get("stages") or before == after or not step:
        return []
    warmups = {None, *(group.warmup_steps for group in job.optimizer.groups)}
    factor = job.scheduler.factor
    if all(factor(t, before, w) == factor(t, after, w) for w in warmups for t in reversed(range(step))):
        return []
    line = f"train.max_steps: {before} -> {after}: the schedule {job.scheduler.name!r} was planned for {before} steps"
    told = _next_rate(job, old, step)
    return [f"{line}; {told}. ([[stages]] keep a plan of their own, which train.max_steps only cuts short.)" if told else line]


def _next_rate(job: JobConfig, old: Mapping[str, Any], step: int) -> str:
    """What becomes of the learning rate at the next step; empty if the old config cannot say, or nothing becomes of it."""
    stages = _planned(job, old)
    if stages is None:
        return ""
    a, b = (_rate(each, step) for each in (stages, job.resolved_stages()))
    return f"step {step + 1} has the learning rate {b}, by the old plan {a}" if a != b else ""


def _planned(job: JobConfig, old: Mapping[str, Any]) -> list[Stage] | None:
    """The stages of the ``old`` config, as far as the learning rate is a matter of them; None: it is no longer understood."""
    stages = [{key: s[key] for key in ("name", "steps", "optimizer", "scheduler") if key in s} for s in old.get("stages", [])]
    tables = {name: old.get(name, {}) for name in ("train", "optimizer", "scheduler")} | {"stages": stages}
    sections = convert_fields(JobConfig, tables, (), problems := Problems(""))
    return None if problems.lines else replace(job, **sections).resolved_stages()


def _rate(stages: Sequence[Stage], step: int) -> str:
    stage = next((s for s in stages if step < s.end), stages[-1])
    into = step - stage.start
    rate = stage.optimizer.lr * stage.scheduler.factor(into, stage.planned_steps)
    return f"{rate:.3g} (step {into + 1} of {stage.planned_steps} in stage {stage.name!r})"
