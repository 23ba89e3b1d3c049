"""Towers of transformers: tiny random ones are saved, loaded through ours, and compared with the originals."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from kempnerforge.config.vision import ClipConfig, Dinov2Config, ResizedTowerConfig, Siglip2Config, SiglipConfig
from kempnerforge.model.hf_towers import HFTower
from kempnerforge.model.vision import build_vision_encoder

Kwargs = dict[str, Any]
WIDTHS: Kwargs = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SIGLIP: Kwargs = WIDTHS | {"intermediate_size": 48, "image_size": 24, "patch_size": 8}
TEXT: Kwargs = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1}
DINO: Kwargs = WIDTHS | {"image_size": 24, "patch_size": 8, "mlp_ratio": 2}


@dataclass
class Case:
    config: type[ResizedTowerConfig]
    model: Any
    skip: int  # tokens before the patches
    mean: float
    whole: Any = None  # with its text tower
    dead: tuple[str, ...] = ()


CASES = {
    "siglip": Case(
        SiglipConfig,
        lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIGLIP)),
        0,
        0.5,
        lambda: hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=SIGLIP)),
        ("head.",),
    ),
    "siglip2 of one size": Case(Siglip2Config, lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIGLIP)), 0, 0.5, None, ("head.",)),
    "siglip2": Case(
        Siglip2Config,
        lambda: hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**WIDTHS, intermediate_size=48, num_patches=9, patch_size=8)),
        0,
        0.5,
        None,
        ("head.",),
    ),
    "clip": Case(
        ClipConfig,
        lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SIGLIP)),
        1,
        0.48145466,
        lambda: hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=SIGLIP)),
        ("post_layernorm.",),
    ),
    "dinov2": Case(Dinov2Config, lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO)), 1, 0.485, None, ("embeddings.mask_token",)),
    "dinov2 with registers": Case(
        Dinov2Config,
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**DINO, num_register_tokens=2)),
        3,
        0.485,
        None,
        ("embeddings.mask_token",),
    ),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def images(n: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def saved(make: Any, path: Path) -> Any:
    """A random model, norms and biases included, written to ``path``."""
    torch.manual_seed(0)
    model = make().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    model.save_pretrained(path)
    return model


def patchified(pixels: Tensor) -> dict[str, Tensor]:
    """The input of SigLIP 2, by loops: a patch is a row of pixels, row by row, channels last."""
    steps = range(0, pixels.shape[-1], 8)
    rows = [torch.stack([image[:, y : y + 8, x : x + 8].permute(1, 2, 0).flatten() for y in steps for x in steps]) for image in pixels]
    return {
        "pixel_values": torch.stack(rows),
        "pixel_attention_mask": torch.ones(len(pixels), len(steps) ** 2, dtype=torch.int64),
        "spatial_shapes": torch.full((len(pixels), 2), len(steps)),
    }


@torch.no_grad()
def reference(model: Any, pixels: Tensor, feature_layer: int) -> Tensor:
    inputs = patchified(pixels) if isinstance(model, hf.Siglip2VisionModel) else {"pixel_values": pixels}
    out = model(**inputs, output_hidden_states=True)
    return out.last_hidden_state if feature_layer == -1 else out.hidden_states[feature_layer]


@by_case
def test_positions_are_interpolated_for_another_size(case: Case, tmp_path: Path) -> None:
    """Under the same names and with the same shapes, so that weights of one size are weights of any."""
    theirs = saved(case.model, tmp_path)
    own, ours = (build_vision_encoder(case.config(path=str(tmp_path), image_size=size)) for size in (0, 40))
    assert (ours.image_size, ours.num_tokens) == (40, 25)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in own.state_dict().items())
    pixels = ours.normalise(torch.nn.functional.interpolate(images(2), 40))
    inputs = patchified(pixels) if isinstance(theirs, hf.Siglip2VisionModel) else {"pixel_values": pixels}
    how = {"interpolate_pos_encoding": True} if isinstance(theirs, hf.SiglipVisionModel | hf.CLIPVisionModel) else {}
    with torch.no_grad():
        want = theirs(**inputs, **how, output_hidden_states=True).hidden_states[-2][:, case.skip :]
        deep = build_vision_encoder(case.config(path=str(tmp_path), image_size=40, feature_layer=-2))
        got = deep(torch.nn.functional.interpolate(images(2), 40))
    assert (got - want).abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"image_size = 7: must be (at least one|a multiple of 8)"):
        build_vision_encoder(case.config(path=str(tmp_path), image_size=7))


@by_case
def test_one_feature_is_what_the_class_pools(case: Case, tmp_path: Path) -> None:
    theirs = saved(case.model, tmp_path)
    cfg = case.config(path=str(tmp_path), pooled=True)
    if isinstance(theirs, hf.Siglip2VisionModel):
        with pytest.raises(ValueError, match="pooled = true: of a NaFlex tower the patches are used"):
            build_vision_encoder(cfg)
        return
    ours = build_vision_encoder(cfg)
    with torch.no_grad():
        want = theirs(pixel_values=ours.normalise(images(2))).pooler_output[:, None]
    assert (ours(images(2)) - want).abs().max() < 1e-6
    assert ours(images(0)).shape == (0, ours.num_tokens, 32) == (0, 1, 32)
    ours(images(2)).sum().backward()
    assert [name for name, p in ours.named_parameters() if p.grad is None] == []
    assert len(theirs.state_dict()) - len(ours.state_dict()) == (case.config is Dinov2Config), "all weights but DINOv2's mask token"
    with pytest.raises(ValueError, match="pooled = true: is made of the last layer"):
        case.config(path=str(tmp_path), pooled=True, feature_layer=-2)


@by_case
@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_features_and_names_are_the_originals(case: Case, feature_layer: int, tmp_path: Path) -> None:
    theirs = saved(case.model, tmp_path)
    ours = build_vision_encoder(case.config(path=str(tmp_path), feature_layer=feature_layer))
    assert (ours.num_tokens, ours.dim, ours.image_size, len(ours.units)) == (9, 32, 24, 4 + feature_layer)
    assert abs(float(ours.mean[0]) - case.mean) < 1e-6

    with torch.no_grad():
        got = ours(images(2))
    want = reference(theirs, ours.normalise(images(2)), feature_layer)[:, case.skip :]
    assert got.shape == (2, 9, 32)
    assert want.std() > 0.1
    assert (got - want).abs().max() < 1e-6

    there, here = theirs.state_dict(), ours.state_dict()
    norms = ("post_layernorm.", "layernorm.") if feature_layer == -2 else ()
    layer = ("encoder.layers.2.", "encoder.layer.2.") if feature_layer == -2 else ()
    assert set(there) - set(here) == {name for name in there if name.startswith(case.dead + norms + layer)}
    assert all(torch.equal(here[name], there[name]) for name in here)


@by_case
@pytest.mark.parametrize("layers", [[-1, -3], [-2, -3], [-3, -2]], ids=str)
def test_several_layers_are_joined_in_their_order(case: Case, layers: list[int], tmp_path: Path) -> None:
    theirs = saved(case.model, tmp_path)
    cfg = case.config(path=str(tmp_path), feature_layer=layers)
    ours = build_vision_encoder(cfg)
    assert (ours.dim, len(ours.units)) == (64, 4 + max(layers))
    x = images(2)
    want = torch.cat([reference(theirs, ours.normalise(x), layer)[:, case.skip :] for layer in layers], dim=-1)
    with torch.no_grad():
        assert (ours(x) - want).abs().max() < 1e-6
        twin = build_vision_encoder(ours.standing_alone(cfg.without_weights()))
        twin.load_state_dict(ours.state_dict())
        assert torch.equal(twin(x), ours(x))
    assert ours(images(0)).shape == (0, 9, 64)


@by_case
@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_every_parameter_gets_a_gradient(case: Case, feature_layer: int, tmp_path: Path) -> None:
    saved(case.model, tmp_path)
    ours = build_vision_encoder(case.config(path=str(tmp_path), feature_layer=feature_layer))
    features = ours(images(2))
    (features * torch.randn_like(features)).sum().backward()
    dead = [n for n, p in ours.named_parameters() if p.grad is None or (not p.grad.any() and not n.endswith(("k_proj.bias", "key.bias")))]
    assert dead == []
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


@by_case
def test_no_images(case: Case, tmp_path: Path) -> None:
    saved(case.model, tmp_path)
    ours = build_vision_encoder(case.config(path=str(tmp_path)))
    features = ours(images(0))
    assert features.shape == (0, 9, 32)
    features.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


def test_an_image_that_is_no_multiple_of_the_patch(tmp_path: Path) -> None:
    odd: Kwargs = SIGLIP | {"image_size": 27}
    theirs = saved(lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**odd)), tmp_path)
    ours = build_vision_encoder(ClipConfig(path=str(tmp_path)))
    assert (ours.image_size, ours.num_tokens) == (27, 9)
    x = nn.functional.pad(images(2), (0, 3, 0, 3), value=9)
    assert (ours(x) - reference(theirs, ours.normalise(x), -1)[:, 1:]).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_a_whole_model_with_its_text_tower(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    theirs = saved(case.whole, tmp_path)
    ours = build_vision_encoder(case.config(path=str(tmp_path)))
    with torch.no_grad():
        got = ours(images(2))
    want = reference(theirs.vision_model, ours.normalise(images(2)), -1)[:, case.skip :]
    assert (got - want).abs().max() < 1e-6
    assert not any("text" in n for n, _ in ours.named_parameters())


@by_case
def test_fresh_weights_from_the_config_alone(case: Case, tmp_path: Path) -> None:
    theirs = saved(case.model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    ours = build_vision_encoder(case.config(path=str(tmp_path), pretrained=False))
    assert ours(images(1)).shape == (1, 9, 32)
    there = theirs.state_dict()
    assert all(there[n].shape == p.shape and not torch.equal(there[n], p) for n, p in ours.named_parameters())
    with pytest.raises(ValueError, match="weights cannot be loaded"):
        build_vision_encoder(case.config(path=str(tmp_path)))


@by_case
def test_meta_reads_no_weights(case: Case, tmp_path: Path) -> None:
    saved(case.model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with torch.device("meta"):
        ours = build_vision_encoder(case.config(path=str(tmp_path)))
        assert ours(torch.empty(2, 3, 24, 24, dtype=torch.uint8)).shape == (2, 9, 32)
    assert all(p.is_meta for p in ours.parameters())


@by_case
def test_bf16_weights_and_copies(case: Case, tmp_path: Path) -> None:
    theirs = saved(case.model, tmp_path)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path)
    ours = build_vision_encoder(case.config(path=str(tmp_path)))
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    twin = copy.deepcopy(ours).to(torch.bfloat16)
    assert twin(images(1)).dtype == torch.bfloat16
    for p in twin.parameters():
        nn.init.zeros_(p)
    assert not twin(images(1)).any()
    assert ours(images(1)).dtype == torch.float32
    assert ours(images(1)).any()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}),
        ("processor_config.json", {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}}),
    ],
)
def test_normalisation_of_the_image_processor(file: str, content: dict[str, Any], tmp_path: Path) -> None:
    saved(CASES["clip"].model, tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    ours = build_vision_encoder(ClipConfig(path=str(tmp_path)))
    assert torch.equal(ours.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(ours.std.flatten(), torch.tensor([0.4, 0.5, 0.6]))


def test_image_processor_that_does_not_normalise(tmp_path: Path) -> None:
    saved(CASES["clip"].model, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false, "image_mean": [0.1, 0.2, 0.3]}')
    ours = build_vision_encoder(ClipConfig(path=str(tmp_path)))
    assert torch.allclose(ours.normalise(images(1)), images(1) / 255)


def test_pixels_equal_those_of_the_image_processor(tmp_path: Path) -> None:
    saved(CASES["siglip"].model, tmp_path)
    processor = hf.SiglipImageProcessorPil(size={"height": 24, "width": 24})
    processor.save_pretrained(tmp_path)
    ours = build_vision_encoder(SiglipConfig(path=str(tmp_path)))
    want = processor(list(images(2).permute(0, 2, 3, 1).numpy()), return_tensors="pt")["pixel_values"]
    assert (ours.normalise(images(2)) - want).abs().max() < 1e-6


def edit(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@by_case
@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_settings_make_the_same_tower_without_its_files(case: Case, feature_layer: int, tmp_path: Path) -> None:
    saved(case.model, tmp_path)
    cfg = case.config(path=str(tmp_path), feature_layer=feature_layer)
    ours = build_vision_encoder(cfg)
    assert isinstance(ours, HFTower)
    twin = build_vision_encoder(ours.standing_alone(cfg.without_weights()))
    twin.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert torch.equal(twin(images(2)), ours(images(2)))


def test_user_errors(tmp_path: Path) -> None:
    path = tmp_path / "clip"
    saved(CASES["clip"].model, path)
    good = str(path)
    build_vision_encoder(ClipConfig(path=good))
    with pytest.raises(
        ValueError, match=r"model_type 'clip_vision_model' is not of type 'siglip', which takes siglip, siglip_vision_model"
    ):
        build_vision_encoder(SiglipConfig(path=good))
    with pytest.raises(ValueError, match=r"path = '.*nowhere': no such directory"):
        build_vision_encoder(ClipConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"no config\.json"):
        build_vision_encoder(ClipConfig(path=str(tmp_path)))
    with pytest.raises(ValueError, match=r"feature_layer = -4: the tower in .* has only 3 layers"):
        build_vision_encoder(ClipConfig(path=good, feature_layer=-4))
    for content in ('{"image_mean": [0.5], "image_std": [0.5]}', '{"image_mean": 0.5, "image_std": 0.5}'):
        (path / "preprocessor_config.json").write_text(content)
        with pytest.raises(ValueError, match="three numbers each"):
            build_vision_encoder(ClipConfig(path=good))
    for content, why in (("{", "not JSON"), ("[]", "holds no JSON object")):
        (path / "preprocessor_config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"preprocessor_config\.json: {why}"):
            build_vision_encoder(ClipConfig(path=good))


def test_configs_that_do_not_fit(tmp_path: Path) -> None:
    saved(CASES["clip"].model, tmp_path)
    cfg = ClipConfig(path=str(tmp_path))
    edit(tmp_path, num_hidden_layers=5)
    with pytest.raises(ValueError, match=r"32 missing: encoder\.layers\.3"):
        build_vision_encoder(cfg)
    edit(tmp_path, num_hidden_layers=3, intermediate_size=64)
    with pytest.raises(ValueError, match=r"9 of another shape: encoder\.layers\.0\.mlp\.fc1\.bias \(48,\), not \(64,\)"):
        build_vision_encoder(cfg)
    edit(tmp_path, intermediate_size=48, num_channels=1)
    with pytest.raises(ValueError, match="3 channels"):
        build_vision_encoder(ClipConfig(path=str(tmp_path), pretrained=False))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        build_vision_encoder(cfg)


def test_torn_weights(tmp_path: Path) -> None:
    saved(CASES["dinov2"].model, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="weights cannot be loaded"):
        build_vision_encoder(Dinov2Config(path=str(tmp_path)))


def test_a_shard_unit_is_called_once_per_forward(tmp_path: Path) -> None:
    saved(CASES["clip"].model, tmp_path)
    ours = build_vision_encoder(ClipConfig(path=str(tmp_path)))
    assert isinstance(ours, HFTower)
    called: list[nn.Module] = []
    for unit in ours.units:
        unit.register_forward_hook(lambda module, *_: called.append(module))
    ours(images(2))
    assert called == ours.units


def test_quiet_and_late(tmp_path: Path) -> None:
    saved(CASES["clip"].whole, tmp_path)
    code = f"""
import sys
from kempnerforge.config.vision import ClipConfig
from kempnerforge.model.vision import build_vision_encoder
from kempnerforge.config import registry
assert "clip" in registry.vision_encoders
assert "transformers" not in sys.modules
build_vision_encoder(ClipConfig(path={str(tmp_path)!r}))
assert "transformers" in sys.modules
from transformers.utils import logging
assert logging.is_progress_bar_enabled()
assert logging.get_verbosity() == logging.WARNING
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
