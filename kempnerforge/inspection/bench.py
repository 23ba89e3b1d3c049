"""What a step of training costs and where its time goes. Nothing is written but a trace that is asked
for, and caches that the config names (``data.images.cache_dir``, ``train.feature_cache``).

A job is built as for training; some steps warm up. Then come three series of steps, since what looks into a
step slows it down: timed as they are; with a stopwatch between phases; under torch's profiler. At the end
the matrix products of a step are run alone.
"""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from kempnerforge.config import JobConfig, Stage
from kempnerforge.data.batching.batch import Batch
from kempnerforge.distributed import world as worlds
from kempnerforge.distributed.world import World, compute_dtype
from kempnerforge.inspection.products import ATTENTION, PRODUCTS, Products, largest_rate
from kempnerforge.training.accounting import TrainingFlops
from kempnerforge.training.batch_size import decide
from kempnerforge.training.hooks.diagnosis import Stopwatch, peak_memory_gib
from kempnerforge.training.initial_weights import initialise
from kempnerforge.training.setup import Assembly, assemble
from kempnerforge.training.trainer import StepResult, Trainer
from kempnerforge.util.errors import InputError

if TYPE_CHECKING:
    from kempnerforge.convert.peer import TransformersLoop

PHASES = ("data", "weights", "vision encoder", "adapter", "embedding", "layers", "head and loss", "backward", "optimizer", "other")
PROFILED = 2
"""Steps under the profiler, and steps whose matrix products are run alone."""
KINDS = {
    "matrix products": PRODUCTS,
    "attention": (ATTENTION, "_flash_attention", "_efficient_attention", "_softmax"),
    "optimizer": ("_foreach", "_fused"),
    "communication": ("c10d", "gloo", "nccl", "all_gather", "reduce_scatter", "all_reduce"),
    "copies": ("copy_", "cat", "split_with_sizes_copy", "index", "gather", "clone"),
}
"""Kinds of operators by how their names begin, after "aten::"; the first that fits counts."""
REST = "elementwise and the rest"


@dataclass(frozen=True)
class Peer:
    """Steps of a plain loop around transformers and of ours, in turns.

    Attributes:
        name: the class of transformers.
        theirs, ours: (seconds, samples, useful tokens) of each step.
    """

    name: str
    theirs: list[tuple[float, int, int]]
    ours: list[tuple[float, int, int]]

    def to_json(self) -> dict[str, Any]:
        """Medians of samples and tokens a second of both, and the ratios, ours over theirs."""
        found: dict[str, Any] = {"name": self.name}
        for column, unit in ((1, "samples"), (2, "tokens")):
            ours, theirs = (statistics.median(step[column] / step[0] for step in steps) for steps in (self.ours, self.theirs))
            found |= {f"{unit}_per_s": theirs, f"our_{unit}_per_s": ours, f"{unit}_ratio": ours / theirs}
        return found


