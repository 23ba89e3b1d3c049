"""The training loop. Everything that happens every n steps is a hook (``hooks/``); what differs between
architectures is in ``VLM``.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kempnerforge.config import Stage
from kempnerforge.data.batching.batch import Batch
from kempnerforge.distributed.fsdp import prepare, sync_gradients
from kempnerforge.distributed.world import World, compute_dtype
from kempnerforge.model.float8 import to_float8
from kempnerforge.training.feature_cache import FeatureCache
from kempnerforge.training.freeze import apply_freeze
from kempnerforge.training.history import Span
from kempnerforge.training.optimizer import Optimizers, check_groups, clip, holders, local_gradients, squared_norm
from kempnerforge.training.optimizers.foreach import local
from kempnerforge.training.setup import Assembly
from kempnerforge.util.errors import InputError, PluginError
from kempnerforge.util.plugin_returns import not_numbers


class TrainingFault(RuntimeError):
    """The run has to end; a restart continues from the last checkpoint."""


class Counts(NamedTuple):
    """What is in the micro-batches of a step, over all ranks.

    Attributes:
        targets: trained tokens.
        pairs: texts with exactly one image.
        tokens: useful tokens, padding not counted.
        images: images that the model reads.
        samples: rows.
        bad_samples: samples that could not be used.
        texts_left_out: texts that did not fit into their rows.
    """

    targets: int
    pairs: int
    tokens: int
    images: int
    samples: int
    bad_samples: int
    texts_left_out: int

    @classmethod
    def of(cls, batch: Batch) -> Counts:
        """The counts of one batch of this rank."""
        return cls(
            targets=batch.num_targets,
            pairs=batch.num_pairs,
            tokens=batch.useful_tokens,
            images=batch.num_images,
            samples=len(batch.sample_names),
            bad_samples=len(batch.skipped),
            texts_left_out=batch.texts_left_out,
        )


class StepData(NamedTuple):
    """What a step is trained with: this rank's micro-batches, the counts of all ranks, and the sum of the
    weights of all trained tokens.
    """

    batches: list[Batch]
    counts: Counts
    weight: float


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all ranks.

    Attributes:
        stage: of the step; ``trainer.stage`` is the stage of the next step.
        loss: mean over trained tokens, and ``pair_loss``.
        weighted_loss: as ``loss``, with the weights of ``data.loss_weights``; None: there are none.
        pair_loss: mean over pairs of a text and its image; 0 if the model has no such loss.
        aux_loss: the model's auxiliary losses, as added to the loss; 0 if there are none.
        grad_norm: before clipping.
        rates: learning rates at scale 1, by the keys of the section: "lr", and "muon_lr" where Muon trains.
        skipped: loss or gradient was not finite, and nothing was updated.
        seconds: wall-clock time of the step, its data included.
    """

    stage: Stage
    loss: float
    weighted_loss: float | None
    pair_loss: float
    aux_loss: float
    grad_norm: float
    rates: dict[str, float]
    skipped: bool
    counts: Counts
    seconds: float


