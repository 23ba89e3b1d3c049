from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from kempnerforge.checkpoint import CheckpointError, find, load_training, load_weights, save_training, tensor_info, verify
from kempnerforge.checkpoint.state import load_optimizer, model_tensors, optimizer_template, optimizer_tensors
from tests.checkpoint.helpers import Tiny, differing, make_optimizers, snapshot, train
from tests.dist import run_ranks


def everything(model: nn.Module, optimizers) -> dict[str, torch.Tensor]:
    return snapshot({**model_tensors(model), **optimizer_tensors(model, optimizers)})


def trained(steps: int):
    model = Tiny()
    optimizers = make_optimizers(model)
    train(model, optimizers, 0, steps)
    return model, optimizers


def test_names() -> None:
    model, optimizers = trained(1)
    assert set(model_tensors(model)) == {f"model.{n}" for n, _ in model.named_parameters()} | {"model.seen"}
    assert "model.embed.weight" in model_tensors(model) and "model.head.weight" not in model_tensors(model)
    keys = set(optimizer_tensors(model, optimizers))
    assert {k for k in keys if "embed" in k} == {f"optim.embed.weight|{k}" for k in ("step", "exp_avg", "exp_avg_sq")}
    assert {k for k in keys if "gate" in k} == {"optim.gate|momentum_buffer"}
    assert not any("never" in k for k in keys)


@pytest.mark.parametrize("at", range(5))
def test_resume_is_exact_at_every_step(tmp_path: Path, at: int) -> None:
    """Also where a matrix with moments is frozen (step 2) and where nothing has a state yet (step 0)."""
    reference = everything(*trained(5))
    model, optimizers = trained(at)
    before = everything(model, optimizers)
    path = save_training(tmp_path, at, model, optimizers, {}, {}, keep=1)
    assert not differing(before, everything(model, optimizers)), "saving changed the training"
    train(model, optimizers, at, 5)
    assert not differing(reference, everything(model, optimizers))

    model, optimizers = trained(4)  # state that the load must replace, not merge with
    load_training(path, model, optimizers)
    assert verify(path).step == at
    assert not differing(before, everything(model, optimizers))
    train(model, optimizers, at, 5)
    assert not differing(reference, everything(model, optimizers))


def test_moments_of_a_parameter_that_is_frozen_now_are_kept(tmp_path: Path) -> None:
    model, optimizers = trained(4)
    key = "optim.inner.0.weight|exp_avg"
    assert not model.inner[0].weight.requires_grad and key in optimizer_tensors(model, optimizers)
    path = save_training(tmp_path, 4, model, optimizers, {}, {}, keep=1)
    fresh = Tiny()
    load_training(path, fresh, new := make_optimizers(fresh))
    assert torch.equal(optimizer_tensors(fresh, new)[key], optimizer_tensors(model, optimizers)[key])


def test_hyper_parameters_stay(tmp_path: Path) -> None:
    model, optimizers = trained(2)
    path = save_training(tmp_path, 2, model, optimizers, {}, {}, keep=1)
    optimizers[0].param_groups[0]["lr"] = 0.123
    load_training(path, model, optimizers)
    assert optimizers[0].param_groups[0]["lr"] == 0.123


def test_fused_adamw_keeps_its_counter_where_the_kernel_reads_it() -> None:
    model = nn.Linear(2, 2)
    info = {"optim.weight|step": ((), torch.float32), "optim.weight|exp_avg": ((2, 2), torch.bfloat16)}
    template = optimizer_template(model, [torch.optim.AdamW(model.parameters(), fused=True)], info)
    assert template["optim.weight|step"].device == model.weight.device
    assert template["optim.weight|exp_avg"].dtype == torch.bfloat16 and not template["optim.weight|exp_avg"].requires_grad
    meta = nn.Linear(2, 2, device="meta")
    for fused, device in ((True, "meta"), (False, "cpu")):
        optimizer = torch.optim.AdamW(meta.parameters())
        optimizer.param_groups[0]["fused"] = fused
        assert optimizer_template(meta, [optimizer], info)["optim.weight|step"].device.type == device


def test_factored_moments(tmp_path: Path) -> None:
    def build():
        torch.manual_seed(0)
        model = nn.Linear(6, 4)
        return model, [torch.optim.Adafactor(model.parameters())]

    model, optimizers = build()
    model(torch.ones(2, 6)).sum().backward()
    optimizers[0].step()
    path = save_training(tmp_path, 1, model, optimizers, {}, {}, keep=1)
    fresh, new = build()
    load_training(path, fresh, new)
    assert "optim.weight|row_var" in optimizer_tensors(fresh, new)
    assert not differing(everything(model, optimizers), everything(fresh, new))


