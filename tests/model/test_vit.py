"""Our vision transformer against transformers' SigLIP, and the contract of every encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from kempnerforge.config import registry
from kempnerforge.config.vision import VisionEncoderConfig, ViTConfig
from kempnerforge.model.vision import VisionEncoder, build_vision_encoder
from kempnerforge.model.vit import ViT

SMALL: dict[str, Any] = {"image_size": 24, "patch_size": 8, "dim": 32, "n_layers": 3, "n_heads": 2, "mlp_dim": 48}
TO_SIGLIP: dict[str, str] = {
    "position_embedding": "embeddings.position_embedding.weight",
    "patch_embedding": "embeddings.patch_embedding",
    "layers": "encoder.layers",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attention": "self_attn",
    "norm": "post_layernorm",
}


def images(n: int, size: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def siglip(cfg: ViTConfig) -> SiglipVisionModel:
    """The same tower in transformers, with random values for everything, norms and biases included."""
    torch.manual_seed(1)
    config = SiglipVisionConfig(
        hidden_size=cfg.dim,
        intermediate_size=cfg.mlp_dim,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        layer_norm_eps=cfg.norm_eps,
        vision_use_head=False,
    )
    model = SiglipVisionModel(config).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def in_siglip(name: str) -> str:
    parts = [TO_SIGLIP.get(part, part) for part in name.split(".")]
    return ".".join(parts)


@pytest.mark.parametrize("feature_layer", [-1, -2, -3])
def test_equals_siglip(feature_layer: int) -> None:
    cfg = ViTConfig(**SMALL, feature_layer=feature_layer)
    theirs = siglip(cfg)
    ours = ViT(cfg)
    weights = theirs.state_dict()
    mapped = {name: weights[in_siglip(name)] for name in ours.state_dict()}
    ours.load_state_dict(mapped)
    assert len(mapped) == len(weights) - 16 * (-1 - feature_layer) - 2 * (feature_layer < -1)

    x = images(2)
    with torch.no_grad():
        want = theirs(pixel_values=(x / 255 - 0.5) / 0.5, output_hidden_states=True)
        got = ours(x)
    want = want.last_hidden_state if feature_layer == -1 else want.hidden_states[feature_layer]
    assert got.shape == (2, 9, 32)
    assert want.std() > 0.1
    assert (got - want).abs().max() < 1e-5


@pytest.mark.parametrize("layers", [[-2, -3], [-3, -2], [-1, -3]], ids=str)
def test_several_layers_are_joined_in_their_order(layers: list[int]) -> None:
    whole = ViT(ViTConfig(**SMALL))
    several = ViT(ViTConfig(**SMALL, feature_layer=layers))
    several.load_state_dict({name: value for name, value in whole.state_dict().items() if name in several.state_dict()})
    assert several.dim == 64 and len(several.units) == 4 + max(layers)
    features = []
    for layer in layers:
        single = ViT(ViTConfig(**SMALL, feature_layer=layer))
        single.load_state_dict({name: whole.state_dict()[name] for name in single.state_dict()})
        features.append(single(images(2)))
    assert torch.equal(several(images(2)), torch.cat(features, dim=-1))


@pytest.mark.parametrize(
    "change",
    [{}, {"feature_layer": -2}, {"feature_layer": -3}, {"feature_layer": [-2, -3]}, {"cls_token": True}, {"patch_size": 8, "stride": 4}],
    ids=["plain", "second to last", "first", "two", "cls", "overlap"],
)
def test_every_parameter_gets_a_gradient(change: dict[str, Any]) -> None:
    cfg = ViTConfig(**SMALL | change)
    model = ViT(cfg)
    features = model(images(2))
    assert features.shape == (2, cfg.num_tokens(), 32 * len(cfg.feature_layers)) == (2, model.num_tokens, model.dim)
    (features * torch.randn_like(features)).sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or (not p.grad.any() and "k_proj.bias" not in name)]
    assert dead == []  # a key bias shifts all scores of a query alike: its gradient is nothing but rounding


def test_names() -> None:
    names = set(ViT(ViTConfig(**SMALL, cls_token=True)).state_dict())
    linears = [f"attention.{p}_proj" for p in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2", "norm1", "norm2"]
    want = {f"layers.{i}.{m}.{w}" for i in range(3) for m in linears for w in ("weight", "bias")}
    want |= {"patch_embedding.weight", "patch_embedding.bias", "position_embedding", "cls_token", "norm.weight", "norm.bias"}
    assert names == want
    assert not any(n.startswith(("norm.", "layers.2")) for n in ViT(ViTConfig(**SMALL, feature_layer=-2)).state_dict())


@pytest.mark.parametrize(("patch", "stride", "tokens"), [(8, 0, 9), (8, 4, 36), (8, 2, 144), (12, 8, 9)])
def test_overlapping_patches_keep_the_grid(patch: int, stride: int, tokens: int) -> None:
    model = ViT(ViTConfig(**SMALL | {"patch_size": patch, "stride": stride}))
    assert model.num_tokens == tokens
    assert model(images(1)).shape == (1, tokens, 32)


def test_patches_are_numbered_row_by_row() -> None:
    model = ViT(ViTConfig(**SMALL | {"n_layers": 1}))
    model.layers = nn.ModuleList()
    model.norm = nn.Identity()
    x = images(1)
    changed = x.clone()
    changed[:, :, 8:16, 16:24] ^= 255  # row 1, column 2 of 3 x 3
    moved = (model(x) - model(changed)).abs().sum(-1)[0]
    assert moved.nonzero().flatten().tolist() == [5]


def test_cls_token_comes_first_and_sees_the_image() -> None:
    model = ViT(ViTConfig(**SMALL, cls_token=True))
    a, b = model(images(2))
    assert model.num_tokens == 10
    assert not torch.allclose(a[0], b[0])


def test_normalise() -> None:
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    model = ViT(ViTConfig(**SMALL, mean=mean, std=std))
    x = images(2)
    want = torch.stack([(x[:, c].double() / 255 - mean[c]) / std[c] for c in range(3)], dim=1)
    assert (model.normalise(x) - want).abs().max() < 1e-6
    assert not {"mean", "std"} & set(model.state_dict())
    assert {"mean", "std"} == {name for name, _ in model.named_buffers()}


@pytest.mark.parametrize("bad", [torch.zeros(1, 3, 24, 24), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)], ids=["float", "size"])
def test_other_pixels_are_a_programming_error(bad: Tensor) -> None:
    with pytest.raises(AssertionError):
        ViT(ViTConfig(**SMALL))(bad)


def test_no_images() -> None:
    model = ViT(ViTConfig(**SMALL, cls_token=True))
    features = model(images(0))
    assert features.shape == (0, 10, 32)
    features.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_bf16_weights() -> None:
    model = ViT(ViTConfig(**SMALL))
    want = model(images(2))
    got = model.to(torch.bfloat16)(images(2))
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().max() < 0.1


def test_meta() -> None:
    with torch.device("meta"):
        model = build_vision_encoder(ViTConfig(**SMALL, cls_token=True))
        assert model(torch.empty(2, 3, 24, 24, dtype=torch.uint8)).shape == (2, 10, 32)
    assert all(p.is_meta for p in model.parameters())


def test_build() -> None:
    model = build_vision_encoder(ViTConfig(**SMALL))
    assert isinstance(model, ViT)
    assert (model.num_tokens, model.dim, model.image_size) == (9, 32, 24)
    assert [id(unit) for unit in model.units] == [id(layer) for layer in model.get_submodule("layers").children()]
    assert {"vit", "siglip", "siglip2", "clip", "dinov2"} <= set(registry.vision_encoders)


def test_a_config_without_a_model_says_so() -> None:
    @dataclass
    class Config(VisionEncoderConfig):
        type: str = "vitt"

    with pytest.raises(NotImplementedError, match=r"^vision_encoder.type = 'vitt': has a config but no model; .*did you mean 'vit'"):
        build_vision_encoder(Config())


def test_the_contract_must_be_filled_in() -> None:
    with pytest.raises(TypeError, match="abstract methods forward, units"):
        VisionEncoder(num_tokens=1, dim=1, image_size=1, mean=[0, 0, 0], std=[1, 1, 1])
