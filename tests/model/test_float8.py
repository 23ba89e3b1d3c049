"""Which layers multiply in float8, when they do, and what is refused. Most of it with a stand-in for torchao, so that it runs without."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kempnerforge.config import LoRAConfig
from kempnerforge.contract.cases import MODEL, SAMPLES, Tiny, tiny
from kempnerforge.distributed.fsdp import recompute_unit
from kempnerforge.model.float8 import to_float8
from kempnerforge.training.freeze import apply_freeze
from kempnerforge.vlm.moma import MoMaConfig

CPU, BF16 = torch.device("cpu"), torch.bfloat16
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


class Doubled(nn.Linear):
    """Stands in for torchao's layer: what it computes cannot be mistaken for the layer's own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@dataclass(frozen=True)
class Config:
    recipe: str = ""
    pad_inner_dim: bool = False

    @staticmethod
    def from_recipe_name(name: str) -> Config:
        return Config(name)


def convert(model: nn.Module, *, config: Config, module_filter_fn: Any) -> None:
    """As torchao does: another module in the layer's place, with its parameters."""
    assert config.pad_inner_dim and config.recipe in RECIPES
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and module_filter_fn(layer, name):
            parent, _, last = name.rpartition(".")
            other = Doubled(layer.in_features, layer.out_features, bias=False, device="meta")
            other.weight, other.bias = layer.weight, layer.bias
            setattr(model.get_submodule(parent), last, other)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = ModuleType("torchao.float8")
    package.Float8LinearConfig, package.convert_to_float8_training = Config, convert
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", package)


@pytest.fixture(scope="module")
def torchao() -> None:
    pytest.importorskip("torchao.float8", reason="the extra float8")


def bf16(arch: str | None, **sections: Any) -> Tiny:
    it = tiny(arch, **sections)
    it.model.bfloat16()
    return it


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ValueError, match=r"train.float8 = 'rowwise': needs the package torchao: pip install 'kempnerforge\[float8\]'"):
        to_float8(tiny("joint_decoder").model, "rowwise", BF16, CPU)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("arch", [None, "joint_decoder", "cross_attention", "mot", "moma", "dual_encoder"])
def test_all_linear_layers_of_the_backbone_and_no_others(arch: str | None) -> None:
    it = tiny(arch)
    parameters = dict(it.model.named_parameters())
    want = {name for name, module in it.model.named_modules() if isinstance(module, nn.Linear) and name.startswith("transformer.layers.")}
    found = to_float8(it.model, "tensorwise", BF16, CPU)
    assert {*found} == want and len(found) >= 7 * MODEL.n_layers
    changed = {name for name, module in it.model.named_modules() if isinstance(module, Doubled)}
    assert changed == want
    now = dict(it.model.named_parameters())
    assert [*now] == [*parameters] and all(now[name] is parameters[name] for name in now)
    assert it.model.state_dict().keys() == now.keys()


@pytest.mark.usefixtures("stand_in")
def test_a_layer_is_in_float8_while_it_trains() -> None:
    """Evaluated and frozen layers, and those without vectors, compute what they compute without."""
    it = tiny("joint_decoder")
    layer_name = to_float8(it.model, "tensorwise", BF16, CPU)[0]
    layer, x = it.model.get_submodule(layer_name), torch.randn(3, MODEL.dim)
    assert isinstance(layer, nn.Linear)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), 2 * plain) and layer(x[:0]).shape == plain[:0].shape
    it.model.eval()
    assert torch.equal(layer(x), plain)
    apply_freeze(it.model, frozenset(name for name, _ in it.model.named_parameters() if not name.startswith(layer_name)))
    assert torch.equal(layer(x), plain)
    apply_freeze(it.model, frozenset(name for name, _ in it.model.named_parameters()))
    assert torch.equal(layer(x), 2 * plain)


@pytest.mark.usefixtures("stand_in")
def test_experts_in_batched_products_see_the_new_layers() -> None:
    it = tiny("moma", vlm=MoMaConfig(max_text_len=64, batched_experts=True))
    to_float8(it.model, "tensorwise", BF16, CPU)
    seen = []
    for name, module in it.model.named_modules():
        if isinstance(module, Doubled) and ".experts." in name:
            module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    it.model(it.batch(*SAMPLES))
    assert {*seen} == {name for name, module in it.model.named_modules() if isinstance(module, Doubled) and ".experts." in name}