def test_optimizer_state_of_a_stranger(tmp_path: Path) -> None:
    model, optimizers = trained(1)
    path = save_training(tmp_path, 1, model, optimizers, {}, {}, keep=1)
    fresh = Tiny()
    before = snapshot(model_tensors(fresh))
    with pytest.raises(CheckpointError, match="optimizer state .* of 'gate', which no optimizer here has"):
        load_training(path, fresh, make_optimizers(fresh)[:1])
    with pytest.raises(CheckpointError, match="cannot load .*model.extra"):
        fresh.extra = nn.Parameter(torch.zeros(1))
        load_training(path, fresh, make_optimizers(fresh))
    del fresh.extra
    assert not differing(before, snapshot(model_tensors(fresh)))


def test_state_that_is_no_tensor(tmp_path: Path) -> None:
    model, optimizers = trained(1)
    optimizers[0].state[model.embed.weight]["step"] = 3
    with pytest.raises(CheckpointError, match="optimizer state 'step' of embed.weight is a int"):
        save_training(tmp_path, 1, model, optimizers, {}, {}, keep=1)


def test_a_flipped_bit_changes_nothing_in_memory(tmp_path: Path) -> None:
    model, optimizers = trained(2)
    path = save_training(tmp_path, 2, model, optimizers, {}, {}, keep=1)
    data = bytearray((path / "__0_0.distcp").read_bytes())
    data[len(data) // 3] ^= 4
    (path / "__0_0.distcp").write_bytes(data)
    train(model, optimizers, 2, 3)
    before = everything(model, optimizers)
    for attempt in (lambda: load_training(path, model, optimizers), lambda: load_weights(path, model)):
        with pytest.raises(CheckpointError, match="__0_0.distcp is corrupt"):
            attempt()
    assert not differing(before, everything(model, optimizers))


def test_weights_alone(tmp_path: Path) -> None:
    model, optimizers = trained(3)
    model.seen += 5
    path = save_training(tmp_path, 3, model, optimizers, {"a": 1}, {}, keep=1)
    fresh = Tiny()
    assert load_weights(path, fresh).state == {"a": 1}
    assert not differing(snapshot(model_tensors(model)), snapshot(model_tensors(fresh)))
    assert fresh.head.weight is fresh.embed.weight
    with pytest.raises(CheckpointError, match="another dtype"):
        load_weights(path, Tiny().bfloat16())
    untied = Tiny()
    untied.head = nn.Linear(5, 7, bias=False)
    with pytest.raises(CheckpointError, match="1 tensors are not in the checkpoint: model.head.weight"):
        load_weights(path, untied)


def test_load_optimizer_drops_what_the_checkpoint_lacks() -> None:
    model, optimizers = trained(2)
    load_optimizer(model, optimizers, {})
    assert not optimizer_tensors(model, optimizers)


@pytest.mark.dist
def test_two_ranks_one_rank_and_no_group(tmp_path: Path) -> None:
    """2 ranks to step 3, 1 rank to 5, 2 ranks to 7: bitwise the run of a plain module that was never stopped."""
    target = "tests.checkpoint.workers:train_and_save"
    for world, start, end in ((2, 0, 3), (1, 3, 5), (2, 5, 7)):
        results = run_ranks(target, world, tmp_path / "c", start, end, tmp_path / "full.pt")
        assert [r.returncode for r in results] == [0] * world, "\n".join(r.stderr for r in results)
        assert not differing(everything(*trained(end)), torch.load(tmp_path / "full.pt"))
        model = Tiny()
        optimizers = make_optimizers(model)
        found = find(tmp_path / "c")
        assert found is not None and found[1].world_size == world
        assert found[1].step == end
        load_training(found[0], model, optimizers, found[1])
        assert not differing(everything(*trained(end)), everything(model, optimizers))
        assert tensor_info(found[0])["model.embed.weight"] == ((7, 5), torch.float32)


@pytest.mark.dist
def test_trouble_on_one_rank_reaches_both(tmp_path: Path) -> None:
    results = run_ranks("tests.checkpoint.workers:one_rank_in_trouble", 2, tmp_path / "c", timeout=60)
    assert [r.returncode for r in results] == [0, 0], "\n".join(r.stderr for r in results)
