"""A step reads numbers back from the device once, and copies to it do not wait."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kempnerforge.config import load_config
from kempnerforge.distributed.world import World
from kempnerforge.model.transfer import moved, told
from kempnerforge.training.optimizer import holders, local_gradients, squared_norm
from kempnerforge.training.setup import assemble
from kempnerforge.training.trainer import Trainer
from tests.training.tiny import make_job

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_consecutive"}
"""Operators whose result depends on values, so that the host waits for a device."""
ARCHS = ("joint_decoder", "cross_attention", "mot", "moma")


class Waiting(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in WAITING or mask:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("words", [(), ("--train.logits_at_once=3", "--train.activation_checkpointing=true")], ids=["plain", "pieces"])
def test_a_step_waits_once(arch: str, words: tuple[str, ...], tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the five numbers that decide whether it is taken."""
    more = ("--vlm.cross_attention_every_n_layers=1",) if arch == "cross_attention" else ()
    trainer = Trainer(assemble(load_config(make_job(tmp_path), [f"--vlm.arch={arch}", *more, *words])), world, [])
    trainer.apply_freeze()
    trainer.look_ahead()
    read: list[int] = []
    sums = World.sum
    monkeypatch.setattr(World, "sum", lambda self, values: (read.append(len(values)), sums(self, values))[1])
    with Waiting() as found:
        result = trainer.train_step()
    assert not result.skipped and result.grad_norm > 0
    assert found.seen == {} and read == [6]  # with whether this process was asked to stop


def test_the_numbers_are_those_of_single_transfers(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise."""
    trainer = Trainer(assemble(load_config(make_job(tmp_path))), world, [])
    trainer.apply_freeze()
    losses: list[float] = []
    forward, norms = trainer.model.forward, list[float]()
    monkeypatch.setattr(trainer.model, "forward", lambda batch: (output := forward(batch), losses.append(output.loss.item()))[0])
    step = trainer.optimizers.step
    monkeypatch.setattr(
        trainer.optimizers,
        "step",
        lambda: (norms.append(squared_norm(local_gradients(trainer.model), holders(trainer.model, 1)).item()), step())[1],
    )
    trainer.job.train.grad_clip_norm = 0.0
    result = trainer.train_step()
    assert result.loss == losses[0] / result.counts.targets and result.grad_norm == norms[0] ** 0.5


def test_moved_is_the_same_tensor_elsewhere() -> None:
    x = torch.randn(3)
    assert moved(x, "cpu") is x and moved(x, torch.device("meta")).is_meta
    assert torch.equal(told([[1, 2]], "cpu"), torch.tensor([[1, 2]])) and told(0.1, "cpu", torch.bfloat16) == torch.tensor(0.1).bfloat16()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_on_a_gpu_waits_no_more_than_it_must(tmp_path: Path, world: World) -> None:
    """Once for its numbers; a collective or an allocation may add one, five losses may not."""
    trainer = Trainer(assemble(load_config(make_job(tmp_path))), world, [])
    trainer.apply_freeze()
    for _ in range(2):
        trainer.train_step()
        trainer.step += 1
    trainer.look_ahead()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([each for each in caught if "synchroniz" in str(each.message)]) <= 2
