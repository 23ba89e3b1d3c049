"""Random freeze schedules through the trainer: at every step exactly what the schedule says moves, and nothing else of the run is touched.

A schedule comes from its number alone, so a failure names what to run again. ``SCHEDULES=500 pytest tests/training/test_stage_property.py`` tries
500 of them in one process and a third as many on two ranks; with ``-m slow`` a twentieth is compiled.
"""

from __future__ import annotations

import inspect
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from kempnerforge.checkpoint import model_tensors, optimizer_tensors
from kempnerforge.distributed.world import World
from kempnerforge.eval.mode import mode
from kempnerforge.training.optimizers.adamw import AdamWRule
from kempnerforge.training.trainer import Hook, StepResult, Trainer
from tests.dist import run_ranks
from tests.distributed.workers import in_world
from tests.params import quick
from tests.training.schedules import ARCHS, CUTS, Schedule, built, facts, run_plainly, schedule, scripted
from tests.training.tiny import plain
from tests.vlm.tiny import full

COUNT = int(os.environ.get("SCHEDULES", "30"))
"""Schedules that are tried in one process."""
COMPILED = 9
"""The number of the schedule that is compiled on two ranks: one of ``joint_decoder`` in fp32."""


class Watch(Hook):
    """Looks at every update from both sides, and evaluates right before every change of what trains (and now and then between).

    Attributes:
        evaluations: how many there were.
        losses: by step.
    """

    def __init__(self, it: Schedule) -> None:
        self.it, self.evaluations = it, 0
        self.losses: list[float] = []
        self._rng = random.Random(it.number)
        self._has_state: set[str] = set()

    def start(self, trainer: Trainer) -> None:
        update = trainer.optimizers.step
        trainer.optimizers.step = lambda: self.update(trainer, update)
        if self._rng.random() < 0.3:  # FSDP's set-up happens in the first forward pass: before anything is frozen, or after
            self.evaluate(trainer)

    def step(self, trainer: Trainer, result: StepResult) -> None:
        assert not result.skipped and all(p.grad is None for p in trainer.model.parameters()), self.it
        self.losses.append(result.loss)
        if trainer.step in trainer.freeze.boundaries or self._rng.random() < 0.2:
            self.evaluate(trainer)

    @torch.no_grad()
    def evaluate(self, trainer: Trainer) -> None:
        """As a hook does it, or carelessly: with dropout, with the weights that are trained. Nothing may be left behind."""
        before, training = state_of(trainer), [module.training for module in trainer.model.modules()]
        with (
            mode(trainer.model, training=False) if self._rng.random() < 0.7 else nullcontext(),
            trainer.optimizers.averaged() if self._rng.random() < 0.7 else nullcontext(),
        ):
            trainer.model(scripted(trainer.assembly).collate(CUTS[0]))
        self.evaluations += 1
        if self._rng.random() < 0.3:  # looking at the weights brings them into their resting state, which an evaluation alone does not
            assert not any(changed(trainer.world, a, b) for a, b in zip(before, state_of(trainer), strict=True)), self.it
        assert [module.training for module in trainer.model.modules()] == training

    def update(self, trainer: Trainer, update: Callable[[], None]) -> None:
        model, want = trainer.model, self.it.trainable[trainer.step]
        reached = facts(self.it.arch)[2]
        check_modes(model, want)
        parameters = dict(model.named_parameters())
        with_gradient = {name for name, p in parameters.items() if p.grad is not None}
        assert {name for name, p in parameters.items() if p.requires_grad} == want, self.it
        assert want & reached <= with_gradient <= want, (sorted(want & reached ^ with_gradient), self.it)
        assert {p.grad.dtype for p in parameters.values() if p.grad is not None} == {torch.float32}
        weights, state = state_of(trainer)
        if trainer.step in self.it.resets:
            assert not state, self.it
            self._has_state = set()
        assert {key.rpartition("|")[0] for key in state} == self._has_state, self.it
        self._has_state |= with_gradient
        update()
        weights_now, state_now = state_of(trainer)
        assert {key.rpartition("|")[0] for key in state_now} == self._has_state, self.it
        moved = changed(trainer.world, weights, weights_now)
        assert want & reached <= moved <= want, (sorted(moved ^ want), self.it)
        frozen_state = {key for key in state if key.rpartition("|")[0] not in want}
        assert not changed(trainer.world, state, state_now) & frozen_state, self.it


