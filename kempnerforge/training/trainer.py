"""The training loop. Whatever happens every n steps is a hook (``hooks/``); what an arch does is behind ``VLM``."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from kempnerforge.config import Stage
from kempnerforge.data.batching.batch import Batch
from kempnerforge.distributed.fsdp import prepare, sync_gradients
from kempnerforge.distributed.world import World, compute_dtype
from kempnerforge.training.feature_cache import FeatureCache
from kempnerforge.training.freeze import apply_freeze, freeze_boundaries, trainable_names
from kempnerforge.training.history import Span
from kempnerforge.training.optimizer import Optimizers, clip, local_gradients, squared_norm
from kempnerforge.training.optimizers.foreach import local
from kempnerforge.training.setup import Assembly
from kempnerforge.util.errors import InputError


class TrainingFault(RuntimeError):
    """The run cannot go on by itself; a restart continues from the last checkpoint."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all ranks.

    Attributes:
        stage: that it belonged to; ``trainer.stage`` is that of the next step.
        loss: mean over trained tokens.
        aux_loss: of the model's parts, as it was added to the loss; 0 if there is none.
        grad_norm: before clipping.
        rates: learning rates at scale 1, by the keys of the section: "lr", and "muon_lr" where Muon trains.
        skipped: loss or gradient was not finite; nothing moved.
        tokens, images, samples: useful tokens, images and rows that went in.
        texts_left_out: texts that did not fit into their rows.
        seconds: wall-clock time of the step, its data included.
    """

    stage: Stage
    loss: float
    aux_loss: float
    grad_norm: float
    rates: dict[str, float]
    skipped: bool
    tokens: int
    images: int
    samples: int
    texts_left_out: int
    seconds: float


class Data(NamedTuple):
    """What a step is trained with: this rank's micro-batches, and what is in those of all ranks, as in ``StepResult``."""

    batches: list[Batch]
    targets: int
    tokens: int
    images: int
    samples: int
    texts_left_out: int


