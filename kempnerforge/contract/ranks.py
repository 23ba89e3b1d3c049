"""The contract suite on two processes: what each of them runs, and the auxiliary losses that it adds."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from kempnerforge.config import DistributedConfig
from kempnerforge.contract.cases import LATE, NO_IMAGE, ONE, THREE, TWICE, Plugin, Tiny, full, install, load, plugins, tiny, with_grids
from kempnerforge.data.batching.batch import Batch
from kempnerforge.distributed.world import World, meshes, start, stop
from kempnerforge.training.freeze import apply_freeze

AUX, FROZEN, RECOMPUTED, KEPT, COMPILED, TRACED, GRIDS, PIECES, LAYERS, ROWS = (
    "aux", "frozen", "recomputed", "kept", "compiled", "traced", "grids", "pieces", "layers", "rows"
)  # fmt: skip
"""``KEPT``: what is recomputed keeps its products. ``TRACED`` is compiled but for the last part: graphs are
taken, differentiated and run, and no machine code is made of them, which takes minutes. ``PIECES``: logits of
``AT_ONCE`` targets are in memory at once. ``LAYERS``: the ranks compute each layer together. ``ROWS``: they have
the same rows, some positions of them each."""
AT_ONCE = 2
SHARES = ((ONE, THREE, LATE), (NO_IMAGE,))
"""The samples of each rank; one of them has no image."""
PACKED = ((ONE, THREE, LATE), (NO_IMAGE, TWICE))
"""The samples of each row that ranks share."""


def run_two_ranks(folder: Path, cases: Sequence[str], timeout_s: float) -> str:
    """Runs ``cases`` on two new processes; see ``_rank``. What stopped them early; empty if nothing did."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # a port of the system's choice that is ours from now on
    ranks = start_processes(_rank, (store.port, str(folder), plugins(), list(cases)), nprocs=2, join=False, start_method="forkserver")
    assert ranks is not None
    deadline = time.monotonic() + timeout_s
    try:
        while not ranks.join(timeout=1):
            if time.monotonic() > deadline:
                return f"two processes took more than {timeout_s:g} s"
    except (ProcessRaisedException, ProcessExitedException) as error:
        return str(error)
    finally:
        for process in ranks.processes:
            if process is not None:
                process.kill()
    return ""


def _rank(rank: int, port: int, folder: str, others: Sequence[Plugin], cases: Sequence[str]) -> None:
    """Two optimizer steps of every case "arch:mask:how+how"; rank 0 writes loss and whole gradients of each."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)
    for plugin in others:
        load(plugin)
    waits_for_compiler = any(COMPILED in case or TRACED in case for case in cases)  # of the other rank
    world = start(DistributedConfig(timeout_s=900 if waits_for_compiler else 60))
    for case in cases:
        two_steps(case, world, Path(folder) / case)
    stop()
    os._exit(0)  # gloo may abort while the interpreter shuts down


def two_steps(case: str, world: World, out: Path) -> None:
    it, how = prepared(case, "meta" if world.rank else None)  # the second rank gets its weights from the first
    batches = [it.batch(*SHARES[world.rank])]
    if LAYERS in how:
        mesh, tensor, _ = meshes(world.device.type, world.size, DistributedConfig(tensor_parallel=world.size))
        world, batches = replace(world, mesh=mesh, tensor=tensor), shares(it, how)
    if ROWS in how:
        *_, context = meshes(world.device.type, world.size, DistributedConfig(context_parallel=world.size))
        world, batches = replace(world, context=context), shares(it, how)
    if TRACED in how:
        torch._dynamo.reset()
        it.model.apply(lambda module: setattr(module, "compile", partial(module.compile, backend="aot_eager")))
    install(it, world, recompute=RECOMPUTED in how, compile_units=COMPILED in how or TRACED in how, keep_products=KEPT in how)
    it.model.logits_at_once = AT_ONCE if PIECES in how else 0
    if FROZEN in how:
        freeze_some(it)
    optimizer = torch.optim.SGD(it.model.parameters(), lr=0.1)
    counts = world.once([sum(batch.num_targets for batch in batches), sum(batch.num_pairs for batch in batches)], of_batch=True)
    for step in range(2):
        targets, pairs = map(int, world.sum(counts))
        losses = []
        for batch in batches:
            loss = it.model(batch).mean(targets, pairs)
            loss.backward()
            losses.append(loss.item())
        result = full({name: p.grad for name, p in it.model.named_parameters() if p.grad is not None})
        (result["loss"],) = map(torch.tensor, world.sum(world.once([sum(losses)])))
        if world.is_main:
            torch.save(result, f"{out}-{step}.pt")
        optimizer.step()
        optimizer.zero_grad()


def prepared(case: str, device: str | None = None) -> tuple[Tiny, set[str]]:
    """The model of a case, on ``device``, and how it is run."""
    arch, mask, how = case.split(":")
    it = tiny(arch or None, mask, device=device, **(with_grids(arch) if GRIDS in how.split("+") else {}))
    if AUX in how.split("+"):
        add_losses(it.model)
    return it, set(how.split("+"))


def shares(it: Tiny, how: Collection[str] = ()) -> list[Batch]:
    """What the ranks have, in one process."""
    return [it.pack(*PACKED)] if ROWS in how else [it.batch(*samples) for samples in SHARES]


# ---- auxiliary losses wherever a plugin may have them --------------------------------------------


def add_losses(model: Any) -> None:
    """Gives each unit a loss of what it returns and one of what its first linear layer returns; adapter and
    encoder have one of their output.
    """
    for unit in list(model.shard_units()):
        add_loss(first_linear(unit))
        add_loss(unit)
    for name in ("vision_encoder", "adapter"):
        if (part := dict(model.named_children()).get(name)) is not None:
            add_loss(part)


def first_linear(unit: nn.Module) -> nn.Module:
    return next(m for m in unit.modules() if isinstance(m, nn.Linear))


def add_loss(module: Any) -> None:
    """Has ``module`` want small outputs, too."""
    if not hasattr(module, "aux_loss"):
        module.aux_loss = None
    module.__class__ = with_loss(type(module))


@cache
def with_loss(kind: type) -> type:
    """A subclass; the same for all modules of ``kind``, as the compiler makes a graph for each class."""
    weight = 0.05

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        value = kind.forward(self, *args, **kwargs)
        class_loss = self.aux_loss  # None, or what the class wants by itself
        tensor: Tensor = value if isinstance(value, Tensor) else value[0]
        loss = weight * tensor.float().square().mean()
        self.aux_loss = None if not self.training else loss if class_loss is None else class_loss + loss
        return value

    return type(f"{kind.__name__}WithLoss", (kind,), {"forward": forward})


def freeze_some(it: Tiny) -> None:
    """One whole unit of the text, and of the next one the layer that has a loss; what is after them trains."""
    names = {id(p): name for name, p in it.model.named_parameters()}
    whole, part = islice(list(it.model.shard_units())[-3:], 2)
    frozen = {names[id(p)] for p in (*whole.parameters(), *first_linear(part).parameters())}
    apply_freeze(it.model, frozenset(names.values()) - frozen)
