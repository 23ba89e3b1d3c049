"""A run from its config to its report: directory, lock, resume, training."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from kempnerforge.checkpoint.lock import RunLock
from kempnerforge.checkpoint.manifest import Manifest
from kempnerforge.checkpoint.ranks import from_rank0
from kempnerforge.checkpoint.store import find
from kempnerforge.config import JobConfig, diff, load_config, to_toml
from kempnerforge.config.errors import InputError
from kempnerforge.data.files import write_text
from kempnerforge.distributed import world as worlds
from kempnerforge.distributed.world import World
from kempnerforge.training.hooks import default_hooks
from kempnerforge.training.setup import Assembly, assemble, initialise, saved_tokenizer
from kempnerforge.training.trainer import Trainer

LOG = logging.getLogger("kempnerforge")

MAY_CHANGE = (
    "run.", "metrics.", "eval.", "checkpoint.", "distributed.", "train.max_steps", "train.grad_accum_steps",
    "data.num_workers", "data.image_cache_mib",
)  # fmt: skip
"""Keys that a resumed run may have changed: none of them touches what is learned from which samples."""


def train(job: JobConfig, *, fresh: bool = False, allow: Sequence[str] = (), leaving: bool = False) -> bool:
    """Trains ``job``, from the newest checkpoint of its run directory if there is one.

    Args:
        fresh: move an existing run directory aside and start over.
        allow: keys ("optimizer.lr") or sections ("optimizer") that are meant to differ from those of the run that is there.
        leaving: the process ends with this run. SIGTERM and SIGINT, once they have asked it to stop, are then ignored until it is gone.

    Returns:
        Whether the run is complete; False: it was interrupted, and saved.

    Raises:
        ValueError: the config does not fit the data, the model or the run that is there, or the directory cannot be written to.
        CheckpointError: the directory is in use, or none of its checkpoints is whole.
        TrainingFault: the run cannot go on by itself.
    """
    run_dir = Path(job.run.dir)
    world = worlds.start(job.distributed)
    if not world.is_main:
        LOG.setLevel(logging.WARNING)  # what all ranks know, one says
    try:
        if fresh:
            _move_aside(run_dir, world)
        _make_run_dir(run_dir)
        with RunLock(run_dir):
            return _train(job, run_dir, world, allow, leaving)
    finally:
        worlds.stop()


def _make_run_dir(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run.dir = {str(run_dir)!r}: cannot be made: {error.strerror or error}") from None
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise InputError(f"run.dir = {str(run_dir)!r}: cannot be written to")


def _train(job: JobConfig, run_dir: Path, world: World, allow: Sequence[str], leaving: bool) -> bool:
    _check_same_run(job, run_dir, allow)
    begun = (run_dir / "checkpoints").is_dir()  # otherwise the data may have been mended since, and the tokenizer is of the old ones
    tokenizer = saved_tokenizer(run_dir) if begun else None
    assembly = assemble(job, tokenizer)
    assembly.check_held_out()
    if world.is_main:
        for line in assembly.warnings():
            LOG.warning("%s", line)
        if tokenizer is None:
            _write_tokenizer(assembly.tokenizer, run_dir)
        write_text(run_dir / "config.toml", to_toml(job))
    world.barrier()
    found = find(run_dir / "checkpoints")
    if found is None:
        initialise(job, assembly.model, assembly.tokenizer)
    else:
        _check_same_data(assembly, found[1], run_dir, allow)
    hooks, checkpoints = default_hooks(assembly, run_dir, leaving)
    trainer = Trainer(assembly, world, hooks)
    if found is not None:
        checkpoints.restore(trainer, *found)
        LOG.info("%s: continuing at step %d of %d", run_dir, trainer.step, trainer.total_steps)
    if trainer.done and (run_dir / "report.html").exists():
        LOG.info("%s: complete, %d steps; see %s (--fresh starts over)", run_dir, trainer.step, run_dir / "report.html")
        return True
    trainer.fit()
    return trainer.done


def _check_same_run(job: JobConfig, run_dir: Path, allow: Sequence[str]) -> None:
    """What is in ``run_dir`` was made by the same config, up to what may change, and what is meant to."""
    path = run_dir / "config.toml"
    if not path.exists() or not (run_dir / "checkpoints").is_dir():
        return
    meant = tuple(f"{key}{end}" for key in allow for end in (".", " ", "[", ":"))
    lines = [line for line in diff(load_config(path), job) if not line.startswith(MAY_CHANGE)]
    changes = [line for line in lines if not line.startswith(meant)]
    if changes:
        listed = "\n  ".join(changes)
        raise InputError(
            f"run.dir = {str(run_dir)!r}: holds a run with another config:\n  {listed}\n"
            "change it back, name another directory, use --fresh, or say --allow-change=KEY for what is meant to change"
        )
    for line in lines:
        LOG.warning("changed, as it is meant to be: %s", line)


def _check_same_data(assembly: Assembly, manifest: Manifest, run_dir: Path, allow: Sequence[str]) -> None:
    """The data are those that the run was begun with, also where the paths that lead to them are."""
    now = assembly.fingerprints
    changed = [name for name, before in manifest.state.get("data", {}).items() if now.get(name, before) != before]
    if changed and "data" not in allow:
        raise InputError(
            f"run.dir = {str(run_dir)!r}: the data are no longer those that the run was begun with ({', '.join(changed)}); put them back, use"
            " --fresh, or say --allow-change=data if it is meant"
        )
    if changed:
        LOG.warning("changed, as it is meant to be: the data (%s)", ", ".join(changed))


def _write_tokenizer(tokenizer, run_dir: Path) -> None:
    part = run_dir / f".tokenizer-{os.getpid()}"
    tokenizer.save(part)
    if (run_dir / "tokenizer").exists():
        shutil.rmtree(run_dir / "tokenizer")
    part.rename(run_dir / "tokenizer")


def _move_aside(run_dir: Path, world: World) -> None:
    """Renames an existing run; nothing is deleted. A run that another process works on is refused by its lock."""
    if from_rank0(run_dir.is_dir):
        with RunLock(run_dir):
            if world.is_main:
                stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime())
                aside = run_dir.with_name(f"{run_dir.name}.{stamp}")
                run_dir.rename(aside)
                LOG.info("moved the run that was there to %s", aside)
    world.barrier()
