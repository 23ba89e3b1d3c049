"""The towers of Qwen2.5-VL and Qwen3-VL as encoders: features, images of any shape, files, other adapters, and how they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from kempnerforge.config.adapter import MLPAdapterConfig
from kempnerforge.config.data import JsonlConfig
from kempnerforge.contract import training_checks
from kempnerforge.model.patch_merger import PatchMergerConfig
from kempnerforge.model.qwen_vl import QwenTowerConfig, cut
from kempnerforge.model.vision import build_vision_encoder
from tests.interop import tiny_vlms
from tests.vlm import test_native as native
from tests.vlm.tiny import Tiny, tiny
from tests.vlm.views import generation_is_the_full_forward_pass, samples_are_as_alone

SIZES: dict[str, Any] = {"depth": 3, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 4}
SECOND = QwenTowerConfig(settings={"model_type": "qwen2_5_vl_vision", "window_size": 8, **SIZES}, image_size=16, full_attention_layers=[1])
THIRD = QwenTowerConfig(
    settings={"model_type": "qwen3_vl_vision", "num_position_embeddings": 9, **SIZES}, image_size=16, deepstack_layers=[-2, -3]
)
TOWERS = {"qwen2_5_vl": SECOND, "qwen3_vl": THIRD}
each = pytest.mark.parametrize("kind", TOWERS)


def sections(kind: str, **more: Any) -> dict[str, Any]:
    adapter = PatchMergerConfig(norm="rms_norm" if kind == "qwen2_5_vl" else "layer_norm")
    return {"vision_encoder": TOWERS[kind], "adapter": adapter, **more}


def pixels(n: int, side: int = 16) -> Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def in_rows(states: Tensor, rows: int, columns: int) -> Tensor:
    """Patches in the order of windows of 2 x 2 -> row by row."""
    return states.view(rows // 2, columns // 2, 2, 2, -1).transpose(1, 2).flatten(0, 3)


@torch.no_grad()
def test_features_are_those_of_transformers() -> None:
    """Of the last layer and of inner ones, in the order of the key; of whole squares and of parts, each as alone."""
    torch.manual_seed(0)
    ours = build_vision_encoder(THIRD).eval()
    config = hf.models.qwen3_vl.configuration_qwen3_vl.Qwen3VLVisionConfig(
        **SIZES, num_position_embeddings=9, deepstack_visual_indexes=[0, 1]
    )
    theirs: Any = hf.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel(config).eval()
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing.unexpected_keys and {name.split(".")[0] for name in missing.missing_keys} == {"merger", "deepstack_merger_list"}
    assert (ours.dim, ours.layer_dim, ours.num_tokens, ours.side, len(ours.units)) == (48, 16, 16, 4, 3)
    images, states = pixels(3), list[Tensor]()
    for block in theirs.blocks:
        block.register_forward_hook(lambda *found: states.append(found[2]))
    shapes = [(4, 4), (2, 4), (4, 2)]
    got = ours(images, shapes)
    torch.testing.assert_close(ours(images)[0], got[0], rtol=1e-5, atol=1e-5)
    for image, (rows, columns) in enumerate(shapes):
        part = ours.normalise(images[image : image + 1])[:, :, : 4 * rows, : 4 * columns]
        states.clear()
        theirs(cut(part, 4, 2, 2)[0], grid_thw=torch.tensor([[1, rows, columns]]))
        want = torch.cat([in_rows(states[layer], rows, columns) for layer in (2, 1, 0)], dim=-1)
        found = got[image].view(4, 4, -1)
        torch.testing.assert_close(found[:rows, :columns].flatten(0, 1), want, rtol=1e-5, atol=1e-5)
        assert found[rows:].eq(0).all() and found[:, columns:].eq(0).all()


@each
@torch.no_grad()
def test_no_image_and_no_values(kind: str) -> None:
    encoder = build_vision_encoder(TOWERS[kind])
    assert encoder(pixels(0)).shape == (0, 16, encoder.dim)
    with torch.device("meta"):
        assert build_vision_encoder(TOWERS[kind])(torch.empty(2, 3, 16, 16, dtype=torch.uint8)).shape == (2, 16, encoder.dim)


@each
@torch.no_grad()
def test_weights_from_the_files_of_a_whole_model(kind: str, tmp_path: Path) -> None:
    """And the same tower again without them."""
    theirs = tiny_vlms.save(kind, tmp_path)
    deep = [-3, -2] if kind == "qwen3_vl" else []
    cfg = QwenTowerConfig(path=str(tmp_path), image_size=28, deepstack_layers=deep)
    encoder = build_vision_encoder(cfg).eval()
    want = theirs.model.visual.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in encoder.state_dict().items())
    again = build_vision_encoder(encoder.standing_alone(cfg)).eval()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(pixels(1, 28)), encoder(pixels(1, 28))) and again.normalisation == encoder.normalisation
    assert {*encoder.pretrained(cfg)} == {name for name, _ in encoder.named_parameters()}
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="only safetensors are read"):
        build_vision_encoder(cfg)


def test_any_adapter_can_follow() -> None:
    it = tiny("joint_decoder", vision_encoder=THIRD, adapter=MLPAdapterConfig())
    assert it.model.num_image_tokens == 16 and it.model.encode(pixels(2)).shape == (2, 16, 3 * it.job.model.dim)


def test_norms_of_the_mergers() -> None:
    """Before space to depth in the one of the last layer, after it in the others."""
    adapter = native.build(**sections("qwen3_vl")).model.adapter
    widths = {name: len(p) for name, p in adapter.named_parameters() if name.endswith("norm.weight")}
    assert widths == {"norm.weight": 16, "deepstack.0.norm.weight": 64, "deepstack.1.norm.weight": 64}


# ---- whole models -------------------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("mask", ["causal", "image_bidirectional"])
def test_a_sample_in_a_pack_or_beside_others_is_as_alone(kind: str, mask: str) -> None:
    deep = ("adapter.deepstack.1",) if kind == "qwen3_vl" else ()
    it = native.build("joint_decoder", mask, **sections(kind))
    assert it.model.cell == 8
    samples_are_as_alone(it, native.SAMPLES, ("vision_encoder.blocks.2", "vision_encoder.patch_embed", "adapter.proj", *deep))


@each
def test_generation_with_a_cache_is_the_full_forward_pass(kind: str) -> None:
    rows = [("what colour is it?", (native.WIDE,)), ("is <image> like <image> ?", (native.SMALL, native.TALL)), ("what?", ())]
    generation_is_the_full_forward_pass(native.build(**sections(kind)), rows)


CHECKS: dict[str, Callable[..., None]] = {
    "recomputed": lambda arch, world, patch: training_checks.test_activation_checkpointing_changes_nothing(arch, world),
    "flops": lambda arch, world, patch: training_checks.test_flops_on_meta_are_those_that_run(arch, "causal", True, patch),
    "bf16": lambda arch, world, patch: training_checks.test_bf16_is_near_fp32(arch, "causal", world),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("kind", "fit"), [("qwen2_5_vl", "native"), ("qwen3_vl", "squash")])
def test_as_every_model(kind: str, check: str, fit: str, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = JsonlConfig(path="unread.jsonl", images=replace(native.NATIVE, fit=fit))

    def make(*args: Any, **more: Any) -> Tiny:
        return tiny(*args, **sections(kind, data=data, model=native.SECTIONS) | more)

    monkeypatch.setattr(training_checks, "tiny", make)
    CHECKS[check]("joint_decoder", world, monkeypatch)


# ---- what cannot be -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(SECOND, feature_layer=-2), "feature_layer = -2: type 'qwen_vl' gives its last layer"),
        (lambda: replace(SECOND, settings=SECOND.settings | {"spatial_merge_size": 2}), "settings.spatial_merge_size: the adapter does"),
        (lambda: build_vision_encoder(replace(SECOND, image_size=18)), "image_size = 18: must be a multiple of the patch size, 4"),
        (lambda: build_vision_encoder(replace(SECOND, full_attention_layers=[3])), r"full_attention_layers = \[3\] .*: layers from 0 to 2"),
        (lambda: build_vision_encoder(replace(THIRD, full_attention_layers=[1])), "in a qwen3_vl_vision all layers have full attention"),
        (lambda: build_vision_encoder(replace(THIRD, deepstack_layers=[-4])), r"deepstack_layers = \[-4\]: the tower has only 3"),
        (lambda: build_vision_encoder(replace(THIRD, settings=THIRD.settings | {"num_heads": 3})), "hidden_size = 16: must be a multiple"),
        (lambda: build_vision_encoder(replace(SECOND, settings=SECOND.settings | {"window_size": 2})), "window_size = 2: must be at least"),
        (lambda: tiny("joint_decoder", vision_encoder=replace(SECOND, deepstack_layers=[-1])), "gives no inner layers"),
        (lambda: PatchMergerConfig(norm="none"), "norm = 'none': allowed are 'layer_norm', 'rms_norm'"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
