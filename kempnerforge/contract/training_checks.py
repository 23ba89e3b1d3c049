"""How a model is run, on one process and two, and how it learns, is saved and resumes.

Each test is a check that every architecture must pass, whichever it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kempnerforge.checkpoint import load_training, model_tensors, optimizer_tensors, save_training
from kempnerforge.config import FreezeSpec
from kempnerforge.contract.cases import (
    FOREIGN,
    LATE,
    MODEL,
    ONE,
    SAMPLES,
    THREE,
    TWICE,
    Tiny,
    accepted_masks,
    all_logits,
    copies,
    differing,
    full,
    gradients,
    install,
    seeing,
    tiny,
    tiny_job,
)
from kempnerforge.contract.marks import ARCHS, FIRST_MASKED, SHARING, each_arch, masked, most_archs, most_masks, ranked, with_images
from kempnerforge.contract.ranks import AUX, COMPILED, FROZEN, KEPT, LAYERS, PIECES, RECOMPUTED, ROWS, TRACED, freeze_some, prepared, shares
from kempnerforge.distributed.world import World
from kempnerforge.model import attention
from kempnerforge.training.freeze import apply_freeze, trainable_names
from kempnerforge.training.optimizer import Optimizers

# ---- how it is run changes nothing ---------------------------------------------------------------


@each_arch
def test_activation_checkpointing_changes_nothing(arch: str | None, world: World) -> None:
    results, calls = [], []
    for recompute, keep_products in ((False, False), (True, False), (True, True)):
        it = tiny(arch)
        units = list(it.model.shard_units())
        install(it, world, recompute=recompute, keep_products=keep_products)
        count = [0]
        for unit in units:
            next(m for m in unit.modules() if isinstance(m, nn.Linear)).register_forward_hook(
                lambda *_, c=count: c.__setitem__(0, c[0] + 1)
            )
        results.append(gradients(it.model, it.batch(*SAMPLES)))
        calls.append(count[0] / len(units))
    assert calls == [1, 2, 2]
    for loss, grads in results[1:]:
        assert torch.equal(results[0][0], loss)
        assert differing(results[0][1], grads) == []


@each_arch
def test_logits_in_pieces_change_nothing(arch: str | None) -> None:
    """``train.logits_at_once``: loss and gradients up to rounding; no logits are kept, nor made where nothing
    trains.
    """
    it = tiny(arch)
    batch, logits = it.batch(*SAMPLES), all_logits(it.model, it.batch(*SAMPLES))
    loss, grads = gradients(it.model, batch)
    for at_once in (1, 7):
        it.model.logits_at_once = at_once
        it.model.zero_grad()
        assert len(it.model(batch).logits) == 0, "train.logits_at_once: the arch makes all logits; does it call score_stream?"
        torch.testing.assert_close(gradients(it.model, batch), (loss, grads), rtol=1e-5, atol=1e-6)
        assert torch.equal(all_logits(it.model, batch), logits)


@each_arch
def test_a_loss_of_a_part_is_declared_and_taken_once(arch: str | None) -> None:
    """Who sets ``aux_loss`` in a forward pass has it from the start, or it would not be found; after the pass
    nothing is left for the next.
    """
    model = tiny(arch).model.train()
    declared = {id(module) for module in model.modules() if hasattr(module, "aux_loss")}
    model(tiny(arch).batch(*SAMPLES))
    set_now = [module for module in model.modules() if hasattr(module, "aux_loss")]
    assert {id(module) for module in set_now} == declared
    assert [type(module).__name__ for module in set_now if module.aux_loss is not None] == []


@most_masks
def test_bf16_is_near_fp32(arch: str | None, mask: str, world: World) -> None:
    it = tiny(arch, mask)
    batch = it.batch(*SAMPLES)
    want = it.model(batch).mean(batch.num_targets, batch.num_pairs)
    install(it, world, torch.bfloat16)
    loss, grads = gradients(it.model, batch)
    torch.testing.assert_close(loss, want, rtol=0.05, atol=1e-3)
    assert all(p.dtype == torch.float32 for p in it.model.parameters())
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in full(grads).values())


@pytest.mark.parametrize(("arch", "mask", "packed"), masked(False, True))
def test_flops_on_meta_are_those_that_run(arch: str | None, mask: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "DOCUMENTS_FROM", 1)
    counts = []
    for device in ("meta", "cpu"):
        it = tiny(arch, mask, device=device)
        batch = it.pack((ONE, THREE, LATE), (ONE, TWICE)) if packed else it.batch(ONE, THREE, LATE)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the counter does not know the CPU's fused kernel
            it.model(batch.to(device)).mean(1, 1).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@each_arch
def test_no_layer_reads_a_view(arch: str | None) -> None:
    """The compiler makes a graph of its own for a layer whose input is a view of another tensor."""
    it, views = tiny(arch), []
    for unit in it.model.shard_units():
        unit.register_forward_pre_hook(lambda layer, args: views.append(type(layer).__name__) if args[0]._is_view() else None)
    it.model(it.batch(*SAMPLES))
    assert views == []


@pytest.mark.slow
@each_arch
def test_compile_changes_nothing(arch: str | None, world: World) -> None:
    """Layers of one kind share their graphs, with and without a mask."""
    torch._dynamo.reset()
    counters.clear()
    results = []
    for compile_units in (False, True):
        it = tiny(arch, model=replace(MODEL, n_layers=12))
        install(it, world, compile_units=compile_units)
        results.append([gradients(it.model, it.batch(*samples)) for samples in ((ONE, ONE), SAMPLES)])
    for (loss, grads), (compiled_loss, compiled_grads) in zip(*results, strict=True):
        torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(full(compiled_grads), full(grads), rtol=1e-4, atol=5e-6)
    kinds = {type(unit) for unit in it.model.shard_units()}
    assert 0 < counters["stats"]["unique_graphs"] <= 3 * len(kinds)
    assert not counters["graph_break"]


@pytest.mark.dist
@pytest.mark.timeout(600)  # the first one starts them all
@ranked(FIRST_MASKED, "")
def test_two_ranks_are_one_process_that_accumulates(ranked: str, ranks: Callable[[str], list[dict[str, Tensor]]]) -> None:
    """Each rank has its own micro-batch, one of them without any image."""
    same_as_one_process(ranked, ranks(ranked))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(600)
@ranked([(arch, mask) for arch in ARCHS for mask in accepted_masks(arch)[1:]], "")
def test_two_ranks_under_other_masks(ranked: str, ranks: Callable[[str], list[dict[str, Tensor]]]) -> None:
    same_as_one_process(ranked, ranks(ranked))


@pytest.mark.dist
@pytest.mark.timeout(600)
@ranked(FIRST_MASKED, AUX, f"{AUX}+{FROZEN}+{RECOMPUTED}")
def test_two_ranks_with_auxiliary_losses(ranked: str, ranks: Callable[[str], list[dict[str, Tensor]]]) -> None:
    """Of what units return, and of what is inside them: their weights are sharded when the loss is
    differentiated.
    """
    same_as_one_process(ranked, ranks(ranked))


@pytest.mark.dist
@pytest.mark.timeout(600)
@ranked([(arch, mask) for arch, mask in FIRST_MASKED if arch not in FOREIGN], LAYERS)
def test_two_ranks_share_each_layer(ranked: str, ranks: Callable[[str], list[dict[str, Tensor]]]) -> None:
    """``distributed.tensor_parallel = 2``: each rank has some of the heads and channels, both see all data."""
    same_as_one_process(ranked, ranks(ranked))


@pytest.mark.dist
@pytest.mark.timeout(600)
@ranked(FIRST_MASKED, f"{AUX}+{FROZEN}+{PIECES}+{RECOMPUTED}+{KEPT}")
def test_two_ranks_piece_by_piece(ranked: str, ranks: Callable[[str], list[dict[str, Tensor]]]) -> None:
    """Against one process with all logits and all activations."""
    same_as_one_process(ranked, ranks(ranked))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1200)
@ranked(FIRST_MASKED, f"{AUX}+{FROZEN}+{RECOMPUTED}+{TRACED}", f"{AUX}+{FROZEN}+{PIECES}+{RECOMPUTED}+{KEPT}+{TRACED}")
def test_two_ranks_with_the_graphs_of_the_compiler(ranked: str, ranks: Callable[[str], list[dict[str, Tensor]]]) -> None:
    """About four minutes an arch on two cores."""
    same_as_one_process(ranked, ranks(ranked))


@pytest.mark.dist
@pytest.mark.timeout(600)
@ranked([(arch, accepted_masks(arch)[0]) for arch in SHARING], ROWS, f"{ROWS}+{FROZEN}+{RECOMPUTED}")
def test_two_ranks_that_share_rows(ranked: str, ranks: Callable[[str], list[dict[str, Tensor]]]) -> None:
    """Each has some of the positions of packed rows; for archs with ``shares_rows``."""
    same_as_one_process(ranked, ranks(ranked))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(600)
@ranked([(arch, mask) for arch in SHARING for mask in accepted_masks(arch)[1:]], ROWS)
def test_two_ranks_that_share_rows_under_other_masks(ranked: str, ranks: Callable[[str], list[dict[str, Tensor]]]) -> None:
    same_as_one_process(ranked, ranks(ranked))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1200)
@ranked([(arch, accepted_masks(arch)[0]) for arch in SHARING], f"{ROWS}+{TRACED}")
def test_two_ranks_that_share_rows_with_the_graphs_of_the_compiler(ranked: str, ranks: Callable[[str], list[dict[str, Tensor]]]) -> None:
    same_as_one_process(ranked, ranks(ranked))


def same_as_one_process(case: str, found: list[dict[str, Tensor]]) -> None:
    it, how = prepared(case)
    if FROZEN in how:
        freeze_some(it)
    optimizer = torch.optim.SGD(it.model.parameters(), lr=0.1)
    rtol, atol = (1e-3, 1e-5) if COMPILED in how else (1e-4, 1e-6)
    for got in found:
        loss, grads = gradients(it.model, *shares(it, how))
        torch.testing.assert_close(got.pop("loss"), loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got, grads, rtol=rtol, atol=atol)
        optimizer.step()
        optimizer.zero_grad()


# ---- what learns, and what is saved --------------------------------------------------------------


@with_images
def test_the_loss_reaches_adapter_and_encoder(arch: str) -> None:
    it = tiny(arch)
    _, grads = gradients(it.model, it.batch(ONE))
    names = [name for name in seeing(it) if it.model.get_parameter(name).ndim > 1]
    assert names
    assert [name for name in names if name not in grads or not grads[name].any()] == []


def schedule(it: Tiny) -> list[list[FreezeSpec]]:
    """What is frozen at each of four steps: nothing, a layer, the second alias, nothing."""
    names = {module: name for name, module in it.model.named_modules()}
    *_, first, second = [f"{names[unit]}.*" for unit in it.model.shard_units()]
    aliases = list(it.patterns)[1:2] or [second]
    return [[], [FreezeSpec(first)], [FreezeSpec(alias) for alias in aliases], []]


def train_steps(it: Tiny, optimizers: Optimizers, start: int, end: int) -> None:
    names = [name for name, _ in it.model.named_parameters()]
    for step in range(start, end):
        apply_freeze(it.model, trainable_names(names, schedule(it)[step], it.patterns))
        optimizers.set_step(it.stages[0], step)
        gradients(it.model, it.batch(SAMPLES[2 * step], THREE))
        optimizers.step()
        optimizers.zero_grad()


@most_archs
def test_resume_is_never_having_stopped(arch: str | None, world: World, tmp_path: Path) -> None:
    """Bitwise, from every step, with parts frozen and thawed on the way; one step on it is where the next
    checkpoint is, and so on to the end.
    """

    def fresh(seed: int) -> tuple[Tiny, Optimizers]:
        it = tiny(arch, train=replace(tiny_job(arch).train, seed=seed))
        install(it, world)
        return it, Optimizers(it.model, it.stages, it.patterns)

    def everything(it: Tiny, optimizers: Optimizers) -> dict[str, Tensor]:
        return {**model_tensors(it.model), **optimizer_tensors(it.model, optimizers.all)}

    it, optimizers = fresh(0)
    paths, later = [], []
    for step in range(4):
        paths.append(save_training(tmp_path, step, it.model, optimizers.all, {}, {}, keep=9))
        train_steps(it, optimizers, step, step + 1)
        later.append({name: value.detach().clone() for name, value in everything(it, optimizers).items()})
    for step, path in enumerate(paths):
        other, its = fresh(1)
        assert differing(model_tensors(other.model), model_tensors(it.model))
        load_training(path, other.model, its.all)
        train_steps(other, its, step, step + 1)
        assert differing(later[step], everything(other, its)) == [], f"resumed at step {step}"


@most_archs
def test_a_frozen_stage_moves_exactly_what_it_says(arch: str | None, world: World) -> None:
    """Also when an evaluation ran right before the change, and when the momentum of what is frozen now would
    go on.
    """
    it = tiny(arch)
    batch = it.batch(*SAMPLES)
    learning = {name for name, grad in gradients(it.model, batch)[1].items() if grad.any()}
    it.model.zero_grad()
    names = [name for name, _ in it.model.named_parameters()]
    install(it, world)
    optimizers = Optimizers(it.model, it.stages, it.patterns)
    optimizers.set_step(it.stages[0], 0)
    aliases = list(it.patterns) or ["transformer.layers.*"]
    for specs in [[], *([FreezeSpec(a)] for a in aliases), [FreezeSpec("*"), FreezeSpec(aliases[-1], frozen=False)], []]:
        with torch.no_grad():
            it.model(batch)
        trainable = trainable_names(names, specs, it.patterns)
        apply_freeze(it.model, trainable)
        before = copies(it.model)
        for _ in range(2):
            gradients(it.model, batch)
            optimizers.step()
            optimizers.zero_grad()
        moved = {name.removeprefix("model.") for name in differing(before, copies(it.model))}
        assert moved <= trainable, f"{specs}: moved, though frozen: {sorted(moved - trainable)}"
        assert trainable & learning <= moved, f"{specs}: did not move: {sorted(trainable & learning - moved)}"
