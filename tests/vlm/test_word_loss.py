"""``train.logits_at_once``: the loss piece by piece is the loss of all logits, in less memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kempnerforge.config import load_config
from kempnerforge.config.lora import LoRAConfig
from kempnerforge.contract.cases import GQA, MODEL, SAMPLES, Tiny, full, gradients, install, tiny, tiny_job
from kempnerforge.contract.ranks import shares
from kempnerforge.data.batching.batch import IGNORE, Batch
from kempnerforge.distributed.world import World
from kempnerforge.inspection.cluster import GPUS, on_cluster
from kempnerforge.inspection.plan import plan
from kempnerforge.training.accounting import Held, TrainingFlops, cost
from kempnerforge.util.errors import InputError
from kempnerforge.vlm.word_loss import loss_in_pieces, word_loss
from tests.dist import ranks_pass
from tests.distributed.workers import in_world
from tests.training.tiny import call, make_job

TARGETS = 39
"""Of all samples."""
HEADS: dict[str, dict[str, Any]] = {
    "tied": {"model": replace(MODEL, new_tokens=[])},
    "tied, new tokens": {},
    "untied": {"model": GQA},
    "untied, new tokens": {"model": replace(MODEL, tie_embeddings=False)},
    "softcap": {"model": replace(MODEL, logit_softcap=2.0)},
    "lora": {"model": GQA, "lora": [LoRAConfig(module="transformer.output_head", rank=2)]},
}


def build(at_once: int, arch: str | None = "joint_decoder", **sections: Any) -> Tiny:
    return tiny(arch, train=replace(tiny_job(arch).train, logits_at_once=at_once), **sections)


def weighted(batch: Batch) -> Batch:
    return replace(batch, target_weights=0.1 + torch.rand(batch.num_targets, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("at_once", [1, 5, 38])
@pytest.mark.parametrize("has_weights", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("head", HEADS)
def test_pieces_are_the_whole(head: str, has_weights: bool, at_once: int) -> None:
    """Losses and gradients, each within 1e-5 of its value or 1e-6."""
    whole, pieces = (build(n, **HEADS[head]) for n in (0, at_once))
    batch = whole.batch(*SAMPLES)
    batch = weighted(batch) if has_weights else batch
    want, got = (it.model(batch) for it in (whole, pieces))
    assert len(want.logits) == batch.num_targets > 38 and got.logits.shape == (0, want.logits.shape[1])
    assert (got.weighted_loss is None) == (not has_weights) and got.loss.requires_grad == (not has_weights)
    torch.testing.assert_close((got.loss, got.total), (want.loss, want.total), rtol=1e-5, atol=0)
    (loss, grads), (its_loss, its_grads) = (gradients(it.model, batch) for it in (whole, pieces))
    torch.testing.assert_close((its_loss, its_grads), (loss, grads), rtol=1e-5, atol=1e-6)


def test_the_default_and_large_pieces_are_bitwise_the_whole() -> None:
    outputs = []
    for at_once in (0, TARGETS, 1000):
        it = build(at_once)
        batch = it.batch(*SAMPLES)
        outputs.append((it.model(batch).logits, *gradients(it.model, batch)))
    for logits, loss, grads in outputs[1:]:
        assert torch.equal(logits, outputs[0][0]) and torch.equal(loss, outputs[0][1])
        assert all(torch.equal(grad, outputs[0][2][name]) for name, grad in grads.items())


@pytest.mark.parametrize("frozen", ["transformer.*", "adapter.*", "transformer.token_embedding.*"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    found = []
    for at_once in (0, 3):
        it = build(at_once)
        for name, parameter in it.model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen.removesuffix("*")))
        found.append(gradients(it.model, it.batch(*SAMPLES)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_bf16_is_no_further_from_fp32_than_the_whole(world: World) -> None:
    """Sums over pieces are in fp32, so that many of them do not add up their rounding."""
    exact = build(0, model=GQA)
    batch = exact.batch(*SAMPLES)
    _, truth = gradients(exact.model, batch)
    errors = []
    for at_once in (0, 1, 7):
        it = build(at_once, model=GQA)
        install(it, world, torch.bfloat16)
        grads = full(gradients(it.model, batch)[1])
        errors.append({name: float((grad - truth[name]).norm() / truth[name].norm()) for name, grad in grads.items() if truth[name].any()})
    name = "transformer.output_head.weight"
    for found in errors[1:]:
        assert 0 < found[name] < 1.1 * errors[0][name] < 0.02
        assert sum(found.values()) < 1.1 * sum(errors[0].values())


def two_ranks(out: str) -> None:
    """Gradients of a rank's share each, in bf16 and piece by piece; rank 0 writes their sums."""

    def body(world: World) -> None:
        it = build(2, model=GQA)
        install(it, world, torch.bfloat16)
        grads = full(gradients(it.model, shares(it)[world.rank])[1])
        if world.is_main:
            torch.save(grads, out)

    in_world(body)