@dataclass(frozen=True)
class Bench:
    """What was measured of one stage.

    Attributes:
        stage: its name.
        seconds: of each timed step, on this process.
        samples, tokens, images: a step has on average, over all processes; tokens are useful ones.
        flops: of forward and backward of a step on average, over all processes, the vision tower included;
            what activation checkpointing repeats is not counted.
        phases: seconds a step spends in each, in the second series; ``PHASES`` that the model does not have
            are left out.
        kinds: seconds a step spends in each kind of operator, by the profiler.
        products_rate: FLOPs a second of the matrix products of a step, run alone on one process.
        peak_rate: FLOPs a second that ``mfu`` compares with, of one process; ``peak_from`` says where it is
            from.
        processes: how many.
        memory_gib: largest use of one process so far.
        peer: None: there was no plain loop beside it.
    """

    stage: str
    seconds: list[float]
    samples: float
    tokens: float
    images: float
    flops: float
    phases: dict[str, float]
    kinds: dict[str, float]
    products_rate: float
    peak_rate: float
    peak_from: str
    processes: int
    memory_gib: float
    device: str
    dtype: str
    peer: Peer | None = None

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """FLOPs a second of one process."""
        return self.flops / self.processes / statistics.mean(self.seconds)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: ``rate / peak_rate`` (Chowdhery et al. 2022, "PaLM", appendix B)."""
        return self.rate / self.peak_rate

    @property
    def data_share(self) -> float:
        """Share of a step that waits for data."""
        return self.phases["data"] / sum(self.phases.values())

    def to_json(self) -> dict[str, Any]:
        """All figures as plain values."""
        quartiles = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else self.seconds * 3
        per_second = {name: getattr(self, name) / statistics.mean(self.seconds) for name in ("samples", "tokens", "images")}
        return {
            "stage": self.stage,
            "device": self.device,
            "dtype": self.dtype,
            "processes": self.processes,
            "steps": len(self.seconds),
            "step_s": self.median,
            "step_quartiles_s": [quartiles[0], quartiles[2]],
            **{f"{name}_per_s": value for name, value in per_second.items()},
            "flops_per_step": self.flops,
            "flops_per_s": self.rate,
            "peak_flops_per_s": self.peak_rate,
            "peak_from": self.peak_from,
            "mfu": self.mfu,
            "products_flops_per_s": self.products_rate,
            "share_of_products": self.rate / self.products_rate,
            "data_share": self.data_share,
            "phases_s": self.phases,
            "kinds_s": self.kinds,
            "memory_gib": self.memory_gib,
            **({} if self.peer is None else {"peer": self.peer.to_json()}),
        }


@dataclass
class _Phases:
    """Times the phases of steps, by hooks of torch on the parts that every arch has."""

    trainer: Trainer
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def __post_init__(self) -> None:
        self.watch = Stopwatch(self.trainer.world.device, self.seconds)
        self._handles: list[Any] = []

    def __enter__(self) -> _Phases:
        model, optimizers = self.trainer.model, self.trainer.optimizers.all
        children = dict(model.named_children())
        # in front of FSDP's own hook, which casts the weights and gathers them: no step waits for data then
        self._handles.append(model.register_forward_pre_hook(lambda *_: self.watch.start("weights"), prepend=True))
        self._at(model, "embedding", "backward")
        if model.hf_model is None:
            for part, name in (("vision_encoder", "vision encoder"), ("adapter", "adapter")):
                if part in children:
                    self._at(children[part], name, "embedding")
            layers = list(model.transformer.layers)
            self._handles.append(layers[0].register_forward_pre_hook(lambda *_: self.watch.start("layers")))
            self._handles.append(layers[-1].register_forward_hook(lambda *_: self.watch.start("head and loss")))
        self._handles.append(optimizers[0].register_step_pre_hook(lambda *_: self.watch.start("optimizer")))
        self._handles.append(optimizers[-1].register_step_post_hook(lambda *_: self.watch.start("other")))
        return self

    def _at(self, module: torch.nn.Module, inside: str, after: str) -> None:
        self._handles.append(module.register_forward_pre_hook(lambda *_: self.watch.start(inside)))
        self._handles.append(module.register_forward_hook(lambda *_: self.watch.start(after)))

    def __exit__(self, *_: object) -> None:
        self.watch.stop()
        for handle in self._handles:
            handle.remove()


def bench(
    job: JobConfig,
    stage: str = "",
    *,
    warmup: int = 5,
    steps: int = 20,
    peak_tflops: float = 0.0,
    trace: Path | None = None,
    against: int | None = None,
) -> Bench:
    """Measures steps of ``stage``, by default the first one. Under torchrun all processes take part.

    Args:
        warmup: steps before.
        steps: in each of the two timed series.
        peak_tflops: of one device, in 1e12 FLOPs a second; 0: ``metrics.peak_tflops``, and without that a
            large matrix product is measured, or the products alone where they are faster.
        trace: file for a trace of the profiled steps, to be read by Perfetto or chrome://tracing; of the
            first process.
        against: take steps of a plain loop around transformers in turns with ours, which pads its rows to so
            many positions, 0: to the longest of a batch; None: no such loop.

    Raises:
        InputError: there is no such stage, it has too few steps, or the job cannot be trained.
    """
    world = worlds.start(job.distributed)
    try:
        assembly = assemble(job)
        decide(assembly, world)
        initialise(assembly.model, assembly.tokenizer)
        chosen = _chosen(assembly.stages, stage, warmup + (2 if against is None else 3) * steps + 2 * PROFILED)
        peer = None
        if against is not None:
            from kempnerforge.convert.peer import TransformersLoop

            dtype = compute_dtype(job.train.mixed_precision, world.device)
            peer = TransformersLoop(assembly, chosen, world.device, dtype, against)
        trainer = Trainer(assembly, world, [])
        trainer.step = chosen.start
        trainer.apply_freeze()
        _run(trainer, warmup)
        counted = _Counted(assembly, trainer)
        timed = _run(trainer, steps, counted)
        with _Phases(trainer) as watched:
            _run(trainer, steps, before=lambda: watched.watch.start("data"))
        beside = _in_turns(trainer, peer, steps) if peer is not None else None
        kinds = _profiled(trainer, trace)
        products_rate = _products(trainer, counted)
        peak = peak_tflops or job.metrics.peak_tflops
        return Bench(
            stage=chosen.name,
            seconds=[result.seconds for result in timed],
            samples=statistics.mean(result.counts.samples for result in timed),
            tokens=statistics.mean(result.counts.tokens for result in timed),
            images=statistics.mean(result.counts.images for result in timed),
            flops=world.sum(world.once([counted.flops], of_batch=True))[0] / steps,
            phases={name: watched.seconds[name] / steps for name in PHASES if name in watched.seconds},
            kinds=kinds,
            products_rate=products_rate,
            peak_rate=peak * 1e12 if peak else max(products_rate, largest_rate(trainer.dtype, world.device)),
            peak_from="given" if peak else "the fastest matrix products measured here",
            processes=world.size,
            memory_gib=max(world.gather(peak_memory_gib(world.device))),
            device=_device(world),
            dtype=str(trainer.dtype).removeprefix("torch.") + (f" and float8 ({job.train.float8})" if job.train.float8 != "off" else ""),
            peer=beside,
        )
    finally:
        worlds.stop()


def _chosen(stages: Sequence[Stage], name: str, steps: int) -> Stage:
    chosen = next((stage for stage in stages if stage.name == name), None) if name else stages[0]
    if chosen is None:
        raise InputError(f"--stage {name}: no such stage; there are {', '.join(stage.name for stage in stages)}")
    if chosen.steps < steps:
        raise InputError(f"stage {chosen.name!r} has {chosen.steps} steps, and {steps} are to be run; take fewer with --steps and --warmup")
    return chosen


@dataclass
class _Counted:
    """Adds up the FLOPs of this process's micro-batches."""

    assembly: Assembly
    trainer: Trainer
    flops: float = 0.0

    def __post_init__(self) -> None:
        self._counter = TrainingFlops(self.assembly.job)
        self._trained = frozenset(name for name, p in self.trainer.model.named_parameters() if p.requires_grad)

    def of(self, batches: Sequence[Batch]) -> int:
        return sum(self._counter.count(batch, self._trained) for batch in batches)


