"""Random freeze schedules, each from its number alone; data that any number of ranks shares out alike; and a plain loop to compare with."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import cache, reduce
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from kempnerforge.config import DistributedConfig, FreezeSpec, JobConfig, Stage, StageConfig, TrainConfig
from kempnerforge.config import registry as registries
from kempnerforge.config.vlm import FreezeStage, VLMConfig
from kempnerforge.data.batching.batch import Batch
from kempnerforge.data.batching.collate import collate
from kempnerforge.data.sample import Sample
from kempnerforge.training.data import JobData
from kempnerforge.training.setup import Assembly, assemble
from tests.training.tiny import optimizer_config, scheduler_config
from tests.vlm.tiny import (
    ANSWERED,
    FOREIGN,
    INTERLEAVED,
    KEYS,
    LATE,
    MODEL,
    NO_IMAGE,
    ONE,
    THREE,
    TWICE,
    TWO_IMAGES,
    shake,
    tiny,
    tiny_job,
    tokenizer,
)

ARCHS: list[str | None] = [None, *(arch for arch in registries.archs if arch not in FOREIGN)]
CUTS: tuple[tuple[Sample, ...], ...] = ((ONE, THREE, LATE), (TWO_IMAGES, INTERLEAVED), (TWICE, ONE), (ANSWERED,))
TEXT_ALONE = (NO_IMAGE,)
"""What micro-batches are made of; the first of a step has images, so that everything that trains is reached."""


@dataclass(frozen=True, repr=False)
class Schedule:
    """A random job.

    Attributes:
        trainable: what must train, by step; decided name by name, apart from the package.
        resets: steps at which the optimizer's state is dropped.
    """

    number: int
    arch: str | None
    job: JobConfig
    trainable: tuple[frozenset[str], ...]
    resets: frozenset[int]

    def __repr__(self) -> str:
        job, train = self.job, self.job.train
        how = [train.mixed_precision, job.optimizer.name, f"accumulation {train.grad_accum_steps}", f"dropout {job.model.dropout}"]
        how += [name for name in ("activation_checkpointing", "compile_model") if getattr(train, name)]
        how += ["resharded"] if job.distributed.reshard_after_forward else []
        specs = (job.freeze_at(step) for step in range(len(self.trainable)))
        when = [" ".join(f"{'-' if spec.frozen else '+'}{spec.module}" for spec in found) or "all" for found in specs]
        return f"schedule {self.number}, {self.arch or 'text only'}, {', '.join(how)}:\n" + "\n".join(when)

    @property
    def flips(self) -> int:
        return sum(a != b for a, b in zip(self.trainable, self.trainable[1:], strict=False))


@cache
def facts(arch: str | None) -> tuple[list[str], dict[str, list[str]], frozenset[str]]:
    """Of an arch: its parameter names, its aliases, and the names that the loss of every batch with images reaches. The last is not all: what
    the image's side of the last layer computes is read only where a word follows an image, and biases of keys get rounding alone.
    """
    assembly = built(tiny_job(arch))
    model, names = assembly.model, [name for name, _ in assembly.model.named_parameters()]
    reached = set(names)
    for samples in CUTS:
        model.zero_grad()
        model(scripted(assembly).collate(samples)).mean(1, 1).backward()
        reached &= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-5}
    return names, assembly.job.vlm.module_patterns if assembly.job.vlm is not None else {}, frozenset(reached)


@cache
def makes_pairs(arch: str | None) -> bool:
    return "embeddings" in tiny(arch, device="meta").model.gives


def decide(names: Sequence[str], specs: Sequence[FreezeSpec], patterns: dict[str, list[str]]) -> frozenset[str]:
    """For each name alone: the last directive that matches it."""
    train = set()
    for name in names:
        frozen = False
        for spec in specs:
            if any(fnmatchcase(name, pattern) for pattern in patterns.get(spec.module, [spec.module])):
                frozen = spec.frozen
        if not frozen:
            train.add(name)
    return frozenset(train)


def some_specs(rng: random.Random, names: Sequence[str], patterns: dict[str, list[str]]) -> tuple[FreezeSpec, ...]:
    """Aliases, names, and patterns of all sorts that hit; some of them thaw again."""

    def module() -> str:
        words = rng.choice(names).split(".")
        depth = rng.randint(1, len(words))
        return rng.choice(
            [
                rng.choice([*patterns, "transformer.*"]),
                ".".join(words[:depth]) + ".*" * (depth < len(words)),
                "*." + ".".join(words[-min(depth, len(words) - 1) :]),
                ".".join("*" if word.isdigit() else word for word in words),
                "*",
            ]
        )

    first = [FreezeSpec("*")] if rng.random() < 0.2 else []
    return (*first, *(FreezeSpec(module(), rng.random() < 0.65) for _ in range(rng.randint(0, 4))))


def schedule(number: int, *, ranks: bool = False, compiled: bool = False) -> Schedule:
    """The schedule of that number: both forms of freezing, all archs in turn.

    Args:
        ranks: it is going to run on two ranks and on one: nothing random in the model.
        compiled: it is going to be compiled, and short.
    """
    rng = random.Random(f"{number} {ranks} {compiled}")
    archs = [arch for arch in ARCHS if not (ranks and makes_pairs(arch))]  # negatives of two ranks are not those of one process
    arch = archs[number % len(archs)]
    names, patterns, reached = facts(arch)

    def specs(before: tuple[FreezeSpec, ...] = ()) -> tuple[FreezeSpec, ...]:
        for tries in count():
            found = some_specs(rng, names, patterns)
            train = decide(names, (*before, *found), patterns)
            if train & reached and (train not in seen[-1:] or tries > 20):
                seen.append(train)
                return found
        raise AssertionError

    seen: list[frozenset[str]] = []
    steps = 3 if compiled else rng.randint(5, 8)  # each change and each evaluation is compiled anew
    starts = [0, *sorted(rng.sample(range(1, steps), 1 if compiled else rng.randint(2, 4)))]
    ends = [*starts[1:], steps]
    base = specs() if arch is not None and rng.random() < 0.5 else ()
    resets: list[int] = []
    stages: list[StageConfig] = []
    changes: list[FreezeStage] = []
    in_force: list[tuple[FreezeSpec, ...]] = []
    if arch is None or rng.random() < 0.5:
        for start, end in zip(starts, ends, strict=True):
            own = None if arch is not None and rng.random() < 0.2 else specs()
            optimizer: dict[str, Any] = {"lr": rng.choice([3e-3, 1e-2])}
            if rng.random() < 0.4:
                optimizer["moments"] = "reset"
                resets.append(start)
            stages.append(StageConfig(f"from {start}", end - start, None if own is None else list(own), optimizer=optimizer))
            in_force += [base if own is None else own] * (end - start)
    else:
        first = starts[1] if rng.random() < 0.5 else 0
        seen += [decide(names, base, patterns)] * bool(first)
        in_force, before = [base] * first, base
        for start, end in zip(starts, ends, strict=True):
            if start >= first:
                changes.append(FreezeStage(start, specs(before)))
                before = (*before, *changes[-1].specs)
                in_force += [before] * (end - start)
    turn = number // len(ARCHS) + number
    precision, accumulation = ("fp32", "bf16")[turn % 2], (1, 2)[turn // 2 % 2]
    others = (
        [] if compiled or (ranks and accumulation == 2) else ["muon", "lion", "schedule_free_adamw"]
    )  # signs would blow up another order of sums
    name = rng.choice(["adamw", "adamw", "adamw", *others])
    train = TrainConfig(
        max_steps=0 if stages else steps,
        batch_size=4,
        grad_accum_steps=accumulation,
        seq_len=96,
        seed=number,
        mixed_precision=precision,
        compile_model=compiled,
        activation_checkpointing=rng.random() < 0.25,
        grad_clip_norm=0.0,
        ema_decay=0.0 if name == "schedule_free_adamw" else rng.choice([0.0, 0.9]),
    )
    job = tiny_job(
        arch,
        vlm=None
        if arch is None
        else VLMConfig.for_arch(arch, **{"max_text_len": 64, "freeze": list(base), "freeze_schedule": changes} | KEYS.get(arch, {})),
        model=replace(MODEL, dropout=0.0 if ranks or compiled else rng.choice([0.0, 0.2])),
        train=train,
        stages=stages,
        optimizer=optimizer_config(name, lr=1e-2, eps=1e-3 if ranks or compiled else 1e-8),
        scheduler=scheduler_config("constant"),
        distributed=DistributedConfig(reshard_after_forward=rng.random() < 0.5),
    )
    job.validate()
    return Schedule(number, arch, job, tuple(decide(names, s, patterns) for s in in_force), frozenset(resets))


class Scripted(JobData):
    """Micro-batch ``m * world + rank`` of a step is the same for any number of ranks."""

    def collate(self, samples: Sequence[Sample]) -> Batch:
        encoder = self.encoder(self.stages[0])
        return collate([encoder.encode(sample, seed=0) for sample in samples], self.tokenizer.pad_id, None)

    def micro_batch(self, step: int, index: int) -> Batch:
        rng = random.Random(f"{self.seed} {step} {index}")
        return self.collate(TEXT_ALONE if index and rng.random() < 0.3 else rng.choice(CUTS))

    def batches(self, stage: Stage, step: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        while True:
            for micro in range(stage.train.grad_accum_steps):
                yield self.micro_batch(step, micro * world + rank)
            step += 1


def scripted(assembly: Assembly) -> Scripted:
    assert isinstance(assembly.data, Scripted)
    return assembly.data


def built(job: JobConfig) -> Assembly:
    """The job with noise on its weights: all gates are open."""
    it = assemble(job, tokenizer(*job.model.new_tokens), data=False)
    shake(it.model, 0.1)
    sources: list[Any] = [range(1000)] * max(1, len(it.stages))
    it.data = Scripted(**{f.name: getattr(it.data, f.name) for f in fields(JobData)} | {"sources": sources})
    return it


def run_plainly(it: Schedule, ranks: int = 1) -> dict[str, Tensor]:
    """The same in a loop without the package's trainer, sharding, freezing and optimizers: AdamW on fp32 weights, computed in a copy.

    Args:
        ranks: gradients are added up first over the micro-batches of each rank, then over ranks.
    """
    assembly, train, cfg = built(it.job), it.job.train, it.job.optimizer
    model = assembly.model.to(torch.float32 if train.mixed_precision == "fp32" else torch.bfloat16)
    if model.has_images:
        model.encode = lambda images, known=None: model.adapter(model.vision_encoder(images))  # nothing is spared
    weights = {name: nn.Parameter(value.detach().clone()) for name, value in built(it.job).model.named_parameters()}
    optimizer: torch.optim.Optimizer | None = None
    for step, want in enumerate(it.trainable):
        if optimizer is None or step in it.resets:
            shapes = ([p for p in weights.values() if p.ndim > 1], [p for p in weights.values() if p.ndim <= 1])
            decays = [{"params": group, "weight_decay": decay} for group, decay in zip(shapes, (cfg.weight_decay, 0.0), strict=True)]
            optimizer = torch.optim.AdamW(decays, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=ranks == 1)
        stage = next(stage for stage in assembly.stages if step < stage.end)
        for group in optimizer.param_groups:
            group["lr"] = stage.optimizer.lr
        model.train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in want).data.copy_(weights[name].data)
        for path, module in model.named_modules():
            inside = {f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters()}
            if inside and not inside & want:
                module.eval()
        batches = [scripted(assembly).micro_batch(step, index) for index in range(ranks * train.grad_accum_steps)]
        targets, pairs = sum(batch.num_targets for batch in batches), sum(batch.num_pairs for batch in batches)
        sums = []
        for rank in range(ranks):
            torch.manual_seed(hash((train.seed, step - stage.start, rank)))
            sums.append([])
            for batch in batches[rank::ranks]:
                model.zero_grad()
                model(batch).mean(targets, pairs).backward()
                sums[-1].append({name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None})
        for name, parameter in weights.items():
            of_ranks = [part for parts in sums if (part := added([grads[name] for grads in parts if name in grads])) is not None]
            parameter.grad = added(of_ranks)
        optimizer.step()
    return {f"model.{name}": value for name, value in weights.items()}


def added(tensors: Sequence[Tensor]) -> Tensor | None:
    """Their sum, from left to right; None of nothing."""
    return reduce(torch.add, tensors) if tensors else None
