"""Models whose layers several ranks share, each in two steps of plain descent, on ranks and in one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kempnerforge.config import DistributedConfig, ModelConfig, VLMConfig
from kempnerforge.config.lora import LoRAConfig
from kempnerforge.contract.cases import LATE, MODEL, ONE, TWICE, Tiny, full, install, tiny
from kempnerforge.contract.ranks import freeze_some, shares
from kempnerforge.data.batching.batch import Batch
from kempnerforge.distributed.world import World, meshes
from kempnerforge.training.freeze import apply_freeze, trainable_names
from kempnerforge.training.optimizer import holders, local_gradients, squared_norm
from kempnerforge.training.optimizers.foreach import local
from tests.distributed.workers import in_world

FOUR = replace(MODEL, n_heads=4)
GROUPED = replace(FOUR, n_heads=8, n_kv_heads=4, head_dim=8, qk_norm=True, tie_embeddings=False, init_std=0.05, new_tokens=[])
BIASED = replace(FOUR, bias=True, qkv_bias=True, activation="gelu", norm="layer_norm", positions="learned", embed_norm=True)
GEMMA = replace(
    FOUR, activation="geglu", post_norms=True, norm_plus_one=True, qk_norm=True, embed_scale=True, attention_softcap=20.0,
    logit_softcap=10.0, sliding_window=8, window_pattern="SF",
)  # fmt: skip


class Case(NamedTuple):
    """How a model is made and run."""

    arch: str | None
    model: ModelConfig
    vlm: Mapping[str, Any] = MappingProxyType({})
    packed: bool = False
    recompute: bool = False
    frozen: bool = False
    lora: tuple[LoRAConfig, ...] = ()


ADAPTERS = (LoRAConfig("transformer.layers.*", rank=4), LoRAConfig("transformer.layers.[01].*", rank=2, dora=True))
CASES = {
    "text-grouped": Case(None, GROUPED, packed=True),
    "joint-biased": Case("joint_decoder", BIASED, recompute=True, frozen=True),
    "joint-gemma": Case("joint_decoder", GEMMA, packed=True),
    "cross-grouped": Case("cross_attention", GROUPED, {"cross_attention_every_n_layers": 2, "cross_attention_qk_norm": True, "cross_attention_n_heads": 4}),
    "cross-openflamingo": Case("cross_attention", BIASED, {"cross_attention_block": "openflamingo"}, recompute=True, frozen=True),
    "mot-paper": Case("mot", GROUPED, {"norm_placement": "paper"}, packed=True, recompute=True),
    "mot-shared": Case("mot", BIASED, {"untie": ["ffn"]}, frozen=True),
    "adapters": Case("joint_decoder", BIASED, recompute=True, lora=ADAPTERS),
    "moma": Case("moma", GEMMA, recompute=True),
    "captions": Case("dual_encoder", GROUPED, {"caption_weight": 1.0, "loss": "siglip"}, recompute=True),
}  # fmt: skip


def made(case: Case, device: str | None = None) -> Tiny:
    vlm = None if case.arch is None else {"vlm": VLMConfig.for_arch(case.arch, **{"max_text_len": 64, "freeze": [], **case.vlm})}
    return tiny(case.arch, device=device, model=case.model, lora=list(case.lora), **(vlm or {}))


def batches_of(it: Tiny, case: Case) -> list[Batch]:
    return [it.pack((ONE, LATE), (TWICE,)), it.pack((TWICE, ONE))] if case.packed else shares(it)


def steps(it: Tiny, case: Case, batches: list[Batch], world: World | None = None) -> Iterator[dict[str, Tensor]]:
    """Loss, norm and whole gradients of two steps.

    Args:
        batches: of this process.
    """
    if case.frozen:
        freeze_some(it)
    if case.lora:
        names = [name for name, _ in it.model.named_parameters()]
        apply_freeze(it.model, trainable_names(names, [], {}))
    add = (lambda values: list(values)) if world is None else (lambda values: world.sum(world.once(values)))
    targets, pairs = map(int, add([sum(b.num_targets for b in batches), sum(b.num_pairs for b in batches)]))
    optimizer = torch.optim.SGD(it.model.parameters(), lr=0.1)
    for _ in range(2):
        losses = []
        for batch in batches:
            loss = it.model(batch).mean(targets, pairs)
            loss.backward()
            losses.append(loss.item())
        grads = {name: p.grad for name, p in it.model.named_parameters() if p.grad is not None}
        mine = squared_norm(local_gradients(it.model), holders(it.model, world.size if world is not None else 1)).item()
        squared = mine if world is None else world.sum([mine])[0]
        yield full(grads) | {"loss": torch.tensor(add([sum(losses)])[0]), "norm": torch.tensor(squared).sqrt()}
        optimizer.step()
        optimizer.zero_grad()


def of_ranks(parameter: DTensor) -> bool:
    """Whether the ranks that share layers have different parts of it."""
    names = parameter.device_mesh.mesh_dim_names or ()
    return any(name == "tensor" and not placement.is_replicate() for name, placement in zip(names, parameter.placements, strict=True))


def share(out: str, layout: str, *names: str) -> None:
    """Runs cases on all ranks; rank 0 writes what they find.

    Args:
        layout: "tensor_parallel,shard_size".
    """

    def body(world: World) -> None:
        torch.set_num_threads(1)
        parallel, shard_size = map(int, layout.split(","))
        mesh, tensor, _ = meshes("cpu", world.size, DistributedConfig(tensor_parallel=parallel, shard_size=shard_size))
        here = replace(world, mesh=mesh, tensor=tensor)
        for name in names:
            case = CASES[name]
            it = made(case, None if world.is_main else "meta")
            batches = batches_of(it, case)
            whole = sum(p.numel() for p in it.model.transformer.layers.parameters())
            install(it, here, recompute=case.recompute)
            held = sum(p.to_local().numel() for p in it.model.transformer.layers.parameters() if isinstance(p, DTensor))
            assert held < 1.25 * whole / parallel / here.mesh.size(-1)
            found = list(steps(it, case, batches[here.data_rank :: here.data_size], here))
            whole = [local(p) for p in it.model.parameters() if not isinstance(p, DTensor) or not of_ranks(p)]
            sums = here.gather(torch.stack([p.detach().double().sum() for p in whole if p.numel()]))
            assert all(torch.equal(sums[rank], sums[rank - rank % parallel]) for rank in range(world.size)), (
                "what ranks have whole is the same"
            )
            if world.is_main:
                torch.save(found, f"{out}/{name}.pt")

    in_world(body)