def state_of(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of this rank's shards: weights by name, optimizer state by name and key."""
    found = model_tensors(trainer.model), optimizer_tensors(trainer.model, trainer.optimizers.all)
    weights, state = ({k.partition(".")[2]: plain(v).clone() for k, v in part.items()} for part in found)
    return weights, state


def changed(world: World, before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of ``before`` whose bits differ on any rank; a small tensor may lie on one alone."""
    flags = world.sum([float(not torch.equal(value, after[name])) for name, value in before.items()])
    return {name for name, flag in zip(before, flags, strict=True) if flag}


def check_modes(model: nn.Module, trainable: frozenset[str]) -> None:
    """Modules whose parameters are all frozen, and all that is in them, evaluate; all others train."""

    def visit(module: nn.Module, path: str, evaluates: bool) -> None:
        inside = [f"{path}{name}" for name, _ in module.named_parameters()]
        evaluates = evaluates or (bool(inside) and not trainable & set(inside))
        assert module.training != evaluates, f"{path}: training {module.training}"
        for name, child in module.named_children():
            visit(child, f"{path}{name}.", evaluates)

    visit(model, "", False)


@contextmanager
def reductions() -> Iterator[list[torch.dtype]]:
    """The dtypes in which FSDP adds up gradients, one for each time."""
    seen: list[torch.dtype] = []
    real = _fsdp_param_group.foreach_reduce
    signature = inspect.signature(real)

    def record(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        seen.append(given["reduce_dtype"] or given["unsharded_grads"][0].dtype)
        return real(*args, **kwargs)

    with mock.patch.object(_fsdp_param_group, "foreach_reduce", record):
        yield seen


def run(it: Schedule, world: World, accumulation: int = 0) -> tuple[dict[str, Tensor], Watch]:
    """Trains along the schedule, watched; whole weights at the end."""
    job = it.job
    if accumulation:
        job = replace(job, train=replace(job.train, grad_accum_steps=accumulation))
    watch = Watch(it)
    with reductions() as dtypes:
        trainer = Trainer(built(job), world, [watch])
        trainer.fit()
    assert trainer.step == len(it.trainable) == len(watch.losses) and all(map(math.isfinite, watch.losses)), it
    assert len(dtypes) >= trainer.step and set(dtypes) == {torch.float32}, (dtypes, it)
    return {name: value.detach().clone() for name, value in full(model_tensors(trainer.model)).items()}, watch


@contextmanager
def unfused() -> Iterator[None]:
    """AdamW without its fused kernel, which computes the entries after the last whole vector of a tensor by other code: now and then their last
    bit depends on where a tensor is cut into shards.
    """
    plain_adamw = lambda rule, groups, cfg: torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, foreach=False)
    with mock.patch.object(AdamWRule, "make", plain_adamw):
        yield


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest of all numbers; 0.0 is bitwise equality."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).detach().abs().max()) for name in a)


# ---- one process -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", quick(range(6), 0))
def test_random_schedules(part: int, world: World, record_property: Callable[[str, object], None]) -> None:
    """What moves, what has gradients and state, modes, reductions; and with AdamW the weights of a plain loop, bit by bit."""
    tried, flips, evaluations, compared = 0, 0, 0, 0
    for number in range(part, COUNT, 6):
        it = schedule(number)
        weights, watch = run(it, world)
        tried, flips, evaluations = tried + 1, flips + it.flips, evaluations + watch.evaluations
        if it.job.optimizer.name == "adamw":
            assert difference(weights, run_plainly(it)) == 0.0, it
            compared += 1
    record_property("schedules", tried)
    print(f"{tried} schedules, {flips} changes, {evaluations} evaluations; {compared} equal to a plain loop, bitwise")


def test_the_schedules_are_what_they_should_be() -> None:
    """Every arch, both forms and every setting is there; specs freeze and thaw; a part that was frozen trains again."""
    tried = [schedule(number) for number in range(max(COUNT, 30))]
    assert {it.arch for it in tried} == set(ARCHS) and "early_fusion" in ARCHS
    assert {bool(it.job.stages) for it in tried if it.arch} == {True, False}
    for setting in ("mixed_precision", "grad_accum_steps", "activation_checkpointing"):
        assert len({getattr(it.job.train, setting) for it in tried}) == 2, setting
    assert {it.job.distributed.reshard_after_forward for it in tried} == {True, False}
    assert {it.job.optimizer.name for it in tried} == {"adamw", "muon", "lion", "schedule_free_adamw"}
    specs = [spec for it in tried for step in range(len(it.trainable)) for spec in it.job.freeze_at(step)]
    assert any(spec.module in facts("mot")[1] for spec in specs) and any("*" in spec.module for spec in specs)
    assert {spec.frozen for spec in specs} == {True, False}
    again = [it for it in tried if any(b - a for a, b in zip(it.trainable, it.trainable[1:], strict=False))]
    assert len(again) > len(tried) // 2 and any(it.resets - {0} for it in tried)


def test_a_watch_sees_what_is_wrong(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above fail where the schedule is not followed."""
    it = next(s for s in map(schedule, range(100)) if s.trainable[0] != s.trainable[-1] and s.flips)
    monkeypatch.setattr(Trainer, "apply_freeze", lambda self: None)
    with pytest.raises(AssertionError):
        run(it, world)


# ---- two ranks ---------------------------------------------------------------------------------------------------------


def ranks_run(out: str, numbers: str, compiled: str) -> None:
    """Every schedule on the ranks of this world; rank 0 writes whole weights by number."""

    def body(world: World) -> None:
        torch.set_num_threads(1)
        found = {}
        for number in map(int, numbers.split(",")):
            with unfused():
                found[number], _ = run(schedule(number, ranks=True, compiled=bool(compiled)), world)
        if world.is_main:
            torch.save(found, out)
        world.barrier()

    in_world(body)


def compare_ranks(numbers: Sequence[int], world: World, folder: Path, *, compiled: bool = False, timeout: float = 240) -> str:
    """Two ranks with accumulation a against one with 2a, the same micro-batches: where a is 1 sums have one order only, and the weights are
    bitwise the same. A plain loop adds up in the order of the ranks, so it must give their weights bit by bit in all cases.
    """
    listed = ",".join(map(str, numbers))
    results = run_ranks("tests.training.test_stage_property:ranks_run", 2, folder / "weights.pt", listed, "yes" * compiled, timeout=timeout)
    assert [r.returncode for r in results] == [0, 0], "".join(r.stderr[-3000:] for r in results)
    found = torch.load(folder / "weights.pt")
    assert list(found) == list(numbers)
    exact, plainly, largest = 0, 0, 0.0
    for number, weights in found.items():
        it = schedule(number, ranks=True, compiled=compiled)
        accumulation = it.job.train.grad_accum_steps
        with unfused():
            here = difference(weights, run(it, world, 2 * accumulation)[0])
        if accumulation == 1:
            assert here == 0.0 or (compiled and here < 1e-4), (here, it)
            exact += 1
        elif it.job.train.mixed_precision == "fp32":
            assert here < 1e-5, (here, it)
            largest = max(largest, here)
        if it.job.optimizer.name == "adamw" and not compiled:
            assert difference(weights, run_plainly(it, ranks=2)) == 0.0, it
            plainly += 1
    return (
        f"{len(found)} schedules; with the same micro-batches in one process {exact} equal bitwise, {plainly} equal to a plain loop bitwise;"
        f" with sums in another order (fp32) the largest difference of a weight is {largest:.1e}"
    )


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("count", quick([3, len(ARCHS), max(2 * len(ARCHS), COUNT // 3)], 3))
def test_two_ranks_equal_one_process(count: int, world: World, tmp_path: Path) -> None:
    """Many schedules in one start of the ranks, every arch; all that is watched on one process is watched on each rank, too."""
    print(compare_ranks(range(count), world, tmp_path, timeout=120 + 10 * COUNT))


# ---- compiled ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", range(1, 1 + max(2, COUNT // 20)))
def test_compiled_schedules(number: int, world: World) -> None:
    """All that is watched, and in fp32 the weights of the same schedule without a compiler, up to rounding."""
    it = schedule(number, compiled=True)
    torch._dynamo.reset()
    weights, _ = run(it, world)
    uncompiled = replace(it, job=replace(it.job, train=replace(it.job.train, compile_model=False)))
    here = difference(weights, run(uncompiled, world)[0])
    print(f"{here:.1e}: {it}")
    assert here < {"fp32": 1e-4, "bf16": 0.05}[it.job.train.mixed_precision], (here, it)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1200)
def test_two_ranks_compiled(world: World, tmp_path: Path) -> None:
    print(compare_ranks([COMPILED], world, tmp_path, compiled=True, timeout=1000))