@pytest.mark.usefixtures("stand_in")
def test_what_it_does_not_go_with_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"train.float8 = 'tensorwise': computes in bf16 .* set it to 'bf16'"):
        to_float8(tiny(None).model, "tensorwise", torch.float32, CPU)
    with pytest.raises(ValueError, match=r"transformer.layers.0.attention.q_proj is a LoRALinear; not with \[\[lora\]\]"):
        to_float8(tiny(None, lora=[LoRAConfig(module="transformer.layers.0.attention.*", rank=2)]).model, "tensorwise", BF16, CPU)
    with pytest.raises(ValueError, match=r"has 32 inputs and 24 outputs; both must be multiples of 16"):
        sizes = MODEL.__class__(dim=32, n_heads=2, ffn_dim=24, max_seq_len=128, n_layers=1)
        to_float8(tiny(None, model=sizes).model, "tensorwise", BF16, CPU)
    with pytest.raises(ValueError, match=r"Sequential has no linear layers in a text backbone of ours"):
        to_float8(nn.Sequential(nn.Linear(16, 16)), "tensorwise", BF16, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "L4")
    with pytest.raises(ValueError, match=r"train.float8 = 'rowwise': needs a GPU of compute capability 9.0, which L4 is not"):
        to_float8(tiny(None).model, "rowwise", BF16, torch.device("cuda"))
    assert to_float8(tiny(None).model, "tensorwise", BF16, torch.device("cuda"))
    assert to_float8(tiny("joint_decoder", lora=[LoRAConfig(module="vision_encoder.*", rank=2)]).model, "tensorwise", BF16, CPU)


def loss_and_gradients(it: Tiny) -> tuple[float, dict[str, Tensor]]:
    batch = it.batch(*SAMPLES)
    loss = it.model(batch).mean(batch.num_targets, 1)
    loss.backward()
    return loss.item(), {name: p.grad.float() for name, p in it.model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("arch", ["joint_decoder", "mot", "moma"])
def test_loss_and_gradients_are_near_those_of_bf16(recipe: str, arch: str) -> None:
    """Loss within 1 %, gradients with a cosine of at least 0.95: three bits of a number are left, in "tensorwise" gradients two. "mot" has
    samples without images, so a tower without vectors.
    """
    want_loss, want = loss_and_gradients(bf16(arch))
    it = bf16(arch)
    to_float8(it.model, recipe, BF16, CPU)
    loss, got = loss_and_gradients(it)
    assert loss != want_loss and abs(loss - want_loss) < 0.01 * want_loss
    assert got.keys() == want.keys()
    one, other = (torch.cat([gradients[name].flatten() for name in want]) for gradients in (got, want))
    assert 0.95 < torch.cosine_similarity(one, other, dim=0) < 0.9999


@pytest.mark.usefixtures("torchao")
def test_evaluation_is_bitwise_that_of_bf16() -> None:
    plain, it = bf16("joint_decoder"), bf16("joint_decoder")
    to_float8(it.model, "tensorwise", BF16, CPU)
    for each in (plain, it):
        each.model.eval()
    outputs = [each.model(each.batch(*SAMPLES)).loss for each in (plain, it)]
    assert torch.equal(*outputs)


@pytest.mark.usefixtures("torchao")
def test_products_are_kept_where_the_rest_is_recomputed() -> None:
    """Gradients are the same bitwise; with "products" the backward pass computes none twice, which FLOPs show."""
    found = []
    for keep in (None, True, False):
        it = bf16("joint_decoder")
        to_float8(it.model, "tensorwise", BF16, CPU)
        for unit in it.model.shard_units() if keep is not None else ():
            recompute_unit(unit, keep_products=bool(keep))
        batch = it.batch(*SAMPLES)
        with FlopCounterMode(display=False) as counter:
            it.model(batch).mean(1, 1).backward()
        found.append((counter.get_total_flops(), {name: p.grad for name, p in it.model.named_parameters() if p.grad is not None}))
    (none, want), (kept, got), (all_again, again) = found
    assert none == kept < all_again
    for name in want:
        assert torch.equal(got[name], want[name]) and torch.equal(again[name], want[name]), name
