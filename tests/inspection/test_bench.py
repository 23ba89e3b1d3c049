"""``kempnerforge bench``: what it counts, and that it writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kempnerforge.config import load_config
from kempnerforge.inspection.products import Products, largest_rate
from kempnerforge.training.accounting import TrainingFlops
from kempnerforge.training.setup import assemble
from tests.training.tiny import call, make_job, two_ranks

CPU = torch.device("cpu")
DEEP = ("--train.max_steps=30", "--model.n_layers=4")


def measured(config: Path, *words: str) -> dict:
    ended = call("bench", config, "--steps=2", "--warmup=1", "--json", *DEEP, *words)
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


@pytest.mark.parametrize("arch", ["joint_decoder", "cross_attention"])
def test_figures(arch: str, tmp_path: Path) -> None:
    config = make_job(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    found = measured(config, f"--vlm.arch={arch}", "--peak-tflops=0.5")
    assert sorted(path for path in tmp_path.rglob("*")) == before, "nothing is written"

    job = load_config(config, [f"--vlm.arch={arch}", *DEEP])
    assembly = assemble(job)
    batches = assembly.data.batches(assembly.stages[0], 0)
    taken = [next(batches) for _ in range(3)][1:]  # the first one warms up
    counter = TrainingFlops(assembly.job)
    everything = frozenset(name for name, _ in assembly.model.named_parameters())
    assert found["flops_per_step"] == sum(counter.count(batch, everything) for batch in taken) / 2
    tokens = sum(batch.useful_tokens for batch in taken) / sum(len(batch.input_ids) for batch in taken)
    assert found["tokens_per_s"] / found["samples_per_s"] == pytest.approx(tokens)
    assert found["images_per_s"] == pytest.approx(found["samples_per_s"])
    assert found["mfu"] == pytest.approx(found["flops_per_s"] / 0.5e12) and found["peak_from"] == "given"
    assert found["share_of_products"] == pytest.approx(found["flops_per_s"] / found["products_flops_per_s"])
    assert set(found["phases_s"]) == {
        "data",
        "weights",
        "vision encoder",
        "adapter",
        "embedding",
        "layers",
        "head and loss",
        "backward",
        "optimizer",
        "other",
    }
    assert all(seconds > 0 for seconds in found["phases_s"].values())
    assert 0 < found["data_share"] < 1 and found["kinds_s"]["matrix products"] > 0 and found["processes"] == 1


def test_a_stage_and_a_trace(tmp_path: Path) -> None:
    config = make_job(tmp_path, extra='[[stages]]\nname = "a"\nsteps = 3\n[[stages]]\nname = "b"\nsteps = 40\n')
    ended = call("bench", config, "--steps=2", "--warmup=1", "--stage=b", "--trace", tmp_path / "new/trace.json", "--train.max_steps=0")
    assert ended.code == 0 and "stage b:" in ended.out and "matrix products" in ended.out
    names = {event.get("name", "") for event in json.loads((tmp_path / "new/trace.json").read_text())["traceEvents"]}
    assert any("aten::" in name for name in names)
    for place, why in ((tmp_path, "is a directory; name a file"), (config / "trace.json", "job.toml is not a directory")):
        ended = call("bench", config, "--trace", place)
        assert ended.code == 2 and f"--trace {place}: " in ended.err and why in ended.err
    ended = call("bench", config, "--stage=c")
    assert ended.code == 2 and "--stage c: no such stage; there are a, b" in ended.err
    ended = call("bench", config, "--train.max_steps=0")
    assert ended.code == 2 and "stage 'a' has 3 steps, and 49 are to be run" in ended.err


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    found = two_ranks("bench", make_job(tmp_path), "--steps=2", "--warmup=1", "--json", *DEEP)
    (line,) = [line for line in found.out.splitlines() if line.startswith("{")]
    facts = json.loads(line)
    assert facts["processes"] == 2
    alone = measured(tmp_path / "job.toml")
    assert facts["flops_per_step"] == pytest.approx(alone["flops_per_step"], rel=0.05), "of all processes together"


def test_products_are_noted_by_their_form() -> None:
    x, w = torch.randn(5, 7), torch.randn(7, 3, requires_grad=True)
    products = Products()
    with products:
        for _ in range(3):
            (x @ w).sum().backward()
    assert sum(products.calls.values()) == 6, "forward, and the gradient of the weight"
    assert set(products.calls.values()) == {3} and len(products.calls) == 2
    assert products.seconds(CPU) > 0
    assert largest_rate(torch.float32, CPU) > 1e8