@pytest.mark.dist
def test_two_ranks_in_bf16(tmp_path: Path, world: World) -> None:
    """Weights are gathered in bf16 and used before the backward pass: they get the gradients of one process."""
    ranks_pass("tests.vlm.test_word_loss:two_ranks", 2, tmp_path / "grads.pt", timeout=100)
    got = torch.load(tmp_path / "grads.pt", weights_only=True)
    it = build(0, model=GQA)
    install(it, world, torch.bfloat16)
    parts = [full(gradients(it.model, batch)[1]) for batch in shares(it)]  # each divided by its own targets; the second adds to the first
    assert got.keys() == parts[1].keys()
    for name, grad in got.items():
        limit = 0.01 if name == "transformer.output_head.weight" else 0.06  # of the norm; small layers are rounded more
        assert (grad - parts[1][name]).norm() <= limit * parts[1][name].norm() + 1e-3, name


def test_a_head_in_fewer_steps_than_its_pieces() -> None:
    """By hand: weights of two numbers, labels without one, a bias, an input that nothing trains."""
    torch.manual_seed(0)
    head, x = nn.Linear(6, 11), torch.randn(8, 6)
    labels, weights = torch.randint(11, (8,)), torch.rand(8)
    labels[3] = IGNORE
    for needs in (True, False):
        rows = x.clone().requires_grad_(needs)
        inputs = [*head.parameters(), *([rows] if needs else [])]
        want = word_loss(head(rows), labels, weights)
        got = loss_in_pieces(head, rows, labels, weights, 3)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(3 * got.trained, inputs), torch.autograd.grad(3 * want.trained, inputs))
    head.requires_grad_(False)
    assert not loss_in_pieces(head, x, labels, None, 3).loss.requires_grad


def test_a_second_backward_pass_is_refused() -> None:
    """The gradients are scaled where they are."""
    head, x = nn.Linear(6, 11), torch.randn(8, 6)
    loss = loss_in_pieces(head, x, torch.randint(11, (8,)), None, 3).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace|second time"):
        loss.backward()


def test_logits_are_whole_where_they_are_read() -> None:
    it = build(3)
    batch = it.batch(*SAMPLES)
    with torch.no_grad():
        assert len(it.model(batch).logits) == TARGETS
    it.model.eval()
    assert len(it.model(batch).logits) == TARGETS


# ---- memory -------------------------------------------------------------------------------------------------------------


def held(it: Tiny, batch: Batch) -> int:
    """Bytes of a forward and a backward pass, beside weights and what the model was given."""
    with Held() as found:
        it.model(batch).mean(1, 1).backward()
    it.model.zero_grad()
    return found.peak


def test_memory_is_that_of_a_piece() -> None:
    """All logits are three tensors of (T, V) in fp32 at least; a piece of them has a tenth of the rows."""
    model = replace(MODEL, new_tokens=[], vocab_size=20_000)
    whole, pieces = (build(n, None, model=model) for n in (0, 4))
    batch = whole.batch(*SAMPLES)
    logits, weights = 4 * 20_000 * batch.num_targets, 4 * 20_000 * MODEL.dim
    assert held(whole, batch) > 3 * logits
    assert held(pieces, batch) < 1.5 * logits + 4 * weights
    largest = max(tensor.numel() for tensor in tensors_of(pieces, batch) if 20_000 in tensor.shape and MODEL.dim not in tensor.shape)
    assert largest == 4 * 20_000, "no tensor has the logits of more than a piece"


def tensors_of(it: Tiny, batch: Batch) -> list[Tensor]:
    """What autograd keeps of a forward pass, at any time."""
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (found.append(tensor), tensor)[1], lambda tensor: tensor):
        it.model(batch).mean(1, 1).backward()
    return found


def test_held_counts_what_is_there() -> None:
    with Held() as found:
        a = torch.zeros(100)
        b = a.view(10, 10)
        b.add_(1)
        del a, b
        c = torch.zeros(50).exp()
    assert found.peak == 400 and c.numel() == 50
    with Held() as found:
        c.view(5, 10).mul_(2)
    assert found.peak == 0, "a view of what was there before"
    with Held() as found:
        kept = [torch.zeros(25) for _ in range(4)]
        F.relu(kept[0])
    assert found.peak == 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [0, 4])
