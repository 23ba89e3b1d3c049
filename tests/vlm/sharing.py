"""What the ranks of ``test_shared_rows.py`` run: a batch with its rows shared, against the same batch in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from kempnerforge.config import DistributedConfig, TrainConfig
from kempnerforge.contract.ranks import add_losses, freeze_some
from kempnerforge.data.batching.batch import IGNORE, Batch, Kind
from kempnerforge.data.sample import Sample, Text
from kempnerforge.distributed.world import World, meshes
from kempnerforge.vlm.base import Output
from tests.distributed.workers import in_world
from tests.vlm.tiny import (
    ANSWERED,
    GQA,
    INTERLEAVED,
    KEYS,
    LATE,
    MODEL,
    NO_IMAGE,
    ONE,
    SAMPLES,
    THREE,
    TWICE,
    TWO_IMAGES,
    WRITTEN,
    Tiny,
    accepted_masks,
    full,
    install,
    tiny,
    with_grids,
)

ARCHS = ("text", "joint_decoder", "cross_attention", "mot")
SINGLE = (ONE, NO_IMAGE, ANSWERED, INTERLEAVED)
PACKED = ((ONE, THREE, LATE), (NO_IMAGE, TWICE, TWO_IMAGES, WRITTEN))
Make = Callable[[Tiny], Batch]


def weighted(it: Tiny) -> Batch:
    """Packed rows, each target with a weight of its own."""
    batch = it.pack(*PACKED)
    return replace(batch, target_weights=torch.linspace(0.5, 2.0, batch.num_targets))


def ends(it: Tiny) -> Batch:
    """One row with one target, its last one: the first of three ranks has none."""
    batch = it.batch(THREE)
    return replace(batch, targets=batch.targets[-1:])


def short(it: Tiny) -> Batch:
    """Three positions: some ranks have padding alone."""
    return it.batch(Sample("three words", (), (Text("", (11, 12, 13)),)))


def even(it: Tiny) -> Batch:
    """Rows that come out even, on two ranks for each modality, too, so that a mean over positions is the mean of the ranks' means."""
    return it.batch(ONE, THREE, pad_to=48)


def cases(arch: str) -> dict[str, tuple[Make, dict[str, Any]]]:
    """By name: the batch, and sections of the job."""
    plain: Make = lambda it: it.pack(*PACKED)
    found: dict[str, tuple[Make, dict[str, Any]]] = {
        "rows": (lambda it: it.batch(*SINGLE), {}),
        "documents": (plain, {}),
        "weighted": (weighted, {}),
        "one target": (ends, {}),
        "three positions": (short, {}),
        "losses": (even, {}),
        "frozen": (plain, {}),
        "recomputed": (plain, {}),
        "windows": (plain, {"model": replace(MODEL, sliding_window=5, window_pattern="SSF")}),
        "window": (lambda it: it.batch(NO_IMAGE, pad_to=29), {"model": replace(MODEL, sliding_window=4)}),
        "learned": (plain, {"model": replace(MODEL, positions="learned", norm="layer_norm", embed_norm=True)}),
        "answers": (plain, {"model": replace(MODEL, answer_dropout=1e-9)}),  # of which none is dropped
        "grouped": (lambda it: it.pack((ONE, THREE), (TWICE,)), {"model": replace(GQA, new_tokens=MODEL.new_tokens, nope_interval=2)}),
    }
    if arch in ("joint_decoder", "mot"):
        found["grids"] = (plain, with_grids(arch))
    for mask in accepted_masks(None if arch == "text" else arch)[1:]:
        found[mask] = (plain, {"mask": mask})
        found[f"{mask}, rows"] = (lambda it: it.batch(*SAMPLES), {"mask": mask})
    for name, keys in VARIANTS.get(arch, {}).items():
        found[name] = (plain, {"keys": keys})
    return found


VARIANTS: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "cross_attention": {
        "latest": {"cross_attention_media": "latest", "cross_attention_every_n_layers": 2},
        "blind": {"cross_attention_blind": "attention", "cross_attention_media": "latest_group"},
        "first tokens": {"cross_attention_seen_tokens": 2, "cross_attention_blind": "nothing"},
    },
    "mot": {"paper": {"norm_placement": "paper", "untie": ["attn", "ffn"]}},
}


