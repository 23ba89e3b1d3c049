"""What the ranks of these tests run, and the model that they shard."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kempnerforge.config import DistributedConfig, MoMaConfig
from kempnerforge.contract.cases import install as contract_install
from kempnerforge.contract.cases import tiny
from kempnerforge.contract.ranks import SHARES, shares
from kempnerforge.distributed.fsdp import fsdp_modules, prepare, sync_gradients
from kempnerforge.distributed.world import World, meshes, start, stop


class Stack(nn.Module):
    """Three units of awkward shapes, and a root with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 5)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)) for _ in range(3))
        self.scale = nn.Parameter(torch.full((1,), 1.5))
        self.dtypes: set[torch.dtype] = set()  # of activations that were seen

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.to(self.first.weight.dtype))
        for layer in self.layers:
            self.dtypes |= {x.dtype, (change := layer(x)).dtype}
            x = x + change
        return (self.scale * x).float().square().sum()


def data(rank: int, part: int = 0) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * rank + part))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by name."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def install(model: Stack, world: World, dtype: torch.dtype = torch.float32, *, reshard: bool = True, recompute: bool = False) -> None:
    prepare(model, model.layers, world, dtype, reshard=reshard, recompute=recompute, compile_units=False)


def in_world(body: Callable[[World], None]) -> None:
    """Runs ``body`` and leaves at once: gloo may abort at interpreter exit."""
    code = 0
    try:
        body(start(DistributedConfig(timeout_s=120)))
        stop()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def two_ranks(out: str) -> None:
    """Sums of numbers and of gradients, in the ways that FSDP can be set up; rank 0 writes the gradients."""

    def body(world: World) -> None:
        assert world.size == 2 and world.is_main == (world.rank == 0) and world.mesh.size() == 2
        assert world.sum([world.rank + 1, 0.5]) == [3, 1]
        assert world.sum([2.0**53 if world.rank else -1.0]) == [2.0**53 - 1]  # float64
        assert world.sum([]) == []
        world.barrier()
        results = {}
        for reshard in (True, False):
            for recompute in (True, False):
                model = Stack()
                names = [name for name, _ in model.named_parameters()]
                install(model, world, reshard=reshard, recompute=recompute)
                assert [name for name, _ in model.named_parameters()] == names
                assert len(fsdp_modules(model)) == 4
                model(data(world.rank)).backward()
                results[f"{reshard} {recompute}"] = gradients(model)
        model = Stack()
        install(model, world)
        for part in range(3):  # one reduction for three micro-batches
            sync_gradients(model, part == 2)
            model(data(world.rank, part)).backward()
        results["accumulated"] = gradients(model)
        model = Stack()
        install(model, world, torch.bfloat16)
        model(data(world.rank)).backward()
        assert model.dtypes == {torch.bfloat16}
        assert {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
        results["bf16"] = gradients(model)
        if world.is_main:
            torch.save(results, out)

    in_world(body)


class Odd(nn.Module):
    """A weight of two names, a buffer of bits, one that is not saved, fewer rows than ranks, a frozen one, tensors that are no buffers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.row = nn.Parameter(torch.randn(1, 4))
        self.frozen = nn.Parameter(torch.randn(1), requires_grad=False)
        self.register_buffer("bits", torch.rand(5) > 0.5)
        self.register_buffer("scratch", torch.rand(3, 3).t(), persistent=False)
        self.angles, self.scale = torch.polar(torch.ones(3), torch.rand(3)), torch.rand(())


def weights_of_rank_0(*shard_sizes: str) -> None:
    """Other ranks have no memory, or other weights, before the model is sharded; afterwards all have those of rank 0."""

    def body(world: World) -> None:
        for shard_size in map(int, shard_sizes):
            mesh, *_ = meshes("cpu", world.size, DistributedConfig(shard_size=shard_size))
            for device in ("meta", "cpu"):
                with torch.device("cpu" if world.is_main else device):
                    model = Odd(seed=world.rank)
                prepare(model, model.layers, replace(world, mesh=mesh), torch.float32, reshard=True, recompute=False, compile_units=False)
                want = Odd(seed=0)
                assert model.head.weight is model.embed.weight
                assert torch.equal(model.angles, want.angles) and torch.equal(model.scale, want.scale)
                found = [*model.named_parameters(), *model.named_buffers()]
                assert [name for name, _ in found] == [name for name, _ in [*want.named_parameters(), *want.named_buffers()]]
                for name, tensor in found:
                    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                    theirs = want.get_parameter(name) if isinstance(tensor, nn.Parameter) else want.get_buffer(name)
                    assert torch.equal(whole, theirs) and tensor.requires_grad == theirs.requires_grad, name

    in_world(body)


def blank_weights() -> None:
    """Weights that are loaded afterwards get memory and are not sent; all else is."""

    def body(world: World) -> None:
        sent: list[int] = []
        broadcast = dist.broadcast
        dist.broadcast = lambda tensor, src: (sent.append(tensor.numel()), broadcast(tensor, src=src))
        with torch.device("cpu" if world.is_main else "meta"):
            model = Odd(seed=world.rank)
        prepare(model, model.layers, world, torch.float32, reshard=True, recompute=False, compile_units=False, blank=True)
        want = Odd(seed=0)
        assert sum(sent) == sum(t.numel() * t.element_size() for t in (want.bits, want.scratch, want.angles, want.scale))
        assert torch.equal(model.scratch, want.scratch) and torch.equal(model.angles, want.angles)
        assert model.head.weight is model.embed.weight and not model.frozen.requires_grad
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor) and parameter.device.type == "cpu", name
            parameter.detach().to_local().fill_(world.rank)
        assert model.embed.weight.full_tensor().sum() == 3 * 4, "seven rows: four of rank 0, three of rank 1"

    in_world(body)


def balanced_images(out: str, *archs: str) -> None:
    """Whole gradients of each arch with balanced images, and how many images each rank has encoded; with an encoder that trains and a
    frozen one.
    """

    def body(world: World) -> None:
        for arch in archs:
            for when in ("trains", "frozen"):
                it = tiny(arch, device="meta" if world.rank else None, distributed=DistributedConfig(balance_images=True))
                contract_install(it, world)
                it.model.vision_encoder.requires_grad_(when == "trains")
                encoded: list[int] = []
                it.model.vision_encoder.register_forward_pre_hook(lambda _, inputs, encoded=encoded: encoded.append(len(inputs[0])))
                batch = it.batch(*SHARES[world.rank])
                targets, _ = world.sum([batch.num_targets, 0])
                it.model(batch).mean(targets, 1).backward()
                grads, counts = gradients(it.model), world.gather(sum(encoded))
                if world.is_main:
                    torch.save(grads, f"{out}/{arch}-{when}.pt")
                    Path(f"{out}/{arch}-{when}.json").write_text(json.dumps(counts))

    in_world(body)


def batched_experts(out: str) -> None:
    """Whole gradients of all but auxiliary routers, with experts in batched products: each rank with a batch of its own, then both with
    all batches and some of each layer. Rank 0 writes them.
    """

    def body(world: World) -> None:
        mesh, tensor, _ = meshes("cpu", world.size, DistributedConfig(tensor_parallel=world.size))
        for name, here in (("data", world), ("layers", replace(world, mesh=mesh, tensor=tensor))):
            it = tiny("moma", device="meta" if world.rank else None, vlm=MoMaConfig(max_text_len=64, freeze=[], batched_experts=True))
            contract_install(it, here)
            batches = shares(it) if here.tensor is not None else [it.batch(*SHARES[world.rank])]
            targets = sum(batch.num_targets for batch in shares(it))
            for batch in batches:
                it.model(batch).mean(targets, 1).backward()
            grads = gradients(it.model)
            if world.is_main:
                torch.save({name: grad for name, grad in grads.items() if "auxiliary" not in name}, f"{out}/{name}.pt")

    in_world(body)
