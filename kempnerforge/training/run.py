"""A run from its config to its report: directory, lock, resume, training.

All that can be refused is refused before anything is written: ``_prepare`` reads and checks, ``_write`` comes after it.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from kempnerforge.checkpoint.lock import RunLock
from kempnerforge.checkpoint.manifest import Manifest
from kempnerforge.checkpoint.ranks import from_rank0
from kempnerforge.checkpoint.store import find
from kempnerforge.config import JobConfig, to_toml
from kempnerforge.config.files import read_toml
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.distributed import world as worlds
from kempnerforge.distributed.world import World
from kempnerforge.training.complete import NAME as COMPLETE
from kempnerforge.training.complete import REPORT, is_complete, remove_results
from kempnerforge.training.history import continued, otherwise, span
from kempnerforge.training.hooks import default_hooks
from kempnerforge.training.run_state import RunState
from kempnerforge.training.same_run import check_copies, check_meant, check_same_data, check_same_run
from kempnerforge.training.setup import TOKENIZER, assemble, initialise, saved_tokenizer
from kempnerforge.training.trainer import Trainer
from kempnerforge.util.errors import InputError
from kempnerforge.util.files import move_aside, same_files, why_not_writable, write_text
from kempnerforge.util.paths import place_of

LOG = logging.getLogger("kempnerforge")


def train(job: JobConfig, *, fresh: bool = False, allow: Sequence[str] = (), leaving: bool = False) -> bool:
    """Trains ``job``, from the newest checkpoint of its run directory if there is one.

    Args:
        fresh: move an existing run directory aside and start over.
        allow: keys ("optimizer.lr") or sections ("optimizer") that are meant to differ from those of the run that is there.
        leaving: the process ends with this run. Signals, once they have asked it to stop, are then ignored until it is gone.

    Returns:
        Whether the run is complete, on all ranks alike; False: it was interrupted, and saved.

    Raises:
        ValueError: the config does not fit the data, the model or the run that is there, or the directory cannot be written to. Nothing has
            been written then.
        CheckpointError: the directory is in use, or none of its checkpoints is whole.
        TrainingFault: the run cannot go on by itself.
        KeyboardInterrupt: a second SIGINT.
    """
    run_dir = place_of(job.run.dir)
    world = worlds.start(job.distributed)
    if not world.is_main:
        LOG.setLevel(logging.ERROR)  # what all ranks know, one says
    try:
        with _claimed(run_dir, world, fresh) as locks:
            found = None if fresh else _found(run_dir)
            trainer = _prepare(job, run_dir, world, found, allow, leaving)
            config = trainer.history[-1].config
            if found is not None and trainer.done and from_rank0(lambda: is_complete(run_dir, found[1], config)):
                LOG.info("%s: complete, %d steps; see %s (--fresh starts over)", run_dir, trainer.step, run_dir / REPORT)
                return True
            if fresh and from_rank0(lambda: _move_aside(run_dir)):
                locks.enter_context(RunLock(run_dir))
            _write(job, trainer, run_dir, found)
            trainer.fit()
            return trainer.done and not trainer.stopping
    finally:
        worlds.stop()


@contextmanager
def _claimed(run_dir: Path, world: World, fresh: bool) -> Iterator[ExitStack]:
    """Holds the lock of ``run_dir``. Directories that were made for it go again if nothing was put there."""
    made = from_rank0(lambda: _make(run_dir))
    if isinstance(made, str):
        raise InputError(f"run.dir = {str(run_dir)!r}: {made}")
    try:
        if problem := from_rank0(lambda: _unwritable(run_dir, fresh)):
            raise InputError(f"run.dir = {str(run_dir)!r}: {problem}")
        with ExitStack() as locks:
            locks.enter_context(RunLock(run_dir))
            yield locks
    finally:
        for folder in made if world.is_main else ():
            with suppress(OSError):
                folder.rmdir()


def _make(run_dir: Path) -> list[Path] | str:
    """The directories that were made, the innermost first; or why that is not possible."""
    try:
        missing = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        to = f"it is a link to {os.readlink(run_dir)!r}, which is not there" if run_dir.is_symlink() else error.strerror or error
        return f"cannot be made: {to}"
    return missing


def _unwritable(run_dir: Path, fresh: bool) -> str:
    """Why a run cannot write where it will; empty if it can.

    Args:
        fresh: what is there is moved aside.
    """
    place, moves = run_dir.resolve(), fresh and _holds_a_run(run_dir)
    if moves and os.path.ismount(place):
        return f"{place} is where a disk is mounted: it cannot be moved aside"
    folders = (run_dir, place.parent) if moves else (run_dir, run_dir / "checkpoints", run_dir / "events")
    return next((why for folder in folders if (why := why_not_writable(folder))), "")


def _found(run_dir: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint of the run that is there.

    Raises:
        InputError: the run is complete, and its checkpoints are gone.
    """
    found = find(run_dir / "checkpoints")
    if found is None and (run_dir / COMPLETE).exists():
        raise InputError(f"run.dir = {str(run_dir)!r}: holds a complete run, whose checkpoints are gone; use --fresh to start over")
    return found


