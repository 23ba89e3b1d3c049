"""Low-rank adapters: the papers' formulas, nothing changed at the start, no name moved, and back to a plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kempnerforge.config import registry
from kempnerforge.config.lora import LoRAConfig, is_adapter, lora_frozen
from kempnerforge.distributed.world import World
from kempnerforge.model.lora import LoRALinear, adapt, adapted_layers, fitting_magnitudes, merge_adapters
from kempnerforge.training.optimizers.muon import MuonRule
from kempnerforge.util.name_rules import match_names
from tests.vlm.tiny import INTERLEAVED, ONE, THREE, Tiny, all_logits, gradients, install, tiny

KINDS = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
ARCHS = [None, *sorted(registry.archs)]


def linear(bias: bool = True, *, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 5, bias=bias, dtype=dtype)


def adapted(dora: bool, *, bias: bool = True, open_up: bool = True, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> LoRALinear:
    """A layer with an adapter, trained a little if ``open_up``."""
    layer = linear(bias, dtype=dtype)
    LoRALinear.adapt(layer, LoRAConfig("x", rank=3, alpha=6.0, dropout=dropout, dora=dora))
    made = cast(LoRALinear, layer)
    if open_up:
        with torch.no_grad():
            made.lora_b.normal_()
            if made.magnitude is not None:
                made.magnitude.mul_(1 + torch.rand(5))
    return made


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def by_hand(layer: LoRALinear, x: Tensor, a: Tensor, b: Tensor, m: Tensor | None) -> Tensor:
    """The papers' formulas, with W' written out."""
    v = layer.weight + 2.0 * b @ a
    if m is not None:
        v = m[:, None] * v / v.detach().pow(2).sum(1, keepdim=True).sqrt()
    return x @ v.T + (0 if layer.bias is None else layer.bias)


# ---- one layer -------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_at_the_start_nothing_changes(dora: bool, dtype: torch.dtype, bias: bool) -> None:
    base, layer, x = linear(bias, dtype=dtype), adapted(dora, bias=bias, open_up=False, dropout=0.5, dtype=dtype), inputs(dtype)
    assert torch.equal(layer.weight, base.weight) and not layer.lora_b.any() and layer.lora_a.abs().max() > 0
    if dora:
        torch.testing.assert_close(
            layer(x), base(x), rtol=1e-6 if dtype == torch.float32 else 0.02, atol=1e-6 if dtype == torch.float32 else 0.02
        )
    else:
        assert torch.equal(layer(x), base(x))


@KINDS
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_the_papers(dora: bool, bias: bool) -> None:
    layer, x = adapted(dora, bias=bias), inputs().requires_grad_()
    trained = [layer.lora_a, layer.lora_b, *([layer.magnitude] if layer.magnitude is not None else [])]
    weights = torch.randn(4, 7, 5)
    ours, theirs = layer(x), by_hand(layer, x, layer.lora_a, layer.lora_b, layer.magnitude)
    torch.testing.assert_close(ours, theirs)
    got, want = (torch.autograd.grad((y * weights).sum(), [x, layer.weight, *trained]) for y in (ours, theirs))
    for mine, hand in zip(got, want, strict=True):
        torch.testing.assert_close(mine, hand, rtol=1e-5, atol=1e-5)
        assert mine.abs().max() > 0


def test_dropout_is_on_the_update_alone_and_in_training_alone() -> None:
    layer, x = adapted(False, dropout=0.5), inputs()
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    torch.testing.assert_close(got, F.linear(x, layer.weight, layer.bias) + 2.0 * dropped @ layer.lora_a.T @ layer.lora_b.T)
    assert torch.equal(layer.eval()(x), layer(x)) and not torch.allclose(layer(x), got)


@KINDS
@pytest.mark.parametrize("bias", [True, False])
def test_merged_is_a_plain_layer_that_computes_the_same(dora: bool, bias: bool) -> None:
    layer, x = adapted(dora, bias=bias, dropout=0.5).eval(), inputs()
    before, weight = layer(x), layer.weight
    merge_adapters(layer)
    assert type(layer) is nn.Linear and layer.weight is weight and repr(layer) == repr(linear(bias))
    assert dict(layer.named_parameters()).keys() == dict(linear(bias).named_parameters()).keys()
    assert vars(layer).keys() == vars(linear(bias)).keys()
    torch.testing.assert_close(layer.train()(x), before, rtol=1e-5, atol=1e-5)


def test_a_row_of_zeros_stays_finite() -> None:
    layer = linear()
    with torch.no_grad():
        layer.weight[2] = 0
    LoRALinear.adapt(layer, LoRAConfig("x", dora=True))
    y = layer(inputs())
    y.sum().backward()
    assert torch.isfinite(y).all() and all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)
    merge_adapters(layer)
    assert torch.isfinite(layer.weight).all()


def test_half_precision_keeps_small_updates_of_the_length() -> None:
    """Lengths come from fp32 sums: in bf16, an update of 1/1000 of the weight would be rounded away."""
    layer = adapted(True, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.lora_b.mul_(1e-3)
    exact = layer.weight.double() + 2.0 * layer.lora_b.double() @ layer.lora_a.double()
    torch.testing.assert_close(layer.lengths(layer.combined()).double(), exact.norm(dim=1), rtol=1e-6, atol=0)


@KINDS
def test_on_the_meta_device(dora: bool) -> None:
    with torch.device("meta"):
        layer = adapted(dora, open_up=False)
        assert layer(torch.empty(2, 6)).shape == (2, 5)
    assert all(p.is_meta for p in layer.parameters())


@KINDS
def test_copies_and_compiles_in_one_graph(dora: bool) -> None:
    layer, x = adapted(dora, dropout=0.1).eval(), inputs()
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


# ---- choosing layers -------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Linear layers in several places, one of them held by a tuple too, and modules that are no plain linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(4, 4), "up": nn.Linear(4, 8, bias=False)}) for _ in range(2))
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 3)
        self.hidden = (self.head,)


def adapters(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]


@pytest.mark.parametrize(
    ("module", "found"),
    [
        ("layers.*.q_proj", ["layers.0.q_proj", "layers.1.q_proj"]),
        ("layers.1.*", ["layers.1.q_proj", "layers.1.up"]),
        ("body", ["layers.0.q_proj", "layers.0.up", "layers.1.q_proj", "layers.1.up"]),
        ("*", ["layers.0.q_proj", "layers.0.up", "layers.1.q_proj", "layers.1.up", "head"]),  # attention reads its weights by itself
    ],
)
def test_an_alias_or_a_pattern_chooses_layers(module: str, found: list[str]) -> None:
    model = Mixed()
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapt(model, [LoRAConfig(module)], {"body": ["layers.*"]})
    assert adapters(model) == found
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert set(after) - set(before) == {f"{layer}.{part}" for layer in found for part in ("lora_a", "lora_b")}
    assert {name for name in after if is_adapter(name)} == set(after) - set(before)
    assert dict(model.state_dict()).keys() == after.keys()
    assert isinstance(model.hidden[0], LoRALinear) == ("head" in found)
    merge_adapters(model)
    assert [name for name, _ in model.named_parameters()] == list(before) and not adapters(model)


@pytest.mark.parametrize("module", ["layers.*.k_proj", "attention", "biases"])
def test_a_table_without_a_hit_is_refused(module: str) -> None:
    model = Mixed()
    with pytest.raises(ValueError, match="lora.module = .*matches no linear layer; aliases: body, biases; near names: .*") as caught:
        adapt(model, [LoRAConfig("head"), LoRAConfig(module)], {"body": ["layers.*"], "biases": ["*.bias"]})
    assert module != "layers.*.k_proj" or "layers.0.q_proj" in str(caught.value)
    assert not adapters(model), "nothing is changed by halves"


def test_of_several_tables_the_last_counts() -> None:
    model = Mixed()
    adapt(model, [LoRAConfig("*", rank=2), LoRAConfig("layers.1.*", rank=3, dora=True)], {})
    ranks = {name: len(module.lora_a) for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert ranks == {"layers.0.q_proj": 2, "layers.0.up": 2, "layers.1.q_proj": 3, "layers.1.up": 3, "head": 2}
    assert [name for name, _ in model.named_parameters() if name.endswith("magnitude")] == [
        f"layers.1.{n}.magnitude" for n in ("q_proj", "up")
    ]


def test_what_is_drawn_depends_on_the_name_alone() -> None:
    def drawn(*modules: str) -> dict[str, Tensor]:
        model = Mixed()
        adapt(model, [LoRAConfig(module) for module in modules], {})
        return {name: p for name, p in model.named_parameters() if name.endswith("lora_a")}

    every, some = drawn("*"), drawn("head", "layers.1.q_proj")
    assert all(torch.equal(some[name], every[name]) for name in some) and len(some) == 2
    assert not torch.equal(every["layers.0.q_proj.lora_a"], every["layers.1.q_proj.lora_a"])
    state = torch.random.get_rng_state()
    adapt(Mixed(), [], {})
    before = torch.rand(1)
    torch.random.set_rng_state(state)
    adapt(model := Mixed(), [LoRAConfig("*")], {})
    assert torch.equal(torch.rand(1), before) and adapters(model)


def test_frozen_by_name() -> None:
    model = Mixed()
    adapt(model, [LoRAConfig("layers.0.*", dora=True)], {})
    names = [name for name, _ in model.named_parameters()]
    assert lora_frozen(names) == {"layers.0.q_proj.weight", "layers.0.q_proj.bias", "layers.0.up.weight"}
    assert lora_frozen(name for name, _ in Mixed().named_parameters()) == set()


def test_magnitudes_follow_weights_that_are_replaced() -> None:
    model = Mixed()
    adapt(model, [LoRAConfig("layers.*", dora=True)], {})
    first, second = (cast(LoRALinear, cast(nn.ModuleDict, layer)["q_proj"]) for layer in model.layers)
    assert first.magnitude is not None and second.magnitude is not None
    with torch.no_grad(), fitting_magnitudes(model):
        first.weight.mul_(3)
        second.weight.mul_(3)
        second.magnitude.fill_(7)  # as a checkpoint with adapters does
    torch.testing.assert_close(first.magnitude, first.weight.norm(dim=1))
    assert (second.magnitude == 7).all()


# ---- whole models ----------------------------------------------------------------------------------------------------


def with_adapters(arch: str | None, *, module: str = "transformer", dora: bool = False, noise: float = 0.1, dropout: float = 0.0) -> Tiny:
    """A tiny model whose adapters do something."""
    it = tiny(arch)
    adapt(it.model, [LoRAConfig(module, rank=3, alpha=6.0, dora=dora, dropout=dropout)], it.patterns or {"transformer": ["transformer.*"]})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in it.model.named_parameters():
            if is_adapter(name) and noise:
                p += noise * torch.randn(p.shape, generator=generator)
    return it


@pytest.fixture(params=ARCHS, ids=str)
def arch(request: pytest.FixtureRequest) -> str | None:
    return request.param


def samples(it: Tiny):
    return it.batch(ONE, THREE, INTERLEAVED)


@KINDS
def test_every_arch_starts_as_it_was_and_merges(arch: str | None, dora: bool) -> None:
    base = tiny(arch)
    fresh, trained = (with_adapters(arch, dora=dora, noise=noise) for noise in (0, 0.1))
    batch = samples(base)
    for it in (base, fresh, trained):
        it.model.eval()
    before = all_logits(base.model, batch)
    if dora:
        torch.testing.assert_close(all_logits(fresh.model, batch), before, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(all_logits(fresh.model, batch), before)
    logits = all_logits(trained.model, batch)
    assert not torch.allclose(logits, before, atol=0.01)
    merge_adapters(trained.model)
    assert float((all_logits(trained.model, batch) - logits).norm() / logits.norm()) < 1e-5
    assert [name for name, _ in trained.model.named_parameters()] == [name for name, _ in base.model.named_parameters()]
    assert list(trained.model.state_dict()) == list(base.model.state_dict())


def test_every_linear_layer_of_every_arch_can_have_one(arch: str | None) -> None:
    it = with_adapters(arch, module="*", dora=True)
    assert not [name for name, module in it.model.named_modules() if type(module) is nn.Linear]
    it.model.requires_grad_(False)
    wanted = set(
        match_names([n for n, _ in it.model.named_parameters()], "lora", {"lora": ["*.lora_a", "*.lora_b", "*.magnitude"]}, "freeze")
    )
    for name, p in it.model.named_parameters():
        p.requires_grad_(name in wanted)
    _, grads = gradients(it.model, samples(it))
    assert set(grads) == wanted
    muon = MuonRule().takes(it.model)
    assert not any(is_adapter(name) for name in muon) and muon == MuonRule().takes(tiny(arch).model)


@KINDS
@pytest.mark.parametrize(("recompute", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_sharded_and_recomputed(world: World, dora: bool, recompute: bool, dtype: torch.dtype) -> None:
    plain, it = (with_adapters("joint_decoder", dora=dora, dropout=0.1) for _ in range(2))
    for made in (plain, it):
        frozen = lora_frozen(name for name, _ in made.model.named_parameters())
        for name, p in made.model.named_parameters():
            p.requires_grad_(name not in frozen)
    install(it, world, dtype, recompute=recompute)
    results = []
    for made in (plain, it):
        torch.manual_seed(0)
        loss, grads = gradients(made.model, samples(made))
        results.append({name: _whole(grad) for name, grad in grads.items()} | {"loss": loss})
    if dtype == torch.float32:
        assert results[0].keys() == results[1].keys() and all(torch.equal(results[0][n], results[1][n]) for n in results[0])
    else:
        assert results[0].keys() == results[1].keys() and all(torch.isfinite(g).all() for g in results[1].values())
        torch.testing.assert_close(results[1]["loss"], results[0]["loss"], rtol=0.05, atol=0.05)
    assert any(name.endswith("lora_b") for name in results[0]) and "transformer.layers.0.attention.q_proj.weight" not in results[0]
    assert adapted_layers(it.model)


def _whole(tensor: Tensor) -> Tensor:
    full: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()
