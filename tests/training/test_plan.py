"""What ``check`` counts, against the model itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kempnerforge.config import load_config
from kempnerforge.training.accounting import part_of, parts
from kempnerforge.training.inspection import inspect_stages
from kempnerforge.training.plan import dry_run, plan
from kempnerforge.training.setup import assemble
from tests.training.tiny import make_job

STAGES = """
[[stages]]
name = "all"
steps = 3
[[stages]]
name = "adapter alone"
steps = 3
train.batch_size = 8
freeze = [{ module = "*" }, { module = "adapter", frozen = false }]
optimizer.lr_scale = { "transformer.layers.0.*" = 0.5 }
"""


@pytest.fixture(scope="module")
def job_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_job(tmp_path_factory.mktemp("plan"), extra=STAGES)


def test_parameters_are_those_of_the_model(job_path: Path):
    job = load_config(job_path)
    found = plan(job)
    model = assemble(job).model
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    for stage in found.stages:
        assert sum(m.parameters for m in stage.cost.modules) == sum(sizes.values())
        for module in stage.cost.modules:
            assert module.parameters == sum(n for name, n in sizes.items() if part_of(name) == module.name)


def test_frozen_parts_have_nothing_trainable(job_path: Path):
    first, second = plan(load_config(job_path)).stages
    assert all(m.trainable == m.parameters for m in first.cost.modules)
    trainable = {m.name: m.trainable for m in second.cost.modules if m.parameters}
    assert trainable.pop("adapter") > 0 and set(trainable.values()) == {0}
    assert second.cost.state_bytes < first.cost.state_bytes and second.cost.flops < first.cost.flops
    assert second.lr_scale["transformer.layers"] == [0.5, 1.0] and second.lr_scale["adapter"] == [1.0]


def test_flops_are_those_of_a_real_step(job_path: Path):
    job = load_config(job_path)
    found = plan(job)
    assembly = assemble(job)
    batch = next(assembly.batches(assembly.stages[0], 0))
    with FlopCounterMode(display=False) as counter:
        assembly.model(batch).loss.backward()
    assert found.stages[0].cost.flops == pytest.approx(counter.get_total_flops() / len(batch.sample_names))
    assert sum(m.flops > 0 for m in found.stages[0].cost.modules) >= 4  # encoder, adapter, layers, head


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bytes_of_state(tied: bool, optimizer: str, job_path: Path):
    """fp32 weights and gradients, two moments for AdamW and one for Muon, and no copy of the weights when computing in fp32."""
    job = load_config(job_path, [f"--optimizer.name={optimizer}", f"--model.tie_embeddings={str(tied).lower()}"])
    model = assemble(job).model
    linears = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"transformer.output_head.weight"}
    expected = 0
    for name, p in model.named_parameters():
        slots = 1 if optimizer == "muon" and name in linears else 2
        expected += p.numel() * (4 + 4 + 4 * slots)
    assert plan(job).stages[0].cost.state_bytes == expected


def test_rows_and_their_useful_share(job_path: Path):
    job = load_config(job_path, ["--data.batching=pad"])
    stage = plan(job).stages[0]
    assembly = assemble(job)
    batch = next(assembly.batches(assembly.stages[0], 0))
    assert stage.row_length == batch.input_ids.shape[1] == 4 + 48
    assert stage.useful == pytest.approx(batch.useful_tokens / batch.input_ids.numel()) and stage.useful < 0.6


def test_parts_cover_every_name():
    names = ["transformer.layers.0.mlp.up_proj.weight", "transformer.norm.weight", "adapter.proj.bias", "transformer.layers.1.a"]
    found = parts(names)
    assert list(found) == ["transformer.layers", "transformer.norm", "adapter"]
    assert sorted(name for part in found.values() for name in part) == sorted(names)


def test_planning_needs_no_memory_for_the_model(tmp_path: Path):
    """A model of 10 billion parameters can be checked anywhere."""
    big = ["--model.dim=8192", "--model.n_layers=20", "--model.n_heads=64", "--vision_encoder.dim=1024", "--train.max_steps=1"]
    found = plan(load_config(make_job(tmp_path), big))
    assert sum(m.parameters for m in found.stages[0].cost.modules) > 10e9
    assert all(p.is_meta for p in found.assembly.model.parameters())


def test_dry_run_reports_the_loss_of_fresh_weights(job_path: Path):
    job = load_config(job_path)
    lines = dry_run(job)
    assembly = assemble(job)
    batch = next(assembly.batches(assembly.stages[1], 3))
    loss = float(assembly.model(batch).loss.detach()) / batch.num_targets
    shape = f"8 x {batch.input_ids.shape[1]}"
    assert (
        lines[1] == f"stage adapter alone: first batch {shape}, {batch.num_targets} trained tokens, loss {loss:.4f} (fp32, fresh weights)"
    )


def test_inspection_shows_the_batches_that_training_gets(job_path: Path, tmp_path: Path):
    job = load_config(job_path)
    assembly = assemble(job)
    seen = list(inspect_stages(job, 6, 1, tmp_path, color=False))
    assert [stage.name for stage in seen] == ["all", "adapter alone"] and all(stage.findings == [] for stage in seen)
    names = []
    for batch, _ in zip(assembly.batches(assembly.stages[0], 1), range(2), strict=False):
        names += batch.sample_names
    assert [row.split("(")[1].split(")")[0] for row in seen[0].rows] == names[:6]
    assert seen[0].sheet == tmp_path / "contact-sheet-all.png" and seen[0].sheet.exists()


def test_inspection_in_color_marks_the_same_tokens(job_path: Path, tmp_path: Path):
    job = load_config(job_path)
    plain, color = (next(inspect_stages(job, 2, 0, tmp_path, color=c)).rows for c in (False, True))
    for a, b in zip(plain, color, strict=True):
        marked = b.split("\x1b[30;42m")[1].split("\x1b[0m")[0]
        assert a.endswith(f"[{marked}]") and marked.endswith("<eos>")