class Hook:
    """Something periodic. All ranks call all hooks in the same order.

    Those of plugins register with ``@registry.register_hook("type")`` and are made from their ``[[hooks]]`` table and the run directory.
    """

    def start(self, trainer: Trainer) -> None:
        """Before the first step of this process."""

    def step(self, trainer: Trainer, result: StepResult) -> None:
        """After each step; ``trainer.step`` counts the steps that are done."""

    def record(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Numbers that belong to ``trainer.step``."""

    def finish(self, trainer: Trainer) -> None:
        """After the last step; not when interrupted."""

    def close(self) -> None:
        """At the very end, also after an error: let go of files and screens."""


class Trainer:
    """Trains what ``assembly`` holds.

    Attributes:
        history: the spans of the run, the one that this process trains the last; empty where none are kept.
        stop_requested: a signal has asked this process to stop.
        stopping: and all ranks know of one that was asked.
        unevaluated: the evaluation of ``step`` was broken off; it is made on resume.
        data: what the last step was trained with.
        recorded: digest of the metrics that the restored checkpoint was saved with.

    Args:
        assembly: the job put together; its model is sharded in place.
    """

    def __init__(self, assembly: Assembly, world: World, hooks: Sequence[Hook]) -> None:
        job = assembly.job
        self.assembly, self.job, self.world, self.hooks = assembly, job, world, list(hooks)
        self.stages, self.model = assembly.stages, assembly.model.to(world.device)
        self.patterns = job.module_patterns()
        self.names = [name for name, _ in self.model.named_parameters()]
        self.boundaries = freeze_boundaries(job, self.names, self.patterns)
        dtype = compute_dtype(job.train.mixed_precision, world.device)
        prepare(
            self.model,
            self.model.shard_units(),
            world,
            dtype,
            reshard=job.distributed.reshard_after_forward,
            recompute=job.train.activation_checkpointing,
            compile_units=job.train.compile_model,
        )
        self.history: list[Span] = []
        self.optimizers = Optimizers(self.model, self.stages, self.patterns, job.train.ema_decay)
        caches = job.train.feature_cache and self.model.has_images
        self.features = FeatureCache(Path(job.train.feature_cache), self.model, world, dtype) if caches else None
        self.step = 0
        self.seconds = 0.0
        self.samples_seen = self.samples_bad = 0
        self.samples_of: Counter[str] = Counter()
        self.skipped_in_a_row = 0
        self.stop_requested = self.stopping = self.unevaluated = False
        self.recorded = ""
        self.bad_samples: list[tuple[str, str]] = []
        self._batches: Iterator[Batch] | None = None
        self._ahead: Data | None = None
        self.data: Data | None = None
        self._stage: Stage | None = None

    @property
    def total_steps(self) -> int:
        return self.stages[-1].end

    @property
    def done(self) -> bool:
        return self.step >= self.total_steps

    @property
    def stage(self) -> Stage:
        """The stage of the next step; at the end of the run the last one."""
        return next((stage for stage in self.stages if self.step < stage.end), self.stages[-1])

    def fit(self) -> None:
        """Runs from the current step to the end, or until a signal asks to stop."""
        try:
            self.apply_freeze()
            for hook in self.hooks:
                hook.start(self)
            while not self.done and not self.stopping:
                if self.step in self.boundaries:
                    self.apply_freeze()
                if self.step == self.stage.start and self.stage.optimizer.moments == "reset":
                    self.optimizers.reset()
                result = self.train_step()
                self.step += 1
                for hook in self.hooks:
                    hook.step(self, result)
            self.sum([])  # a signal while the last step was saved, too
            for hook in self.hooks:
                if not self.stopping:
                    hook.finish(self)
        finally:
            for hook in self.hooks:
                hook.close()

    def sum(self, values: Sequence[float]) -> list[float]:
        """As ``World.sum``; afterwards ``stopping`` says on all ranks whether one of them was asked to stop."""
        *totals, asked = self.world.sum([*values, float(self.stop_requested)])
        self.stopping = self.stopping or asked > 0
        return totals

    def record(self, values: dict[str, float]) -> None:
        """Hands numbers of the current step to all hooks."""
        for hook in self.hooks:
            hook.record(self, values)

    @property
    def frozen(self) -> list[str]:
        """Names of the parameters that do not train at the current step."""
        return sorted(set(self.names) - trainable_names(self.names, self.job.freeze_at(self.step), self.patterns))

    def apply_freeze(self) -> None:
        """Makes exactly what the schedule says for the current step trainable, whatever was before.

        NOTE: only at ``boundaries`` and at the start: between them nothing changes.
        """
        apply_freeze(self.model, trainable_names(self.names, self.job.freeze_at(self.step), self.patterns))

    def next_batches(self) -> list[Batch]:
        """This rank's micro-batches of the current step."""
        if self._batches is None or self._stage is not self.stage:
            self._stage = self.stage
            self._batches = self.assembly.batches(self.stage, self.step, self.world.rank, self.world.size)
        return [next(self._batches) for _ in range(self.stage.train.grad_accum_steps)]

    def look_ahead(self) -> None:
        """Reads the data of the current step now rather than in ``train_step``, so that what is wrong with them is known before anything is
        written.

        Raises:
            ValueError: on all ranks: they cannot be read, no token is trained, or too many samples are bad.
        """
        problem = ""
        try:
            batches = self.next_batches()
        except InputError as error:
            batches, problem = [], str(error)
        if problems := [each for each in self.world.gather(problem) if each]:
            raise InputError(problems[0])
        self._ahead = self._counted(batches)

    def _counted(self, batches: list[Batch]) -> Data:
        """What is in the ``batches`` of all ranks.

        Raises:
            ValueError: no token is trained, or too many samples are bad.
        """
        sections = range(len(self.stage.data.sections()))
        sizes = ((b.num_targets, b.useful_tokens, b.num_images, len(b.sample_names), len(b.skipped), b.texts_left_out) for b in batches)
        counts = [(*size, *map(b.parts.count, sections)) for size, b in zip(sizes, batches, strict=True)]
        targets, tokens, images, samples, bad, left_out, *by_part = (
            int(n) for n in self.world.sum([sum(column) for column in zip(*counts, strict=True)])
        )
        self._account(batches, samples, bad, by_part)
        if not targets:
            raise InputError(f"step {self.step}: no token is trained in samples {[name for b in batches for name in b.sample_names][:5]}")
        return Data(batches, targets, tokens, images, samples, left_out)

    def train_step(self) -> StepResult:
        """One optimizer step. The random state is a function of seed, step and rank, so there is none to save. Steps count from the start of
        their stage, as they do in the data: a stage in a run of its own is the same.

        Raises:
            ValueError: no token of the step is trained, or too many samples are bad.
            TrainingFault: too many steps in a row were not finite, or the last two of the run, or the weights are not.
        """
        begin = time.perf_counter()
        data, self._ahead = self._ahead or self._counted(self.next_batches()), None
        self.data, batches, targets = data, data.batches, data.targets
        torch.manual_seed(hash((self.job.train.seed, self.step - self.stage.start, self.world.rank)))
        rates = self.optimizers.set_step(self.stage, self.step)
        loss, aux_loss = torch.zeros((), device=self.world.device), torch.zeros((), device=self.world.device)
        for index, batch in enumerate(batches):
            sync_gradients(self.model, index == len(batches) - 1)
            batch = batch if self.features is None else self.features.attach(batch)
            output = self.model(batch.to(self.world.device))
            if self.features is not None:
                self.features.keep(batch)
            (output.total / targets).backward()
            loss += output.loss.detach()
            if output.aux_loss is not None:
                aux_loss += output.aux_loss.detach()
        grads = local_gradients(self.model)
        total, aux, squared = self.sum([loss.item(), aux_loss.item(), squared_norm(grads)])
        norm = math.sqrt(squared)
        finite = math.isfinite(total) and math.isfinite(aux) and math.isfinite(norm)
        if finite:
            clip(grads, norm, self.job.train.grad_clip_norm)
            self.optimizers.step()
        self.optimizers.zero_grad()
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if not finite and (spoilt := self._spoilt()):
            raise TrainingFault(
                f"step {self.step}: {spoilt} holds values that are not finite: an earlier update was too large. The last checkpoint is from"
                " before it; go on from there with a lower optimizer.lr"
            )
        cfg = self.job.train
        if self.skipped_in_a_row > (cfg.max_skipped_steps if cfg.on_nonfinite == "skip" else 0):
            limit = f"for more than train.max_skipped_steps = {cfg.max_skipped_steps} steps in a row"
            policy = limit if cfg.on_nonfinite == "skip" else 'and train.on_nonfinite = "stop"'
            raise TrainingFault(f"step {self.step}: loss {total / targets} or gradient norm {norm} is not finite, {policy}")
        if self.skipped_in_a_row > 1 and self.step + 1 == self.total_steps:
            raise TrainingFault(
                f"step {self.step}: loss or gradient is not finite, as in all of the last {self.skipped_in_a_row} steps of the run: an earlier"
                " update was too large, or the data are at fault. Go on from the last checkpoint with a lower optimizer.lr"
            )
        seconds = time.perf_counter() - begin
        self.seconds += seconds
        counts = data.tokens, data.images, data.samples, data.texts_left_out
        return StepResult(self.stage, total / targets, aux / targets, norm, rates, not finite, *counts, seconds)

    def _spoilt(self) -> str:
        """The first parameter, on any rank, that is not finite; empty: all are."""
        own = next((name for name, p in self.model.named_parameters() if not local(p.detach()).isfinite().all()), "")
        return next(filter(None, self.world.gather(own)), "")

    def _account(self, batches: list[Batch], samples: int, bad: int, by_part: list[int]) -> None:
        self.bad_samples = [row for batch in batches for row in batch.skipped]
        self.samples_seen += samples
        self.samples_bad += bad
        if len(by_part) > 1:
            for index, (section, count) in enumerate(zip(self.stage.data.sections(), by_part, strict=True)):
                self.samples_of[f"{index}-{section.source}"] += count
        limit, enough = self.stage.data.max_bad_fraction, min(1000, len(self.assembly.sources[self.stage.index]))
        if self.samples_seen >= enough and self.samples_bad > limit * self.samples_seen:
            last = f"; the last: {self.bad_samples[-1][1]}" if self.bad_samples else ""
            raise InputError(
                f"data: {self.samples_bad} of {self.samples_seen} samples could not be used, data.max_bad_fraction = {limit} allows fewer{last}"
            )
