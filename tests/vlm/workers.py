"""What the ranks of the contract suite run."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import torch

from kempnerforge.config import DistributedConfig
from kempnerforge.distributed.world import World, start, stop
from tests.vlm.tiny import LATE, NO_IMAGE, ONE, THREE, full, install, tiny


def two_ranks(folder: str, *cases: str) -> None:
    """Two optimizer steps of every case "arch:mask"; rank 0 writes loss and whole gradients of each."""
    code = 0
    try:
        world = start(DistributedConfig(timeout_s=60))
        for case in cases:
            arch, _, mask = case.partition(":")
            two_steps(arch or None, mask, world, Path(folder) / case)
        stop()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def two_steps(arch: str | None, mask: str, world: World, out: Path) -> None:
    it = tiny(arch, mask)
    install(it, world)
    optimizer = torch.optim.SGD(it.model.parameters(), lr=0.5)
    batch = it.batch(*[(ONE, THREE, LATE), (NO_IMAGE,)][world.rank])
    for step in range(2):
        (targets,) = world.sum([batch.num_targets])
        loss = it.model(batch).total / targets
        loss.backward()
        result = full({name: p.grad for name, p in it.model.named_parameters() if p.grad is not None})
        (result["loss"],) = map(torch.tensor, world.sum([loss.item()]))
        if world.is_main:
            torch.save(result, f"{out}-{step}.pt")
        optimizer.step()
        optimizer.zero_grad()