def _run(trainer: Trainer, steps: int, counted: _Counted | None = None, before: Any = None) -> list[StepResult]:
    results = []
    for _ in range(steps):
        if before is not None:
            before()
        results.append(trainer.train_step())
        trainer.step += 1
        if counted is not None and trainer.data is not None:
            counted.flops += counted.of(trainer.data.batches)
    return results


def _in_turns(trainer: Trainer, peer: TransformersLoop, steps: int) -> Peer:
    peer.step()  # warms up
    ours, theirs = [], []
    for _ in range(steps):
        (result,) = _run(trainer, 1)
        ours.append((result.seconds, result.counts.samples, result.counts.tokens))
        step = peer.step()
        theirs.append((step.seconds, step.samples, step.tokens))
    return Peer(peer.name, theirs, ours)


def _profiled(trainer: Trainer, trace: Path | None) -> dict[str, float]:
    """Seconds a step spends in each kind of operator: on the device where there is one, else on the CPU."""
    cuda = trainer.world.device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes lines of its own to stderr
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        _run(trainer, PROFILED)
    if trace is not None and trainer.world.is_main:
        trace.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(trace))
    kinds: defaultdict[str, float] = defaultdict(float)
    for event in found.key_averages():
        micros = event.self_device_time_total if cuda else event.self_cpu_time_total
        name = event.key.removeprefix("aten::")
        kind = next((kind for kind, beginnings in KINDS.items() if name.startswith(beginnings)), REST)
        kinds[kind] += micros / 1e6 / PROFILED
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))


def _products(trainer: Trainer, counted: _Counted) -> float:
    """FLOPs a second of the matrix products of a few steps' micro-batches, run alone."""
    products, flops = Products(), 0
    for _ in range(PROFILED):
        for batch in trainer.next_batches():
            flops += counted.of([batch])
            with products:
                trainer.model(batch.to(trainer.world.device)).mean(1, 1).backward()
        trainer.optimizers.zero_grad()
        trainer.step += 1
    return flops / products.seconds(trainer.world.device)


def _device(world: World) -> str:
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    return f"CPU, {torch.get_num_threads()} threads"
