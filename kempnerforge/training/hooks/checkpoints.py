"""Saves every ``interval`` steps, at the end, and when the run is interrupted."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from kempnerforge.checkpoint import BackgroundSave, CheckpointError, load_training, save, training_tensors
from kempnerforge.checkpoint.store import name_best
from kempnerforge.config import CheckpointConfig, to_toml
from kempnerforge.config.plugins import plugin_files, plugins_of
from kempnerforge.training.hooks.metrics import metrics_digest
from kempnerforge.training.run_state import Best, RunState, SavedRun
from kempnerforge.training.trainer import Hook, StepResult, Trainer
from kempnerforge.util.errors import InputError

log = logging.getLogger("kempnerforge")


class Checkpoints(Hook):
    """A checkpoint holds weights, optimizer state, the resolved config and the tokenizer: it can be used
    without its run directory.
    """

    def __init__(self, cfg: CheckpointConfig, run_dir: Path) -> None:
        self.cfg, self.run_dir = cfg, run_dir
        self._saved_step, self._due = -1, False
        self.best: Best | None = None
        self._better: Best | None = None
        self._files: dict[str, bytes] = {}
        self._data: dict[str, str] = {}
        self._background: BackgroundSave | None = None

    def restore(self, trainer: Trainer, run: SavedRun) -> None:
        """Continues from ``run``. Called before training starts."""
        state = run.state
        averages = load_training(run.path, trainer.model, trainer.optimizers.all, run.manifest)
        trainer.optimizers.load_averages(averages)
        trainer.step = self._saved_step = state.step
        trainer.seconds = state.seconds
        trainer.samples_seen, trainer.samples_bad = state.samples_seen, state.samples_bad
        trainer.samples_of.update(state.samples_of)
        trainer.unevaluated, trainer.recorded = state.unevaluated, state.metrics
        if state.best is not None and (state.best.key, state.best.best_is) == (self.cfg.keep_best, self.cfg.best_is):
            self.best = state.best

    def start(self, trainer: Trainer) -> None:
        if self.cfg.in_background:
            self._background = BackgroundSave(trainer.job.distributed.timeout_s)
        tokenizer = self.run_dir / "tokenizer"
        self._files = {f"tokenizer/{file.name}": file.read_bytes() for file in sorted(tokenizer.iterdir()) if file.is_file()}
        self._files["config.toml"] = to_toml(trainer.job).encode()
        self._files |= plugin_files(plugins_of(trainer.job.plugins))
        data = trainer.assembly.data
        self._data, self._asked = data.fingerprints, data.observed.asking  # as the data are now, not at a save

    def step(self, trainer: Trainer, result: StepResult) -> None:
        """After a skipped step the weights may be bad: a save that is due waits for the next good step."""
        self._due |= self.cfg.interval > 0 and trainer.step % self.cfg.interval == 0
        if self._better is not None and not result.skipped:
            self.best, self._due = self._better, True
        self._better = None
        if (self._due and not result.skipped) or trainer.done or trainer.stopping:
            self._save(trainer)
            self._due = False
        if trainer.done or trainer.stopping:
            self._wait()

    def record(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Notes a better score: its step is saved next, unless it is saved already (after the last step, or
        at the start).
        """
        key = self.cfg.keep_best
        if not key or not any(name.startswith("eval/") for name in values):
            return
        if key not in values:
            raise InputError(f"checkpoint.keep_best = {key!r}: is no score of this evaluation; there are {', '.join(values)}")
        score, sign = values[key], 1 if self.cfg.best_is == "highest" else -1
        if not math.isfinite(score) or (self.best is not None and sign * score <= sign * self.best.score):
            return
        found = Best(key, self.cfg.best_is, trainer.step, score)
        if trainer.step != self._saved_step:
            self._better = found
            return
        self.best = found
        self._wait()
        if trainer.world.is_main:
            name_best(self.run_dir / "checkpoints", found.step)

    def _save(self, trainer: Trainer) -> None:
        if trainer.step == self._saved_step:
            return
        state = RunState(
            step=trainer.step,
            seconds=trainer.seconds,
            samples_seen=trainer.samples_seen,
            samples_bad=trainer.samples_bad,
            samples_of=dict(trainer.samples_of),
            frozen=trainer.frozen,
            unevaluated=trainer.unevaluated,
            metrics=metrics_digest(self.run_dir) if trainer.world.is_main else "",
            best=self.best,
            data=self._data,
            asked=self._asked,
            history=trainer.history,
        )
        root, optimizers = self.run_dir / "checkpoints", trainer.optimizers
        what = f"cannot save step {trainer.step} in {root}"
        tensors = training_tensors(trainer.model, optimizers.all, optimizers.averages(), what)
        write = save if self._background is None else self._background.save
        write(
            root,
            trainer.step,
            tensors,
            state.to_json(),
            self._files,
            self.cfg.keep_last_n,
            self.best.step if self.best is not None else None,
        )
        self._saved_step = trainer.step

    def _wait(self) -> None:
        """Returns when no checkpoint is being written."""
        if self._background is not None:
            self._background.wait()

    def close(self) -> None:
        """After an error: the checkpoint that is being written is finished."""
        try:
            self._wait()
        except CheckpointError as error:
            log.error("%s", error)
