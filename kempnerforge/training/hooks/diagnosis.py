"""With ``metrics.diagnosis``: how each part of the model learns, and what a step spends its time on. Nothing
that is trained changes.
"""

from __future__ import annotations

import math
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from kempnerforge.config import MetricsConfig
from kempnerforge.data.batching.batch import Batch
from kempnerforge.training.accounting import TrainingFlops
from kempnerforge.training.hooks.attention_share import AttentionShare
from kempnerforge.training.optimizer import held_by, squared_norm
from kempnerforge.training.optimizers.foreach import local
from kempnerforge.training.trainer import Hook, StepResult, Trainer
from kempnerforge.vlm.parts import parts


class Diagnosis(Hook):
    """Records, in the steps of ``metrics.interval``:

    * ``grad_norm/PART``: of the gradient before clipping; ``update_ratio/PART``: norm of the update over norm
      of the weights, of the parameters that train; ``gate/NAME``: each parameter of one element, as the gates
      of ``cross_attention`` are before their tanh; ``attention_on_images/LAYER``: of the first micro-batch,
      see ``AttentionShare``;
    * ``time/data_s``, ``forward_s``, ``backward_s`` (gradient norm included), ``optimizer_s`` and
      ``hooks_s``: seconds a step, means since the last record; data is what the others leave of a step;
    * ``train/tflops_per_s``: FLOPs of forward and backward over the time of the steps, all ranks together,
      the vision tower included; ``train/mfu``: that as a share of ``metrics.peak_tflops`` (Chowdhery et al.
      2022, "PaLM", appendix B);
    * ``train/peak_memory_gib``: of the rank with most.

    It listens to the model and the optimizers by torch's own hooks. On a GPU it waits for the device between
    phases, which costs a little time.
    """

    def __init__(self, cfg: MetricsConfig) -> None:
        self.cfg = cfg
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._flops = self._steps = 0.0
        self._last: float | None = None  # when the step before was seen
        self._handles: list[Any] = []
        self._before: dict[str, list[torch.Tensor]] = {}
        self._squares: dict[str, list[float]] = {}
        self._held: dict[str, list[int]] = {}

    def start(self, trainer: Trainer) -> None:
        self._trainer, self._counted = trainer, TrainingFlops(trainer.assembly.job)
        self._parts = parts(trainer.names)
        self._gates = [name for name, parameter in trainer.model.named_parameters() if parameter.numel() == 1]
        self._running = Stopwatch(trainer.world.device, self._seconds)
        self._shares, self._watched = AttentionShare(trainer.model), -1
        model, first, last = trainer.model, trainer.optimizers.all[0], trainer.optimizers.all[-1]
        self._handles = [
            # in front of FSDP's hook: that casts the weights and gathers them, and no step waits for data then
            model.register_forward_pre_hook(lambda _, inputs: self._forward_begins(*inputs), prepend=True),
            model.register_forward_hook(lambda *_: self._forward_ends()),
            first.register_step_pre_hook(lambda *_: self._update_begins()),
            last.register_step_post_hook(lambda *_: self._update_ends()),
            self._shares,
        ]

    def step(self, trainer: Trainer, result: StepResult) -> None:
        self._running.stop()
        now = time.perf_counter()
        self._seconds["hooks"] += now - self._last - result.seconds if self._last is not None else 0.0
        self._last = now
        self._seconds["step"] += result.seconds
        self._steps += 1
        assert trainer.data is not None
        trained = frozenset(name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad)
        self._flops += sum(self._counted.count(batch, trained) for batch in trainer.data.batches)
        if self._due(trainer.step):
            trainer.record(self._found(trainer, result))
            self._seconds.clear()
            self._flops = self._steps = 0.0

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _due(self, step: int) -> bool:
        return step % self.cfg.interval == 0 or step >= self._trainer.total_steps

    def _forward_begins(self, batch: Batch, cache: object = None) -> None:
        step = self._trainer.step
        if self._trainer.model.training:  # not in an evaluation
            if self._due(step + 1) and self._watched != step:
                self._watched = step
                self._shares.watch(batch)
            self._running.start("forward")

    def _forward_ends(self) -> None:
        self._shares.watch(None)
        if self._trainer.model.training:
            self._running.start("backward")

    def _update_begins(self) -> None:
        if self._due(self._trainer.step + 1):
            trained = {name: parameter for name, parameter in self._trainer.model.named_parameters() if parameter.grad is not None}
            of = lambda part, value: [value(trained[name]) for name in self._parts[part] if name in trained]
            held = self._held = {part: of(part, lambda p: held_by(p, self._trainer.world.size)) for part in self._parts}
            self._squares = {part: [squared_norm(of(part, lambda p: local(p.grad)), held[part]).item()] for part in self._parts}
            self._before = {part: of(part, lambda p: local(p.detach()).clone()) for part in self._parts}
            self._trained = trained
        self._running.start("optimizer")

    def _update_ends(self) -> None:
        self._running.stop()
        if self._before:
            for part, before in self._before.items():
                after = [local(self._trained[name].detach()) for name in self._parts[part] if name in self._trained]
                moved = [new - old for new, old in zip(after, before, strict=True)]
                self._squares[part] += [squared_norm(values, self._held[part]).item() for values in (moved, before)]
            self._before, self._trained = {}, {}

    def _found(self, trainer: Trainer, result: StepResult) -> dict[str, float]:
        """What is recorded, the same on all ranks."""
        squares, self._squares = self._squares or {part: [0.0] * 3 for part in self._parts}, {}
        gates = [trainer.model.get_parameter(name).detach() for name in self._gates]
        gates = [float(local(gate).sum()) / held_by(gate, trainer.world.size) for gate in gates]
        shares = [value * trainer.world.parts / trainer.world.size for value in self._shares.take()]  # means over a rank's heads
        flops = trainer.world.once([self._flops], of_batch=True)
        flops, *rest = trainer.sum([*flops, *gates, *shares, *(value for part in self._parts for value in squares[part])])
        gates, shares, rest = rest[: len(gates)], rest[len(gates) :][: len(shares)], rest[len(gates) + len(shares) :]
        by_part = dict(zip(self._parts, zip(rest[::3], rest[1::3], rest[2::3], strict=True), strict=True))
        values = {f"gate/{name}": value for name, value in zip(self._gates, gates, strict=True)}
        by_layer = zip(self._shares.layers, shares[::2], shares[1::2], strict=True)
        values |= {f"attention_on_images/{layer}": share / words for layer, share, words in by_layer if words}
        if total := math.sqrt(sum(gradient for gradient, _, _ in by_part.values())):  # after clipping; a skipped step has none
            values |= {f"grad_norm/{part}": math.sqrt(g) * result.grad_norm / total for part, (g, _, weight) in by_part.items() if weight}
            values |= {f"update_ratio/{part}": math.sqrt(moved / weight) for part, (_, moved, weight) in by_part.items() if weight}
        seconds = self._seconds
        seconds["data"] = seconds["step"] - seconds["forward"] - seconds["backward"] - seconds["optimizer"]
        phases = ("data", "forward", "backward", "optimizer", "hooks")
        values |= {f"time/{phase}_s": max(0.0, seconds[phase]) / self._steps for phase in phases}
        speed = flops / seconds["step"] / 1e12
        values["train/tflops_per_s"] = speed
        if self.cfg.peak_tflops:
            values["train/mfu"] = speed / self.cfg.peak_tflops / trainer.world.size
        values["train/peak_memory_gib"] = max(trainer.world.gather(peak_memory_gib(trainer.world.device)))
        return values


class Stopwatch:
    """Adds the seconds of one phase after another to ``seconds``."""

    def __init__(self, device: torch.device, seconds: defaultdict[str, float]) -> None:
        self._wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self._seconds = seconds
        self._phase, self._begin = "", 0.0

    def start(self, phase: str) -> None:
        self.stop()
        self._phase, self._begin = phase, time.perf_counter()

    def stop(self) -> None:
        self._wait()
        if self._phase:
            self._seconds[self._phase] += time.perf_counter() - self._begin
        self._phase = ""


def peak_memory_gib(device: torch.device) -> float:
    """GiB in use at most so far: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
