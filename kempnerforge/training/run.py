"""A run from its config to its report: claim the directory, read what is there, put the job together, train.

All that can be refused is refused before anything is written.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from kempnerforge.checkpoint.lock import RunLock
from kempnerforge.checkpoint.ranks import alone, from_rank0
from kempnerforge.config import JobConfig
from kempnerforge.config.dump import FlatConfig
from kempnerforge.distributed import world as worlds
from kempnerforge.distributed.world import World
from kempnerforge.training.batch_size import decide, fixed, remembered
from kempnerforge.training.complete import REPORT, is_complete
from kempnerforge.training.history import continued, machine_changes, span
from kempnerforge.training.hooks import default_hooks
from kempnerforge.training.initial_weights import initialise
from kempnerforge.training.run_dir import check_copies, claimed, move_old_run, saved_run, write_start
from kempnerforge.training.run_state import SavedRun
from kempnerforge.training.same_run import check_allowed_keys, check_same_data, check_same_run
from kempnerforge.training.setup import Assembly, assemble
from kempnerforge.training.tokenizer import saved_tokenizer
from kempnerforge.training.trainer import Trainer
from kempnerforge.util.paths import place_of

LOG = logging.getLogger("kempnerforge")


def train(job: JobConfig, *, fresh: bool = False, allow: Sequence[str] = (), ends_process: bool = False) -> bool:
    """Trains ``job``, from the newest checkpoint of its run directory if there is one.

    Args:
        fresh: move an existing run directory aside and start over.
        allow: keys ("optimizer.lr") or sections ("optimizer") that may differ from the continued run's.
        ends_process: the process ends with this run, see ``Signals``.

    Returns:
        Whether the run is complete, on all ranks alike; False: it was interrupted, and saved.

    Raises:
        ValueError: the config does not fit the data, the model or the run in the directory, or nothing can be
            written to the directory. Nothing has been written then.
        CheckpointError: the directory is in use, or none of its checkpoints is whole.
        TrainingFault: the run cannot go on by itself.
        KeyboardInterrupt: a second SIGINT.
    """
    run_dir = place_of(job.run.dir)
    world = worlds.start(job.distributed)
    if not world.is_main:
        LOG.setLevel(logging.ERROR)  # rank 0 says what all ranks know
    try:
        with claimed(run_dir, fresh) as locks:
            run = None if fresh else saved_run(run_dir)
            known = job if run is None else remembered(job, run.config())
            if run is None or run.world_size == world.size or run.state.step >= job.total_steps():
                job = known  # other processes take other rows each, so they choose again
            assembly = _assemble(job, known, world, run, run_dir, allow)
            config = FlatConfig.of(fixed(job, decide(assembly, world)))
            trainer = _make_trainer(assembly, config, world, run, run_dir, ends_process)
            if run is not None and trainer.done and from_rank0(lambda: is_complete(run_dir, run.manifest, config.table)):
                LOG.info("%s: complete, %d steps; see %s (--fresh starts over)", run_dir, trainer.step, run_dir / REPORT)
                return True
            if fresh and from_rank0(lambda: move_old_run(run_dir)):
                locks.enter_context(RunLock(run_dir))
            if world.is_main:
                for line in assembly.warnings():
                    LOG.warning("%s", line)
                write_start(run_dir, config, assembly.tokenizer, run)
            world.barrier()
            trainer.fit()
            return trainer.done and not trainer.stopping
    finally:
        worlds.stop()


def _assemble(job: JobConfig, known: JobConfig, world: World, run: SavedRun | None, run_dir: Path, allow: Sequence[str]) -> Assembly:
    """The job put together: checked against the ``run`` that it continues, or with initial weights, which
    rank 0 alone has until the model is sharded.

    Args:
        known: ``job`` with the batch sizes that the run remembers, to be compared with it.
    """
    check_allowed_keys(allow)
    if run is not None:
        check_same_run(known, config := FlatConfig.of(known), run, run_dir, allow)
        check_copies(config, run, run_dir, allow)
    # A new run in an old directory does not take the tokenizer there: the data may have been changed since.
    tokenizer = saved_tokenizer(run.path) if run is not None else None
    assembly = world.together(lambda: assemble(job, tokenizer, device=None if world.is_main else "meta", blank=run is not None))
    assembly.data.check_held_out()
    if run is not None:
        check_same_data(assembly.data.fingerprints, run, run_dir, allow)
    else:
        world.together(lambda: _initialise(assembly, world))
    return assembly


def _initialise(assembly: Assembly, world: World) -> None:
    if world.is_main:
        with alone():
            initialise(assembly.model, assembly.tokenizer)
        assembly.freeze.refuse_random(assembly.model)


def _make_trainer(assembly: Assembly, config: FlatConfig, world: World, run: SavedRun | None, run_dir: Path, ends_process: bool) -> Trainer:
    """The trainer, at the last step of ``run``, with the data of its next step."""
    for stage in assembly.data.stages:  # errors of later stages, too, are found now
        assembly.data.batches(stage, stage.start, world.data_rank, world.data_size)
    hooks, checkpoints = default_hooks(assembly, run_dir, ends_process)
    trainer = Trainer(assembly, world, hooks)
    if run is not None:
        checkpoints.restore(trainer, run)
        LOG.info("%s: continuing at step %d of %d", run_dir, trainer.step, trainer.total_steps)
    before = run.state.history if run is not None else []
    trainer.history = continued(before, trainer.step, span(config.table, assembly.job.plugins, assembly.data, world, trainer.dtype))
    if before and (changes := machine_changes(before[-1], trainer.history[-1])):
        LOG.warning("%s: not as before: %s; bitwise the same as without the break is not promised", run_dir, "; ".join(changes))
    if not trainer.done:
        trainer.look_ahead()
    return trainer
