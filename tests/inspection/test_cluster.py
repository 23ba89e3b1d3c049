"""``check --gpus``: state and traffic of a process as they are measured on two and four gloo ranks; time by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kempnerforge.config import load_config
from kempnerforge.inspection.cluster import EFFICIENCY, GPUS, Gpu, on_cluster
from kempnerforge.inspection.plan import plan
from kempnerforge.util.errors import InputError
from tests.dist import ranks_pass
from tests.training.tiny import call, make_job

MEASURE = """
import json, os, sys
import torch, torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as sends
from torch.utils._python_dispatch import TorchDispatchMode
from kempnerforge.config import load_config
from kempnerforge.distributed import rows, world as worlds
from kempnerforge.training.optimizers.foreach import local
from kempnerforge.training.setup import assemble
from kempnerforge.training.trainer import Trainer

config, out, *words = sys.argv[1:]
job = load_config(config, words)
world = worlds.start(job.distributed)
trainer = Trainer(assemble(job), world, [])
trainer.apply_freeze()
trainer.train_step()
trainer.step += 1
got = {"gathered": 0, "reduced": 0, "copied": 0, "exchanged": 0}

def counted(owner, name, kind, received):
    call = getattr(owner, name)
    def count(*args, **kwargs):
        sizes = [each.nbytes for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        got[kind] += received(sizes, kwargs.get("group"))
        return call(*args, **kwargs)
    setattr(owner, name, count)

def of_all(sizes, group):  # of a reduction over copies; the others of a step are over all ranks, and no part of the plan
    return 2 * sum(sizes) * (dist.get_world_size(group) - 1) // dist.get_world_size(group) if group else 0

counted(sends.DefaultAllGather, "__call__", "gathered", lambda sizes, group: max(sizes) - min(sizes))
counted(sends.DefaultReduceScatter, "__call__", "reduced", lambda sizes, group: max(sizes) - min(sizes))
counted(dist, "all_reduce", "copied", of_all)

class Sums(TorchDispatchMode):  # of DTensor
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "all_reduce" in str(func) and "_c10d_functional" in str(func):
            got["exchanged"] += 2 * args[0].nbytes * (world.tensor.size() - 1) // world.tensor.size()
        return func(*args, **(kwargs or {}))

for name in ("all_gather", "reduce_scatter"):
    counted(rows, name, "exchanged", lambda sizes, group: max(sizes) - min(sizes))
with Sums():
    trainer.train_step()
size = lambda tensors: sum(local(t).nbytes for t in tensors)
state = [value for each in trainer.optimizers.all for slots in each.state.values() for value in slots.values() if value.ndim]
got |= {"weights": size(trainer.model.parameters()), "optimizer": size(state)}
found = world.gather(got)
if world.is_main:
    with open(out, "w") as file:
        json.dump({key: max(each[key] for each in found) for key in got}, file)
world.barrier()
os._exit(0)
"""
STEPS = "--train.max_steps=9"
FROZEN = """
[[stages]]
name = "frozen"
steps = 5
freeze = [{ module = "vision_encoder" }]
[[stages]]
name = "all"
steps = 5
"""


def measured(config: Path, ranks: int, *words: str) -> dict[str, int]:
    out = config.parent / f"measured-{ranks}.json"
    ranks_pass(MEASURE, ranks, config, out, *words, timeout=200)
    return json.loads(out.read_text())


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (2, ()),
        (2, ("--distributed.reshard_after_forward=false", "--train.grad_accum_steps=2", "--vlm.arch=mot")),
        (2, ("--optimizer.name=muon", "--train.mixed_precision=bf16")),
        (2, ("--distributed.tensor_parallel=2", "--train.activation_checkpointing=true", "--vlm.arch=mot")),
        (4, ("--distributed.shard_size=2",)),
        (4, ("--distributed.tensor_parallel=2", "--vlm.arch=cross_attention", "--vlm.cross_attention_every_n_layers=1")),
        (2, ("--distributed.context_parallel=2", "--data.batching=pack")),
        (4, ("--distributed.context_parallel=2", "--data.batching=pack", "--train.activation_checkpointing=true")),
        (4, ("--distributed.shard_size=2", "--train.grad_accum_steps=2", "--distributed.accumulate_sharded=true", "--train.batch_size=8")),
    ],
)
def test_state_and_traffic_are_those_of_ranks(ranks: int, words: tuple[str, ...], tmp_path: Path) -> None:
    config = make_job(tmp_path, extra=FROZEN if "muon" in str(words) else "")
    stage, *_ = on_cluster(plan(load_config(config, [STEPS, *words])), ranks, GPUS["h200"])
    found = measured(config, ranks, STEPS, *words)
    assert found["weights"] <= stage.memory["weights"] <= 1.05 * found["weights"]
    assert found["optimizer"] <= stage.memory["optimizer"] <= 1.05 * found["optimizer"]
    assert (found["gathered"], found["reduced"], found["copied"]) == (stage.gathered, stage.reduced, stage.copied)
    if "context_parallel" in str(words):
        assert stage.exchanged <= found["exchanged"] <= 1.1 * stage.exchanged, "rows are padded to what can be divided"
    else:
        assert found["exchanged"] == stage.exchanged and (found["exchanged"] > 0) == ("tensor_parallel" in str(words))


def test_time_follows_from_the_stated_model(tmp_path: Path) -> None:
    found = plan(load_config(make_job(tmp_path), [STEPS]))
    cost = found.stages[0].cost
    fast, slow = Gpu(1e12, 1e12, 1e15, 1e15), Gpu(1e12, 1e12, 1e6, 1e6)
    (alone,) = on_cluster(found, 1, fast)
    assert alone.compute_s == pytest.approx(4 * cost.flops / (EFFICIENCY * 1e12)) and alone.exposed_s == 0
    assert alone.mfu == pytest.approx(EFFICIENCY)
    (two,) = on_cluster(found, 2, fast)
    assert two.compute_s == pytest.approx(alone.compute_s / 2) and two.exposed_s < 1e-6 and two.rows == alone.rows / 2 == 2
    (waits,) = on_cluster(found, 2, slow)
    root = waits.gathered - 2 * sum(_units(waits.gathered, found))
    assert waits.exposed_s == pytest.approx(
        (waits.gathered - root + waits.reduced) / 1e6 + _units(0, found)[0] / 1e6 - waits.compute_s, rel=1e-3
    )
    assert waits.warnings and "waits for communication" in waits.warnings[-1]
    assert two.tokens / two.step_s == pytest.approx(2 * alone.tokens / alone.step_s, rel=0.01)


def _units(_: int, found: object) -> list[int]:
    """Bytes that one of two processes receives for each unit, the largest first."""
    from kempnerforge.inspection.plan import Plan
    from kempnerforge.training.memory import Shards

    assert isinstance(found, Plan)
    shards = Shards(found.assembly.model, 2)
    return sorted((found.dtype.itemsize * shards.received(unit) for unit in shards.units), reverse=True)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    words = (STEPS, "--train.grad_accum_steps=2")
    found = plan(load_config(config := make_job(tmp_path), words))
    (roomy,) = on_cluster(found, 2, GPUS["a100"])
    small = Gpu(float(roomy.total - 1), 1e12, 1e12, 1e12)
    (tight,) = on_cluster(found, 2, small)
    assert tight.largest_rows == roomy.rows - 1 == 0
    (line,) = [line for line in tight.warnings if "fits" in line]
    assert "not even one row fits, not of 1" in line
    tiny = Gpu(2.0 * roomy.memory["unsharded gradients"], 1e12, 1e12, 1e12)
    (wide,) = on_cluster(found, 2, tiny)
    assert any("added up unsharded" in line for line in wide.warnings)
    (sharded,) = on_cluster(plan(load_config(config, [*words, "--distributed.accumulate_sharded=true"])), 2, tiny)
    assert wide.total - sharded.total == wide.memory["unsharded gradients"] > 0 and sharded.reduced == 2 * wide.reduced
    with pytest.raises(InputError, match="train.batch_size = 4: 3 processes with grad_accum_steps = 2 need a multiple of 6"):
        on_cluster(found, 3, small)


def test_ranks_that_share_rows(tmp_path: Path) -> None:
    """Two processes have the rows of one, half of each; what images cost is said to be left out."""
    config = make_job(tmp_path)
    (whole,) = on_cluster(plan(load_config(config, [STEPS])), 2, GPUS["h200"])
    found = plan(load_config(config, [STEPS, "--distributed.context_parallel=2"]))
    (shared,) = on_cluster(found, 2, GPUS["h200"])
    assert shared.rows == 2 * whole.rows and whole.exchanged == 0 < shared.exchanged
    others = 2 * shared.rows * found.dtype.itemsize * 2 * 32 * found.stages[0].row_length / 2  # of two layers, keys and values 32 wide
    assert shared.memory["activations"] == pytest.approx(whole.memory["activations"] + others, rel=1e-4)
    assert shared.exchanged == pytest.approx(2 * others) and shared.exposed_s > whole.exposed_s
    assert any("context_parallel: activations and products of the images" in line for line in shared.warnings)
    with pytest.raises(InputError, match="their product must divide the number of processes, 3"):
        on_cluster(found, 3, GPUS["h200"])
    with pytest.raises(InputError, match="batch_size = 4: 16 processes in groups of 2 with grad_accum_steps = 1 need a multiple of 8"):
        on_cluster(found, 16, GPUS["h200"])


def test_activation_checkpointing_keeps_less(tmp_path: Path) -> None:
    deep = ("--model.n_layers=8", STEPS)
    config = make_job(tmp_path)
    (all_of_it,) = on_cluster(plan(load_config(config, deep)), 1, GPUS["h200"])
    (inputs,) = on_cluster(plan(load_config(config, [*deep, "--train.activation_checkpointing=true"])), 1, GPUS["h200"])
    assert inputs.memory["activations"] < 0.6 * all_of_it.memory["activations"] and inputs.compute_s > 1.2 * all_of_it.compute_s
    assert inputs.mfu < all_of_it.mfu


def test_the_command(tmp_path: Path) -> None:
    config = make_job(tmp_path)
    ended = call("check", config, "--gpus=2", "--gpu=a100")
    assert ended.code == 0 and "on 2 x a100, a process:" in ended.out and "MFU" in ended.out
    (stage,) = json.loads(call("check", config, "--gpus=2", "--json").out)["cluster"]
    assert stage["processes"] == 2 and stage["memory_bytes"]["weights"] > 0 and stage["tokens_per_s"] > 0
    assert "cluster" not in json.loads(call("check", config, "--json").out)
    for gpus, code in ((1, 0), (4, 2)):  # one process trains with any, too
        assert call("check", config, f"--gpus={gpus}", "--distributed.shard_size=3").code == code
    ended = call("check", config, "--gpu=a100")
    assert ended.code == 2 and "--gpu a100: only --gpus reads it" in ended.err