def built(arch: str, sections: Mapping[str, Any]) -> Tiny:
    given = dict(sections)
    name = None if arch == "text" else arch
    keys, mask = given.pop("keys", {}), given.pop("mask", accepted_masks(name)[0])
    before, KEYS[name] = KEYS.get(name, {}), keys
    try:
        return tiny(name, mask, **given)
    finally:
        KEYS[name] = before


def share(it: Tiny, world: World, **how: bool) -> None:
    """Shards ``it`` and has all ranks share its rows."""
    install(it, replace(world, context=all_ranks(world)), **how)


@cache
def all_ranks(world: World) -> DeviceMesh | None:
    return meshes("cpu", world.size, DistributedConfig(context_parallel=world.size))[2]


def two_steps(it: Tiny, batch: Batch) -> list[tuple[Output, dict[str, Tensor]]]:
    """What two steps of plain descent give: the sums, and the gradients."""
    optimizer, found = torch.optim.SGD(it.model.parameters(), lr=0.1), []
    for _ in range(2):
        output = it.model(batch)
        output.mean(batch.weight, batch.num_pairs).backward()
        found.append((output, full({name: p.grad.clone() for name, p in it.model.named_parameters() if p.grad is not None})))
        optimizer.step()
        optimizer.zero_grad()
    return found


def same_as_one_process(*names: str) -> None:
    """Cases "arch:case"; loss and gradients of each rank's share add up to those of one process."""

    def body(world: World) -> None:
        for name in names:
            arch, _, case = name.partition(":")
            make, sections = cases(arch)[case]
            results = []
            for shared in (False, True):
                it = built(arch, sections)
                if case == "losses":
                    add_losses(it.model)
                if shared:
                    share(it, world, recompute=case == "recomputed")
                if case == "frozen":
                    freeze_some(it)
                results.append(two_steps(it, make(it)))
            for (want, grads), (got, shares) in zip(*results, strict=True):
                kinds = [kind for kind in ("loss", "weighted_loss", "aux_loss") if getattr(want, kind) is not None]
                sums = torch.tensor(world.sum([getattr(got, kind).item() for kind in kinds]))
                torch.testing.assert_close(sums, torch.tensor([getattr(want, kind).item() for kind in kinds]), rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(shares, grads, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
                assert world.sum([len(got.logits)]) == [len(want.logits)], "each target is scored by one rank"

    in_world(body)


@torch.no_grad()
def leak(*archs: str) -> None:
    """A document changes, and the loss of the others in its row does not, on any rank; its own does."""

    def body(world: World) -> None:
        for arch in archs:
            for mask in accepted_masks(None if arch == "text" else arch):
                it = built(arch, {"mask": mask})
                share(it, world)
                batch = it.pack((ONE, TWICE, TWO_IMAGES))
                sample = batch.sample_ids.flatten()[batch.targets]
                changed = replace(batch, input_ids=batch.input_ids.clone())
                words = (batch.sample_ids == 1) & (batch.kinds >= Kind.PROMPT)
                changed.input_ids[words] = it.others(batch.input_ids[words])
                for other in range(3):
                    losses = [
                        it.model(replace(one, target_weights=(sample == other).float())).weighted_loss.item() for one in (batch, changed)
                    ]
                    moved = world.sum([losses[0] != losses[1]])[0]
                    assert (moved > 0) == (other == 1), f"{arch} {mask}: document {other} moved on {moved} ranks"

    in_world(body)


def saved_bytes(model: nn.Module, batch: Batch) -> int:
    """What a forward pass keeps for the backward pass, parameters left out."""
    kept: dict[int, int] = {}
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(batch)
    del output
    return sum(kept.values())


def memory(length: str) -> None:
    """A rank of two keeps little more than half of what one process keeps."""

    def body(world: World) -> None:
        text = Sample("a long text", (), (Text("", tuple(11 + k % 100 for k in range(int(length) + 1))),))
        train = TrainConfig(max_steps=4, seq_len=int(length), mixed_precision="fp32")
        sizes = {"model": replace(MODEL, dim=64, n_heads=4, n_kv_heads=1, max_seq_len=int(length)), "train": train}
        kept = []
        for shared in (False, True):
            it = tiny(None, **sizes)
            it.model.row_ranks = all_ranks(world) if shared else None
            batch = it.batch(text)
            assert batch.input_ids.shape[1] == int(length) and (batch.labels != IGNORE).sum() > 0.9 * int(length)
            kept.append(saved_bytes(it.model, batch))
        assert 0.5 <= kept[1] / kept[0] < 0.65, kept

    in_world(body)