def test_the_plan_counts_it(at_once: int, dtype: torch.dtype) -> None:
    """As much as a real forward pass holds in this precision; as many products. Attention is written out on a
    CPU in bf16, and the meta device has another kernel.
    """
    model = replace(MODEL, new_tokens=[], vocab_size=5_000)
    it, planned = build(at_once, None, model=model), tiny(None, device="meta", model=model)
    planned.model.logits_at_once = at_once
    batch = it.batch(*SAMPLES)
    names = frozenset(name for name, _ in it.model.named_parameters())
    found = cost(planned.model, batch, names, dict.fromkeys(names, 2), dtype)
    it.model.to(dtype)
    with Held() as real:
        it.model(batch)
    assert real.peak == pytest.approx(found.activation_bytes, rel=0.01 if dtype == torch.float32 else 0.15)
    all_at_once = tiny(None, device="meta", model=model)
    assert found.flops == cost(all_at_once.model, batch, names, dict.fromkeys(names, 2), dtype).flops
    assert found.modules == cost(all_at_once.model, batch, names, dict.fromkeys(names, 2), dtype).modules
    assert planned.model.logits_at_once == at_once and {p.dtype for p in planned.model.parameters()} == {torch.float32}
    assert TrainingFlops(it.job).count(batch, names) == found.flops * len(batch.sample_names)


def test_a_cluster_holds_less(tmp_path: Path) -> None:
    words = ("--train.max_steps=9", "--model.vocab_size=50000", "--train.batch_size=32")
    config = make_job(tmp_path)
    whole, pieces = (
        on_cluster(plan(load_config(config, [*words, *more])), 1, GPUS["h200"])[0] for more in ((), ["--train.logits_at_once=2"])
    )
    targets = json_targets(config, words)
    assert whole.memory["activations"] - pieces.memory["activations"] > 4 * 50_000 * (targets - 2)
    assert whole.compute_s == pieces.compute_s and whole.largest_rows < pieces.largest_rows


def test_what_does_not_grow_with_rows(tmp_path: Path) -> None:
    """Gradients of the head and a piece of its logits are on each of eight processes as on one."""
    found = plan(load_config(make_job(tmp_path), ["--train.max_steps=9", "--train.batch_size=32", "--train.logits_at_once=2"]))
    cost = found.stages[0].cost
    model = found.assembly.model
    head = 4 * sum(p.numel() for p in (model.transformer.token_embedding.weight, model.transformer.norm.weight))
    assert head < cost.fixed_bytes < 3 * head < cost.activation_bytes
    one, eight = (on_cluster(found, processes, GPUS["h200"])[0].memory["activations"] for processes in (1, 8))
    assert one == cost.activation_bytes and eight == pytest.approx((one - cost.fixed_bytes) / 8 + cost.fixed_bytes, abs=1)
    assert "score_stream" not in vars(model)
    assert plan(load_config(tmp_path / "job.toml", ["--train.max_steps=9"])).stages[0].cost.fixed_bytes == 0


def json_targets(config: Path, words: tuple[str, ...]) -> int:
    """Trained tokens of the first batch."""
    found = plan(load_config(config, words))
    return next(found.assembly.data.batches(found.stages[0].stage, 0)).num_targets


# ---- what a user sees ---------------------------------------------------------------------------------------------------


def test_a_run_with_pieces_learns_as_without(tmp_path: Path) -> None:
    """The same curve within rounding, and the option may change when a run goes on."""
    from tests.training.tiny import losses

    curves, fixed = [], ("--train.mixed_precision=fp32", "--scheduler.name=constant")
    for name, words in (("whole", ()), ("pieces", ("--train.logits_at_once=2",))):
        assert call("train", make_job(tmp_path / name), *fixed, *words).code == 0
        curves.append(losses(tmp_path / name / "run"))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4) and len(curves[0]) > 2
    more = call("train", tmp_path / "whole" / "job.toml", *fixed, "--train.logits_at_once=2", "--train.max_steps=8")
    assert more.code == 0, more.err


def test_a_class_that_changes_its_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of transformers: a softcap after the head would be left out."""
    import tests.vlm.tiny as archs

    assert "hf" in archs.FOREIGN
    it = build(3, "hf")
    batch, forward = it.batch(*SAMPLES), type(it.model.hf_model).forward

    def capped(self: Any, **given: Any) -> Any:
        found = forward(self, **given)
        found.logits = torch.tanh(found.logits)
        return found

    monkeypatch.setattr(it.model.hf_model, "forward", capped.__get__(it.model.hf_model))
    with pytest.raises(InputError, match="train.logits_at_once = 3: PaliGemmaForConditionalGeneration changes what its head gives"):
        it.model(batch)
    it.model.eval()
    assert len(it.model(batch).logits) == TARGETS


def test_a_model_without_words_has_no_logits() -> None:
    vlm = replace(tiny_job("dual_encoder").vlm, caption_weight=0.0)
    with pytest.raises(InputError, match="train.logits_at_once = 3: the model makes no logits"):
        build(3, "dual_encoder", vlm=vlm)
    build(0, "dual_encoder", vlm=vlm)


def test_it_is_a_number_of_tokens(tmp_path: Path) -> None:
    ended = call("check", make_job(tmp_path), "--train.logits_at_once=-1")
    assert ended.code == 2 and "logits_at_once = -1" in ended.err