def _prepare(
    job: JobConfig, run_dir: Path, world: World, found: tuple[Path, Manifest] | None, allow: Sequence[str], leaving: bool
) -> Trainer:
    """A trainer where the run is, with the data of its next step. Every check is made here, and nothing is written.

    Args:
        found: the checkpoint to go on from.
    """
    check_meant(job, allow)
    state = RunState.of(found[1], str(found[0])) if found is not None else RunState(step=0)
    if found is not None:
        check_same_run(job, run_dir, found[0], state, allow)
        check_copies(job, run_dir, found[0], allow)
    # without a checkpoint the data may have been mended since an earlier attempt, and its tokenizer is of the old ones
    assembly = assemble(job, saved_tokenizer(found[0]) if found is not None else None)
    assembly.check_held_out()
    if found is None:
        initialise(job, assembly.model, assembly.tokenizer)
    else:
        check_same_data(assembly, state.data, run_dir, allow)
    for stage in assembly.stages:
        assembly.batches(stage, stage.start, world.rank, world.size)
    hooks, checkpoints = default_hooks(assembly, run_dir, leaving)
    trainer = Trainer(assembly, world, hooks)
    if found is not None:
        checkpoints.restore(trainer, *found)
        LOG.info("%s: continuing at step %d of %d", run_dir, trainer.step, trainer.total_steps)
    trainer.history = continued(state.history, trainer.step, span(job, assembly, world))
    if state.history and (other := otherwise(state.history[-1], trainer.history[-1])):
        LOG.warning("%s: not as before: %s; bitwise the same as without the break is not promised", run_dir, "; ".join(other))
    if not trainer.done:
        trainer.look_ahead()
    return trainer


def _write(job: JobConfig, trainer: Trainer, run_dir: Path, found: tuple[Path, Manifest] | None) -> None:
    """What a run directory has before the first step."""
    if trainer.world.is_main:
        for line in trainer.assembly.warnings():
            LOG.warning("%s", line)
        remove_results(run_dir)
        _write_tokenizer(trainer.assembly.tokenizer, run_dir, found[0] / TOKENIZER if found is not None else None)
        _write_config(job, run_dir / "config.toml")
    trainer.world.barrier()


def _write_config(job: JobConfig, path: Path) -> None:
    if os.path.lexists(path):
        try:
            read_toml(path)
        except InputError:
            LOG.warning("%s is damaged: moved to %s, and written again", path, move_aside(path))
    write_text(path, to_toml(job))


def _write_tokenizer(tokenizer: Tokenizer, run_dir: Path, kept: Path | None) -> None:
    """Puts the tokenizer where people look for it. What is there and is not the one that the checkpoint has ``kept`` is moved aside."""
    path, part = run_dir / TOKENIZER, run_dir / f".{TOKENIZER}-{os.getpid()}"
    if kept is None:
        tokenizer.save(part)
    elif same_files(path, kept):
        return
    else:
        shutil.copytree(kept, part)
    if os.path.lexists(path):
        if kept is not None:
            LOG.warning("%s is damaged: moved to %s, and written again from the checkpoint", path, move_aside(path))
        else:  # of an attempt that got nowhere
            shutil.rmtree(path)
    part.rename(path)


def _holds_a_run(run_dir: Path) -> bool:
    return any(path.name != ".lock" for path in run_dir.iterdir())


def _move_aside(run_dir: Path) -> bool:
    """Renames an existing run, its lock with it; nothing is deleted. A link to it stays one. Returns whether there was one."""
    if not _holds_a_run(run_dir):
        return False
    run_dir = run_dir.resolve()
    aside = move_aside(run_dir)
    (aside / ".lock").unlink()
    LOG.info("moved the run that was there to %s", aside)
    run_dir.mkdir()
    return True
