"""``train.activation_checkpointing_keeps``: what is kept, and what runs again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kempnerforge.config import load_config
from kempnerforge.contract.cases import SAMPLES, Tiny, tiny
from kempnerforge.distributed.fsdp import PRODUCTS, recompute_unit
from kempnerforge.inspection.cluster import GPUS, on_cluster
from kempnerforge.inspection.plan import plan
from kempnerforge.training.accounting import Held
from tests.training.tiny import call, losses, make_job

WAYS: dict[str, tuple[str, ...]] = {
    "all": (),
    "products": ("--train.activation_checkpointing=true", "--train.activation_checkpointing_keeps=products"),
    "inputs": ("--train.activation_checkpointing=true",),
}
"""From most memory to least."""


def build(way: str) -> Tiny:
    it = tiny("joint_decoder")
    for unit in it.model.shard_units() if way != "all" else ():
        recompute_unit(unit, keep_products=way == "products")
    return it


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func] += 1
        return func(*args, **(kwargs or {}))


def test_memory_is_between_none_and_all() -> None:
    kept = []
    for way in WAYS:
        it = build(way)
        with Held() as found:
            it.model(it.batch(*SAMPLES))
        kept.append(found.peak)
    assert kept[0] > 1.3 * kept[1] > 1.3**2 * kept[2]


def test_products_run_once_and_the_rest_again() -> None:
    """In the forward pass all do as without recomputation; in the backward pass there are more elementwise operators alone."""
    flops, forward, backward = [], [], []
    for way in WAYS:
        it = build(way)
        batch = it.batch(*SAMPLES)
        with Calls() as there:
            total = it.model(batch).mean(1, 1)
        with FlopCounterMode(display=False) as counter, Calls() as back:
            total.backward()
        flops.append(counter.get_total_flops())
        forward.append({op: there.seen[op] for op in PRODUCTS})
        backward.append(back.seen)
    assert forward[0] == forward[1] == forward[2] and flops[0] == flops[1] < flops[2]
    none, products, inputs = backward
    assert [products[op] - none[op] for op in PRODUCTS] == [0] * len(PRODUCTS)
    assert sum(inputs[op] - none[op] for op in PRODUCTS) > 0
    silu = torch.ops.aten.silu.default
    assert none[silu] == 0 < products[silu] == inputs[silu]


def test_the_plan_knows_it(tmp_path: Path) -> None:
    config = make_job(tmp_path)
    fixed = ("--train.max_steps=9", "--model.n_layers=8", "--train.mixed_precision=fp32")
    none, products, inputs = (on_cluster(plan(load_config(config, [*fixed, *way])), 1, GPUS["h200"])[0] for way in WAYS.values())
    held = [stage.memory["activations"] for stage in (none, products, inputs)]
    assert held[0] > 1.2 * held[1] > 1.2**2 * held[2]
    assert none.compute_s == products.compute_s < inputs.compute_s < 4 / 3 * none.compute_s
    assert inputs.largest_rows > products.largest_rows > none.largest_rows


def test_a_run_is_bitwise_the_same(tmp_path: Path) -> None:
    curves = []
    for way, words in WAYS.items():
        assert call("train", make_job(tmp_path / way), *words).code == 0
        curves.append(losses(tmp_path / way / "run"))
    assert curves[0] == curves[1] == curves[2] and len(curves[0]) > 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--train.activation_checkpointing_keeps=products",), "only activation_checkpointing = true reads it"),
        (("--train.activation_checkpointing=true", "--train.activation_checkpointing_keeps=all"), "'inputs'"),
    ],
)
def test_what_cannot_be_is_refused(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    ended = call("check", make_job(tmp_path), *words)
    assert ended.code == 2 and "activation_checkpointing_keeps" in ended.err and said in ended.err