class Hook:
    """Something periodic. All ranks call all hooks in the same order.

    A plugin's hook registers with ``@registry.register_hook("type")`` and is made from its ``[[hooks]]``
    table and the run directory.
    """

    def start(self, trainer: Trainer) -> None:
        """Before the first step of this process."""

    def step(self, trainer: Trainer, result: StepResult) -> None:
        """After each step; ``trainer.step`` is the number of steps done."""

    def record(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Numbers to record for ``trainer.step``."""

    def finish(self, trainer: Trainer) -> None:
        """After the last step; not when interrupted."""

    def close(self) -> None:
        """At the very end, also after an error: let go of files and screens."""


class Trainer:
    """Trains the model of ``assembly`` on its data.

    Attributes:
        dtype: of compute.
        history: the spans of the run; the last one is trained by this process. Empty without a run directory.
        stop_requested: a signal has asked this process to stop.
        stopping: a signal has asked some rank to stop, and all ranks know it.
        unevaluated: the evaluation of ``step`` was interrupted; it is repeated on resume.
        data: of the last step.
        recorded: digest of ``metrics.jsonl`` at the restored checkpoint.

    Args:
        assembly: the job put together; its model is sharded in place.
    """

    def __init__(self, assembly: Assembly, world: World, hooks: Sequence[Hook]) -> None:
        job = assembly.job
        self.assembly, self.job, self.world, self.hooks = assembly, job, world, list(hooks)
        self.stages, self.model = assembly.data.stages, assembly.model
        self.freeze = assembly.freeze
        self.freeze.check()
        self.names, self.patterns = self.freeze.names, self.freeze.patterns
        check_groups(job, self.stages, self.names, self.patterns)
        self.dtype = compute_dtype(job.train.mixed_precision, world.device)
        if job.train.float8 != "off":
            to_float8(self.model, job.train.float8, self.dtype, world.device)
        prepare(
            self.model,
            self.model.shard_units(),
            world,
            self.dtype,
            reshard=job.distributed.reshard_after_forward,
            recompute=job.train.activation_checkpointing,
            compile_units=job.train.compile_model,
            keep_products=job.train.activation_checkpointing_keeps == "products",
            blank=assembly.blank,
        )
        self.model.row_ranks, self.model.pair_ranks = world.context, world.across_parts()
        self.history: list[Span] = []
        self.optimizers = Optimizers(self.model, self.stages, self.patterns, job.train.ema_decay)
        caches = job.train.feature_cache and self.model.has_images
        self.features = FeatureCache(Path(job.train.feature_cache), self.model, world, self.dtype) if caches else None
        self.step = self.samples_seen = self.samples_bad = self.skipped_in_a_row = 0
        self.seconds = 0.0
        self.samples_of: Counter[str] = Counter()
        self.stop_requested = self.stopping = self.unevaluated = False
        self.recorded = ""
        self.bad_samples: list[tuple[str, str]] = []
        self._calls: Hook | None = None
        self._batches: Iterator[Batch] | None = None
        self._batches_of: Stage | None = None
        self._ahead: StepData | None = None
        self.data: StepData | None = None

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
        """Trains from the current step to the end, or until a signal asks to stop."""
        try:
            self.apply_freeze()
            for hook in self._each_hook():
                hook.start(self)
            while not self.done and not self.stopping:
                if self.step in self.freeze.boundaries:
                    self.apply_freeze()
                if self.step == self.stage.start and self.stage.optimizer.moments == "reset":
                    self.optimizers.reset()
                result = self.train_step()
                self.step += 1
                for hook in self._each_hook():
                    hook.step(self, result)
            self.sum([])  # a signal may have come while the last step was saved
            for hook in self._each_hook():
                if not self.stopping:
                    hook.finish(self)
        finally:
            for hook in self.hooks:
                hook.close()

    def train_step(self) -> StepResult:
        """One optimizer step: data, forward and backward per micro-batch, gradient norm, update.

        Raises:
            ValueError: no token of the step is trained, or too many samples are bad.
            TrainingFault: see ``_check_finite``.
        """
        begin = time.perf_counter()
        self.data = data = self._ahead or self._count(self.next_batches())
        self._ahead = None
        # losses are means over the trained tokens and the pairs of all ranks and micro-batches
        targets, pairs, weight = data.counts.targets, data.counts.pairs, data.weight

        # A function of seed, step of the stage and rank: there is no random state to save, and a stage trains
        # the same when it is a separate run.
        torch.manual_seed(hash((self.job.train.seed, self.step - self.stage.start, self.world.part)))
        rates = self.optimizers.set_step(self.stage, self.step)

        loss_sum, weighted_sum, aux_sum, pair_sum = (torch.zeros((), device=self.world.device) for _ in range(4))
        for index, batch in enumerate(data.batches):
            is_last = index == len(data.batches) - 1
            sync_gradients(self.model, is_last or self.job.distributed.accumulate_sharded)  # by default once a step
            batch = batch if self.features is None else self.features.attach(batch)
            output = self.model(batch.to(self.world.device))
            if self.features is not None:
                self.features.keep(batch)
            output.mean(weight, pairs).backward()
            loss_sum += output.loss.detach()
            if output.weighted_loss is not None:
                weighted_sum += output.weighted_loss.detach()
            if output.aux_loss is not None:
                aux_sum += output.aux_loss.detach()
            if output.pair_loss is not None:
                pair_sum += output.pair_loss.detach()

        grads = local_gradients(self.model)
        (counts,) = self.world.once([1.0])
        losses = counts * torch.stack([loss_sum, weighted_sum, aux_sum, pair_sum]).double()
        squared_sum = squared_norm(grads, holders(self.model, self.world.size)).to(losses.device)
        total, weighted, aux, paired, squared = self.sum(torch.cat([losses, squared_sum[None]]))  # one transfer
        pair_loss, aux_loss, norm = paired / max(1, pairs), aux / weight, math.sqrt(squared)
        loss = total / targets + pair_loss
        finite = all(map(math.isfinite, (loss, aux, norm)))  # equal on all ranks: all step, or none
        if finite:
            clip(grads, norm, self.job.train.grad_clip_norm)
            self.optimizers.step()
        self.optimizers.zero_grad()
        self._check_finite(finite, f"loss {loss} or gradient norm {norm}")

        seconds = time.perf_counter() - begin
        self.seconds += seconds
        return StepResult(
            stage=self.stage,
            loss=loss,
            weighted_loss=weighted / weight + pair_loss if self.stage.data.loss_weights_by_section() else None,
            pair_loss=pair_loss,
            aux_loss=aux_loss,
            grad_norm=norm,
            rates=rates,
            skipped=not finite,
            counts=data.counts,
            seconds=seconds,
        )

    def _check_finite(self, finite: bool, values: str) -> None:
        """Counts steps that are not finite, and ends a run that does not recover.

        Args:
            values: of this step, for messages.

        Raises:
            TrainingFault: a weight is not finite; or too many steps in a row; or the last two of the run.
        """
        if finite:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        if name := self._parameter_not_finite():
            raise TrainingFault(
                f"step {self.step}: {name} holds values that are not finite: an earlier update was too large. The last checkpoint is from"
                " before it; go on from there with a lower optimizer.lr"
            )
        cfg = self.job.train
        if cfg.on_nonfinite != "skip":
            raise TrainingFault(f'step {self.step}: {values} is not finite, and train.on_nonfinite = "stop"')
        if self.skipped_in_a_row > cfg.max_skipped_steps:
            limit = f"for more than train.max_skipped_steps = {cfg.max_skipped_steps} steps in a row"
            raise TrainingFault(f"step {self.step}: {values} is not finite, {limit}")
        if self.skipped_in_a_row > 1 and self.step + 1 == self.total_steps:
            raise TrainingFault(
                f"step {self.step}: loss or gradient is not finite, as in all of the last {self.skipped_in_a_row} steps of the run: an earlier"
                " update was too large, or the data are at fault. Go on from the last checkpoint with a lower optimizer.lr"
            )

    def _parameter_not_finite(self) -> str:
        """The first parameter, on any rank, with a value that is not finite; empty: there is none."""
        found = next((name for name, p in self.model.named_parameters() if not local(p.detach()).isfinite().all()), "")
        return next(filter(None, self.world.gather(found)), "")

    # ---- data ------------------------------------------------------------------------------------

    def next_batches(self) -> list[Batch]:
        """This rank's micro-batches of the current step."""
        if self._batches is None or self._batches_of is not self.stage:
            self._batches_of = self.stage
            self._batches = self.assembly.data.batches(self.stage, self.step, self.world.data_rank, self.world.data_size)
        weights = self.stage.data.loss_weights_by_section()
        return [next(self._batches).weighted(weights) for _ in range(self.stage.train.grad_accum_steps)]

    def look_ahead(self) -> None:
        """Reads the data of the current step before ``train_step`` needs them, so that errors in them come
        before anything is written.

        Raises:
            ValueError: on all ranks: they cannot be read, no token is trained, or too many samples are bad.
        """
        self._ahead = self._count(self.world.together(self.next_batches))

    def _count(self, batches: list[Batch]) -> StepData:
        """Adds up what is in the ``batches`` of all ranks, for this step and for the run.

        Raises:
            ValueError: no token is trained, or too many samples are bad.
        """
        sections = self.stage.data.sections()
        rows = [[batch.weight, *Counts.of(batch), *map(batch.parts.count, range(len(sections)))] for batch in batches]
        weight, *others = self.world.sum(self.world.once([sum(column) for column in zip(*rows, strict=True)], of_batch=True))
        totals = [int(total) for total in others]
        counts, by_section = Counts(*totals[: -len(sections)]), totals[-len(sections) :]
        self.bad_samples = [row for batch in batches for row in batch.skipped] if self.world.is_first_of_batch else []
        self.samples_seen += counts.samples
        self.samples_bad += counts.bad_samples
        if len(sections) > 1:
            self.samples_of.update({f"{k}-{section.source}": by_section[k] for k, section in enumerate(sections)})
        limit, enough = self.stage.data.max_bad_fraction, min(1000, len(self.assembly.data.sources[self.stage.index]))
        if self.samples_seen >= enough and self.samples_bad > limit * self.samples_seen:
            last = f"; the last: {self.bad_samples[-1][1]}" if self.bad_samples else ""
            raise InputError(
                f"data: {self.samples_bad} of {self.samples_seen} samples could not be used, data.max_bad_fraction = {limit} allows fewer{last}"
            )
        if not counts.targets:
            raise InputError(f"step {self.step}: no token is trained in samples {[name for b in batches for name in b.sample_names][:5]}")
        return StepData(batches, counts, weight)

    # ---- for hooks -------------------------------------------------------------------------------

    def sum(self, values: Sequence[float] | Tensor) -> list[float]:
        """As ``World.sum``; afterwards ``stopping`` tells all ranks whether one of them was asked to stop."""
        asks = float(self.stop_requested)
        *totals, asked = self.world.sum(torch.cat([values, values.new_full((1,), asks)]) if isinstance(values, Tensor) else [*values, asks])
        self.stopping = self.stopping or asked > 0
        return totals

    def record(self, values: dict[str, float]) -> None:
        """Hands numbers of the current step to all hooks; other values are an error of the hook that is called."""
        if wrong := not_numbers(values):
            raise PluginError(f"{type(self._calls).__name__}: trainer.record at step {self.step}: {wrong}")
        for hook in self.hooks:
            hook.record(self, values)

    def _each_hook(self) -> Iterator[Hook]:
        """All hooks in their order, with each as the one that is called."""
        for hook in self.hooks:
            self._calls = hook
            yield hook

    @property
    def frozen(self) -> list[str]:
        """Names of the parameters that do not train at the current step."""
        return sorted(set(self.names) - self.freeze.trainable(self.step))

    def apply_freeze(self) -> None:
        """Makes trainable exactly what the schedule names for the current step.

        NOTE: only at ``freeze.boundaries`` and at the start: between them nothing changes.
        """
        apply_freeze(self.model, self.freeze.trainable(self.step))
